"""Exports the checkpoints of one pipeline, and verifies and installs all its models together."""

import gc
import json
import shlex
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from export import install
from export.deployment import AUTO, Deployment, model_config
from export.engine import Builder, TensorRtModel, build_engine, find_builders
from export.ensemble import ensembles_are_installed, with_ensembles, write_ensembles
from export.onnx_graph import ExportTarget, count_attentions, to_precision
from export.parity import size_figures, torch_figures
from export.peaks import HALVES, LARGEST, watched_figures
from export.runtime import (
    Runtime,
    TrialResult,
    block_times,
    candidates,
    choose,
    export_for,
    try_runtimes,
)
from export.source import Loaded, Source, source_digests
from export.whole import WholeCheck
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import ORCHESTRATOR, VAE_ROLES, Role, model_name
from flowturbo.ensemble import check_schedule
from flowturbo.errors import RepositoryError
from flowturbo.local import open_role
from flowturbo.nets.weights import CheckpointError
from flowturbo.parity import TOLERANCES, Figures, VerificationError, batches_up_to
from flowturbo.pipeline import (
    Defaults,
    ModelRecord,
    Pipeline,
    check_solvers,
    flow_of,
    installed,
    read_pipeline,
    solvers_path,
    with_solvers,
)
from flowturbo.presets import Presets, built_in, find_schedule, parse_presets, parsed
from flowturbo.rows import Tensors
from flowturbo.runtimes import model_file
from flowturbo.settings import Settings
from flowturbo.solver.schedule import Schedule
from flowturbo.solvers import Solvers
from flowturbo.textfile import read_lines, read_text
from flowturbo.tiles import Tiles

# Unicode categories of invisible characters: control, format, lone surrogates.
_HIDDEN = ("Cc", "Cf", "Cs")
# PyTorch's answers at the default size, and at the others.
_Reference = tuple[Figures, list[tuple[Tensors, Tensors]]]
_JOINERS = "\u200c\u200d"  # some languages need these between other characters


@dataclass(frozen=True)
class Options:
    """What to export, its `name`, and where to. `command` is the command line of this export."""

    name: str
    source: Source
    deployment: Deployment
    repository: Path
    class_names: Path | None
    compute_capability: str | None
    timing_cache: Path
    force: bool
    ensemble: tuple[str, ...] | None
    presets: Path | None
    solvers: Path | None
    guidance_scale: float | None
    default_schedule: str | None
    command: str

    # Read once, so that the checked content is the installed content, even from a pipe.
    @cached_property
    def names(self) -> list[str]:
        """The class names; empty if no file was given. Raises TextFileError."""
        return read_lines(self.class_names) if self.class_names else []

    @cached_property
    def presets_text(self) -> str:
        """The content of the presets file, which must be given. Raises TextFileError."""
        assert self.presets
        return read_text(self.presets)

    @property
    def has_refiner(self) -> bool:
        return self.source.has_refiner


def export_pipeline(options: Options) -> None:
    """Exports, verifies and installs a pipeline; does nothing if the same one is installed.

    Raises CheckpointError, VerificationError or EngineError. Raises RepositoryError for presets
    that the models cannot serve. After an error the repository's pipelines are as before.
    """
    repository = options.repository
    former = _former(options)
    presets = _presets(options, former)  # fail fast, before minutes of export
    schedules = _ensembles(options, former, presets)
    defaults = _defaults(options, former, presets)
    builders: list[Builder] = []
    if options.deployment.engine == "tensorrt":  # fail fast, before minutes of export
        builders = find_builders(options.compute_capability)
    if install.mend_orchestrator(repository):
        print(f"export: updated {ORCHESTRATOR} to this version, with its settings as before")
    settings = Settings.load(repository)
    fingerprint = _fingerprint(options)
    solvers = _solvers(options, former, fingerprint)
    _check_learned(presets, solvers)
    same = None if options.force else install.installed_pipeline(repository, options.name)
    if same and same.fingerprint != fingerprint:
        same = None
    if same and _is_current(options, same, builders, settings, schedules):
        wanted = _stated(same, options, defaults, presets, schedules, solvers)
        if wanted != same:
            install.write_record(repository, wanted)
        if replace(wanted, command=same.command) != same:
            print(f"export: updated the defaults and presets in the record of {options.name}")
        else:
            print(f"export: {repository}: {options.name} is up to date")
    else:
        with install.staging(repository) as staged:
            if same:
                pipeline = same
                composed = [pipeline.model(role) for role in pipeline.models]
                install.link_installed(repository, composed, staged)
            else:
                pipeline = _write_models(options, fingerprint, staged)
            for builder in builders:
                pipeline = _with_engines(pipeline, staged, builder, options)
            for role in pipeline.models:
                text = _config(pipeline, role, options.deployment)
                install.replace_text(staged / pipeline.model(role) / "config.pbtxt", text)
            pipeline = with_ensembles(pipeline, settings, schedules)
            write_ensembles(staged, pipeline, settings, schedules)
            pipeline = _stated(pipeline, options, defaults, presets, schedules, solvers)
            install.add_orchestrator(repository)
            former_folders = install.folders_of(repository, options.name)
            install.install(staged, repository, pipeline, former_folders)
        shown = ", ".join(map(str, schedules)) or "none"
        size = pipeline.device_bytes / 2**30
        print(
            f"export: installed {options.name} in {repository}, ensembles: {shown}; weights and "
            f"largest batches: {size:.2f} GiB"
        )
    if install.choose_default(repository, options.name):
        print(f"export: {options.name} is the default pipeline now")


def _former(options: Options) -> Pipeline | None:
    """The installed pipeline of this name; None if its record cannot be read."""
    try:
        found = read_pipeline(options.repository, options.name, solvers=False)
    except RepositoryError:
        return None
    try:
        return with_solvers(found, solvers_path(options.repository, options.name))
    except RepositoryError as error:
        print(f"export: the fitted solvers are dropped: {error}")
        return found


def _presets(options: Options, former: Pipeline | None) -> dict[str, str]:
    """The given presets as texts, or those that the installed pipeline has."""
    if options.presets:
        return parse_presets(options.presets_text, options.presets, has_refiner=options.has_refiner)
    kept = dict(former.own_presets) if former else {}
    if not options.has_refiner:
        lost = [
            name
            for name, schedule in parsed(kept).items()
            if any(each and each.refines for each in (schedule, schedule.otherwise))
        ]
        if lost:
            print(f"export: presets {', '.join(lost)} need a refiner and are dropped")
        kept = {name: text for name, text in kept.items() if name not in lost}
    return kept


def _solvers(
    options: Options, former: Pipeline | None, fingerprint: Mapping[str, Any]
) -> Solvers | None:
    """The given solvers, or those of the installed pipeline if they are of the same model.

    Raises RepositoryError if the given ones are of another model.
    """
    flow = flow_of(fingerprint)
    if options.solvers:
        given = Solvers.read(options.solvers)
        if given.flow != flow:
            raise RepositoryError(
                f"{options.solvers} was fitted to another model than {options.name}: fit it again "
                "with python -m tuning.fit"
            )
        return given
    kept = former.solvers if former else None
    if kept and kept.flow != flow:
        print(f"export: the solvers of {options.name} were fitted to another model and are dropped")
        return None
    return kept


def _check_learned(presets: Mapping[str, str], solvers: Solvers | None) -> None:
    """Raises RepositoryError for presets whose solvers are missing."""
    counts = solvers.counts if solvers else []
    for name, schedule in parsed(presets).items():
        if schedule.learned and len(schedule) not in counts and not schedule.otherwise:
            raise RepositoryError(
                f"preset {name} is {schedule}, and there is no such fitted solver: give --solvers"
            )


def _ensembles(
    options: Options, former: Pipeline | None, presets: Mapping[str, str]
) -> tuple[Schedule, ...]:
    """The given schedules, or those of the installed ensembles that the new models can serve."""
    if options.ensemble is None:
        found = map(Schedule.parse, former.ensembles if former else ())
        return tuple(s for s in found if options.has_refiner or not s.refines)
    known = _known(options, presets)
    schedules = tuple(dict.fromkeys(find_schedule(text, known) for text in options.ensemble))
    for schedule in schedules:
        if schedule.refines and not options.has_refiner:
            raise CheckpointError(f"--ensemble {schedule} has refiner steps: it needs --refiner")
        check_schedule(schedule)
    return schedules


def _known(options: Options, presets: Mapping[str, str]) -> Presets:
    """The presets that the new pipeline will have."""
    return {**built_in(has_refiner=options.has_refiner), **parsed(presets)}


def _defaults(options: Options, former: Pipeline | None, presets: Mapping[str, str]) -> Defaults:
    """The given defaults, or those that the installed pipeline has.

    Raises RequestError for a schedule that cannot be read. Raises CheckpointError for one that
    needs a refiner if there is none.
    """
    kept = _chosen(former) if former else Defaults()
    scale = kept.guidance_scale if options.guidance_scale is None else options.guidance_scale
    text = options.default_schedule or kept.schedule
    if text and find_schedule(text, _known(options, presets)).refines and not options.has_refiner:
        raise CheckpointError(f"the default schedule {text} has refiner steps: it needs --refiner")
    return Defaults(text, scale)


def _chosen(pipeline: Pipeline) -> Defaults:
    """The defaults that the command of a pipeline names; others are those of its model."""
    words, had = shlex.split(pipeline.command), pipeline.defaults
    names = {word.partition("=")[0] for word in words}
    return Defaults(
        schedule=had.schedule if "--default-schedule" in names else None,
        guidance_scale=had.guidance_scale if "--guidance-scale" in names else None,
    )


def _stated(
    pipeline: Pipeline,
    options: Options,
    defaults: Defaults,
    presets: Mapping[str, str],
    schedules: tuple[Schedule, ...],
    solvers: Solvers | None,
) -> Pipeline:
    """`pipeline` with these defaults, presets and solvers, and the command that makes it.

    Defaults that nobody chose are those of the model.
    """
    # What the pipeline keeps although the command did not name it.
    kept: list[str] = []
    if options.ensemble is None and schedules:
        kept += ["--ensemble", *map(str, schedules)]
    if options.guidance_scale is None and defaults.guidance_scale is not None:
        kept += ["--guidance-scale", f"{defaults.guidance_scale:g}"]
    if options.default_schedule is None and defaults.schedule:
        kept += ["--default-schedule", defaults.schedule]
    command = shlex.join([*shlex.split(options.command), *kept])
    if solvers and options.solvers:
        check_solvers(pipeline, solvers, options.solvers)
    elif solvers and solvers.latent_shape != pipeline.latent_shape:
        print(f"export: the solvers of {options.name} were fitted to another size and are dropped")
        solvers = None
    own = pipeline.defaults
    scale = own.guidance_scale if defaults.guidance_scale is None else defaults.guidance_scale
    stated = replace(
        pipeline,
        defaults=Defaults(defaults.schedule or own.schedule, scale),
        own_presets=dict(presets),
        solvers=solvers,
        command=command,
    )
    # What no request could use would keep the whole server from starting.
    stated.default_schedule(Settings.load(options.repository))
    for name in presets:
        stated.find_schedule(name)
    return stated


def _fingerprint(options: Options) -> dict[str, Any]:
    """Everything that determines the result, as JSON values: sources, options, tools and code."""
    found = {
        "sha256": source_digests(options.source),
        "options": options.source.reading() | asdict(options.deployment),
        "class_names": options.names,
        "versions": install.versions(),
        # The fastest runtime depends on the processor.
        "processor": install.processor_digest() if options.deployment.engine == "python" else None,
        "code": install.source_digest(),
    }
    stated: dict[str, Any] = json.loads(json.dumps(found))
    return stated


def _is_current(
    options: Options,
    pipeline: Pipeline,
    builders: list[Builder],
    settings: Settings,
    schedules: tuple[Schedule, ...],
) -> bool:
    """Whether engines, configurations and ensembles equal those that an export would install."""
    repository = options.repository
    if any(_lacking(pipeline, repository, builder) for builder in builders):
        return False
    for role in pipeline.models:
        path = repository / pipeline.model(role) / "config.pbtxt"
        if not path.is_file() or path.read_text() != _config(pipeline, role, options.deployment):
            return False
    return ensembles_are_installed(repository, pipeline, settings, schedules)


def _check_names(options: Options, classes: ClassLabel) -> None:
    names = options.names
    if options.class_names and not names:
        raise CheckpointError(f"{options.class_names} has no names: one name per line is needed")
    if names and len(names) != classes.num_classes:
        hint = (
            f". If the model was trained on the class of the last name, give --num-classes "
            f"{len(names)}: the model then has no null class and no guidance. Check for a line "
            "that is not a name, such as a heading: it would shift all names"
        )
        hint = hint if len(names) == classes.num_classes + classes.null_class else ""
        raise CheckpointError(
            f"{options.class_names} has {len(names)} names, "
            f"the predictor has {classes.num_classes} classes{hint}"
        )
    for line, name in enumerate(names, 1):
        if name != name.strip():
            raise CheckpointError(
                f"{options.class_names}: line {line} must be a name without leading blanks"
            )
        if not name:
            raise CheckpointError(f"{options.class_names}: line {line} must be a name, it is empty")
        if hidden := next(_hidden(name), None):
            raise CheckpointError(
                f"{options.class_names}: line {line} must be a name of visible characters, it "
                f"has U+{ord(hidden):04X}"
            )
        if (first := names.index(name) + 1) < line:
            raise CheckpointError(
                f"{options.class_names}: names must be unique, {name!r} is in lines {first} and "
                f"{line}"
            )


def _hidden(name: str) -> Iterator[str]:
    for k, character in enumerate(name):
        joins = character in _JOINERS and 0 < k < len(name) - 1
        if unicodedata.category(character) in _HIDDEN and not joins:
            yield character


def _write_models(options: Options, fingerprint: dict[str, Any], staged: Path) -> Pipeline:
    """Exports and verifies every model. The returned record has the runtime of each model."""
    written: dict[Role, _Written] = {}
    with tempfile.TemporaryDirectory() as scratch:
        loaded = _load(options, Path(scratch))
        condition, latent_shape = loaded.targets[0].condition, loaded.targets[0].latent_shape
        if isinstance(condition, ClassLabel):
            _check_names(options, condition)
        whole = WholeCheck.of(loaded) if loaded.family else None
        # Each module is dropped once it is exported: it may be gigabytes.
        targets, loaded = list(loaded.targets), replace(loaded, targets=(), family=None)
        while targets:
            exported = targets.pop(0)
            folder = staged / model_name(options.name, exported.role)
            files = loaded.files if exported.role is Role.TEXT_ENCODER else {}
            written[exported.role] = _write(exported, options, folder, files)
            del exported
            gc.collect()  # networks refer to themselves
    base = Pipeline(
        name=options.name,
        condition=condition,
        latent_shape=latent_shape,
        models={},
        defaults=Defaults(loaded.schedule, loaded.guidance_scale),
        fingerprint=fingerprint,
        **loaded.fields,
    )
    pipeline = _with_runtimes(base, written, options)
    if whole is None:
        return _with_block_times(pipeline, options, staged)
    try:
        whole.hold(pipeline, staged)
    except VerificationError as error:
        # Each model may pass in bfloat16, and all of them together not. The VAE has no part.
        exact = {
            role: model if role in VAE_ROLES else model.in_float32()
            for role, model in written.items()
        }
        if options.deployment.precision != AUTO or not all(each.trials for each in exact.values()):
            raise
        print(f"{error}: float32 instead")
        pipeline = _with_runtimes(base, exact, options)
        whole.hold(pipeline, staged)
    return _with_block_times(pipeline, options, staged)


def _with_block_times(pipeline: Pipeline, options: Options, staged: Path) -> Pipeline:
    """`pipeline` with the times per call that the service plans with, measured on this CPU.

    Engines and GPUs are left out: the service learns their times from its calls.
    """
    deployment = options.deployment
    if deployment.engine != "python" or deployment.on_gpu:
        return pipeline
    print("export: block times ... ", end="", flush=True)
    models = {}
    for role, record in pipeline.models.items():
        figures = Figures.load(staged / pipeline.model(role))
        times = block_times(open_role(staged, pipeline, role), figures, record.max_rows)
        models[role] = replace(record, block_ms=times)
    print("done")
    return replace(pipeline, models=models)


def _with_runtimes(
    base: Pipeline, written: Mapping[Role, "_Written"], options: Options
) -> Pipeline:
    """`base` with every model, in the runtimes that are the fastest here."""
    chosen: dict[Role, Runtime] = {}
    for kind in dict.fromkeys(model.kind for model in written.values()):
        group = {role: m.trials for role, m in written.items() if m.kind == kind}
        runtime = choose(group)
        chosen |= dict.fromkeys(group, runtime)
        if len(candidates(replace(options.deployment, precision=kind[0]))) > 1:
            print(f"fastest here: {runtime} ({', '.join(group)})")
    models = {}
    for role, model in written.items():
        trial = model.trials[chosen[role]]
        parity = trial.parity
        shown = ", ".join(f"{output} off by {error:.1e}" for output, error in parity.items())
        print(f"{model_name(options.name, role)}: {shown}")
        models[role] = replace(
            model.record,
            runtime=chosen[role].name,
            precision=chosen[role].precision,
            fixed_rows=list(trial.fixed_rows),
            parity=parity,
            times_ms={
                str(runtime): {str(rows): ms for rows, ms in each.times_ms.items()}
                for runtime, each in model.trials.items()
            },
        )
    pipeline = replace(base, models=models)
    return replace(pipeline, token_budget=_token_budget(pipeline, options))


def _load(options: Options, scratch: Path) -> Loaded:
    """Reads the source, and says what of it is not used."""
    half = options.deployment.precision not in (AUTO, "fp32")
    loaded = options.source.load(options.names, half=half, scratch=scratch)
    if loaded.family and loaded.family.ignored:
        print(f"export: not needed and not read: {', '.join(loaded.family.ignored)}")
    return loaded


def _token_budget(pipeline: Pipeline, options: Options) -> int:
    """The tokens of `max_rows` rows of the default size; 0 if there is one size only."""
    if not pipeline.image_sizes:
        return 0
    return options.deployment.max_rows * pipeline.tokens(pipeline.latent_shape)


@dataclass(frozen=True)
class _Written:
    """A model that was exported in one precision: its record, without the chosen runtime."""

    record: ModelRecord
    precision: str
    trials: dict[Runtime, TrialResult]

    @property
    def kind(self) -> tuple[str, frozenset[Runtime]]:
        """Models of one kind have the same precision and runtimes, and share a runtime."""
        return self.precision, frozenset(self.trials)

    def in_float32(self) -> "_Written":
        """The same, with the runtimes in float32 alone."""
        exact = {of: trial for of, trial in self.trials.items() if of.precision == "fp32"}
        return replace(self, trials=exact)


def _write(
    exported: ExportTarget, options: Options, folder: Path, files: Mapping[str, str]
) -> _Written:
    """Exports one model into `folder`; its configuration is written later.

    `files` are written beside it.
    """
    (folder / "1").mkdir(parents=True)
    for name, text in files.items():
        (folder / "1" / name).write_text(text)
    deployment, source = options.deployment, options.source.files()[exported.role]
    wanted = _precisions(exported.role, deployment)
    print(f"{folder.name}: PyTorch in float32 ... ", end="", flush=True)
    peak = None
    if wanted[0] in HALVES:
        figures, peak = watched_figures(exported)
    else:
        figures = torch_figures(exported)
    too_large = peak is not None and not peak.fits_half
    if too_large:
        wanted = wanted[1:] or ["fp32"]
        said = "float32 (bf16 has float32's range)" if wanted == ["fp32"] else wanted[0]
        print(f"{peak}, float16 ends at {LARGEST:.0f}: stays in {said} ... ", end="", flush=True)
    figures.save(folder)
    reference = figures, size_figures(exported)
    print(f"{source} to ", end="", flush=True)
    precision, trials = _export(exported, deployment, reference, wanted, folder / "1")
    if deployment.engine == "python":
        (folder / "1" / "model.py").write_text(install.MODEL_PY)
    record = ModelRecord(
        engine=deployment.engine,
        on_gpu=deployment.on_gpu,
        max_rows=deployment.max_rows,
        sizes={str(key): size for key, size in exported.sizes(figures.outputs).items()},
        source=source.name,
        files=install.file_digests(folder),
        device_bytes=_device_bytes(figures, deployment, folder / "1"),
        peak=peak.magnitude if peak else None,
        kept_in_float32=too_large and wanted == ["fp32"],
    )
    return _Written(record, precision, trials)


def _device_bytes(figures: Figures, deployment: Deployment, version: Path) -> int:
    """The model's files, and its inputs and outputs for the largest batch."""
    tensors = (*figures.inputs.values(), *figures.outputs.values())
    row = sum(tensor[0].nbytes for tensor in tensors)
    return sum(path.stat().st_size for path in version.iterdir()) + deployment.max_rows * row


def _precisions(role: Role, deployment: Deployment) -> list[str]:
    """The precisions to try for a model, in order: the first that verifies is used."""
    if role in VAE_ROLES and (deployment.engine, deployment.precision) == ("tensorrt", "bf16"):
        return ["fp16", "bf16"]  # fp16 has three more bits, and its convolutions are as fast
    if role is Role.TEXT_ENCODER and deployment.precision in (*HALVES, "bf16"):
        # Not float16: T5's values leave its range (diffusers #8673).
        has_bf16 = deployment.engine == "tensorrt" or deployment.precision == "bf16"
        return ["bf16", "fp32"] if has_bf16 else ["fp32"]
    return [deployment.precision]


def _export(
    exported: ExportTarget,
    deployment: Deployment,
    reference: _Reference,
    precisions: list[str],
    version: Path,
) -> tuple[str, dict[Runtime, TrialResult]]:
    """Exports in the first of `precisions` that verifies. Returns it with its trials."""
    for precision in precisions[:-1]:
        tried = replace(exported, module=deepcopy(exported.module))
        try:
            return precision, _export_as(tried, deployment, reference, precision, version)
        except VerificationError as error:
            print(f"{error} ... ", end="", flush=True)
    return precisions[-1], _export_as(exported, deployment, reference, precisions[-1], version)


def _export_as(
    exported: ExportTarget,
    deployment: Deployment,
    reference: _Reference,
    precision: str,
    version: Path,
) -> dict[Runtime, TrialResult]:
    deployment = replace(deployment, precision=precision)
    # With auto the file is float32: OpenVINO can also run it in bfloat16.
    stored = "fp32" if precision == AUTO else precision
    form = "a PyTorch program" if deployment.runtime == "torch" else "ONNX"
    print(f"{form} in {stored} ... ", end="", flush=True)
    to_precision(exported.module, stored)
    path = export_for(deployment.runtime, exported, version)
    if stored == "fp8" and exported.role not in VAE_ROLES:
        from export.quantize import quantize

        quantize(exported, path)
    print("verify ... ", end="", flush=True)
    figures, other_sizes = reference
    trials = try_runtimes(
        exported,
        path,
        figures,
        candidates(deployment),
        deployment,
        other_sizes=other_sizes,
    )
    print(", ".join(map(_shown, trials, trials.values())), flush=True)
    return trials


def _shown(runtime: Runtime, trial: TrialResult) -> str:
    times = ", ".join(f"{ms:.1f} ms for {rows} rows" for rows, ms in trial.times_ms.items())
    return f"{runtime} ({times})" if times else str(runtime)


def _lacking(pipeline: Pipeline, repository: Path, builder: Builder) -> list[Role]:
    """The models without an engine of this TensorRT for this GPU in `repository`."""
    lacking = []
    for role, record in pipeline.models.items():
        engine = record.engines.get(builder.capability, {})
        fits = (engine.get("tensorrt"), engine.get("gpu")) == (builder.version, builder.gpu)
        if not fits or not install.is_whole(repository / pipeline.model(role), engine):
            lacking.append(role)
    return lacking


def _with_engines(pipeline: Pipeline, staged: Path, builder: Builder, options: Options) -> Pipeline:
    """`pipeline` with the missing engines for this GPU, which are built in `staged`."""
    models = dict(pipeline.models)
    for role in _lacking(pipeline, staged, builder):
        folder = staged / pipeline.model(role)
        shapes = _profiles(pipeline, role, options.deployment)
        built = _build_engine(folder, models[role], builder, options, shapes)
        engines = {**models[role].engines, builder.capability: built}
        models[role] = replace(models[role], engines=engines)
    return replace(pipeline, models=models)


def _profiles(
    pipeline: Pipeline, role: Role, deployment: Deployment
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
    """The profiles of an engine, and the latent's size in each: one per size if there are several.

    A decoder sees tiles of large latents.
    """
    if not pipeline.image_sizes or role is Role.TEXT_ENCODER:
        return deployment.profiles, []
    rows: dict[tuple[int, int], int] = {}
    for size in pipeline.image_sizes:
        shape = pipeline.latent_shape_of(size)
        largest = pipeline.largest_decode if role in VAE_ROLES else 0
        sides = Tiles.of(shape[1], shape[2], largest).size
        if role is Role.ENCODER:
            sides = sides[0] * pipeline.factor, sides[1] * pipeline.factor
        rows[sides] = max(rows.get(sides, 0), pipeline.rows_for(shape))
    return [(1, min(deployment.opt_rows, most), most) for most in rows.values()], list(rows)


def _build_engine(
    folder: Path,
    record: ModelRecord,
    builder: Builder,
    options: Options,
    shapes: tuple[list[tuple[int, int, int]], list[tuple[int, int]]],
) -> dict[str, Any]:
    """Builds an engine from a model's ONNX file, beside engines for other GPUs.

    Returns its record. Raises VerificationError if its outputs differ from PyTorch's.
    """
    replaced = record.engines.get(builder.capability, {})
    name = replaced.get("file") or (builder.file if record.engines else "model.plan")
    cache = options.timing_cache / f"timing-{builder.version}-{builder.capability}.cache"
    plan = folder / "1" / name
    plan.unlink(missing_ok=True)
    profiles, sides = shapes
    built = build_engine(builder, folder / "1" / "model.onnx", plan, profiles, cache, sides)
    print(f"{folder.name}: {name}, {built['bytes'] / 1e6:.1f} MB in {built['seconds']} s")
    if not builder.cross:
        built |= _check_engine(folder, builder.load(plan), record, options.deployment)
    return built


def _check_engine(
    folder: Path, engine: TensorRtModel, record: ModelRecord, deployment: Deployment
) -> dict[str, Any]:
    """Verifies an engine. Returns its errors and fused attentions, for its record.

    Raises VerificationError.
    """
    batches = batches_up_to(deployment.max_rows)
    allowed, figures = TOLERANCES[record.precision], Figures.load(folder)
    parity: dict[str, float] = {}
    for rows in batches:
        try:
            found = figures.check(folder.name, engine, allowed, [rows])
        except VerificationError as error:
            raise VerificationError(
                f"the engine is wrong for {rows} rows and was not installed: {error}. Try another "
                "--precision or another release of TensorRT"
            ) from error
        parity = {name: max(of, parity.get(name, 0.0)) for name, of in found.items()}
    fused = engine.fused_attentions()
    of = count_attentions(folder / "1" / "model.onnx")
    shown = ", ".join(f"{name} off by {error:.1e}" for name, error in parity.items())
    count = "unknown" if fused is None else fused
    print(f"{folder.name}: on the GPU {shown}; fused attentions: {count} of {of}")
    return {"parity": parity, "fused_attentions": fused}


def _config(pipeline: Pipeline, role: Role, deployment: Deployment) -> str:
    record = pipeline.models[role]
    engines = {capability: engine["file"] for capability, engine in record.engines.items()}
    decided = replace(deployment, runtime=record.runtime, precision=record.precision)
    digest = record.files[model_file(record.runtime)]
    sizes: dict[int | str, int] = dict(record.sizes.items())
    config = model_config(
        pipeline.model(role),
        pipeline.tensors(role),
        sizes,
        decided,
        engines,
        digest,
        len(_profiles(pipeline, role, deployment)[0]),
        record.fixed_rows,
    )
    return text_format.MessageToString(config)


def list_pipelines(repository: Path) -> Iterator[str]:
    """Yields the lines of a description of the pipelines in `repository`."""
    names = installed(repository)
    if not names:
        yield f"{repository} has no pipeline"
        return
    default = Settings.load(repository).default_pipeline
    for name in names:
        try:
            pipeline = read_pipeline(repository, name)
        except RepositoryError as error:
            yield f"{name}: {error}"
            continue
        first = pipeline.predictor
        size = pipeline.image_size
        what = f"{size[1]}x{size[0]} images" if size else "latents"
        yield f"{name}{' (default)' if name == default else ''}: {pipeline.condition.kind}, {what}"
        yield f"  models: {', '.join(pipeline.models)}; {first.engine} {first.runtime} " + (
            f"{first.precision}, at most {pipeline.max_rows} rows"
        )
        presets = ", ".join(f"{key} {schedule}" for key, schedule in pipeline.presets.items())
        yield f"  presets: {presets}"
        solvers = ", ".join(f"{key} ({of})" for key, of in pipeline.described_solvers.items())
        yield f"  solvers (guidance): {solvers or 'none'}"
        yield f"  ensembles: {', '.join(pipeline.ensembles) or 'none'}"
        yield f"  made by: {pipeline.command}"
