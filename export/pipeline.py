"""One pipeline's checkpoints to verified models, installed in a repository together."""

import unicodedata
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from export import install
from export.deployment import AUTO, Deployment, model_config
from export.engine import Builder, TensorRtModel, build_engine, find_builders
from export.ensemble import (
    ensemble_models,
    ensembles_are_installed,
    installed_ensembles,
    write_ensembles,
)
from export.onnx_graph import ExportTarget, count_attentions, to_precision
from export.parity import torch_figures
from export.peaks import HALVES, LARGEST, watched_figures
from export.runtime import Runtime, TrialResult, candidates, choose, export_for, try_runtimes
from export.source import Checkpoints, modules, source_digests
from flowturbo import contract
from flowturbo.nets.sit import SiTConfig
from flowturbo.nets.weights import CheckpointError
from flowturbo.parity import TOLERANCES, Figures, VerificationError, batches_up_to
from flowturbo.presets import Presets, find_schedule, load_presets, parse_presets
from flowturbo.repository import Settings
from flowturbo.runtimes import model_file
from flowturbo.solver.schedule import Schedule
from flowturbo.textfile import read_lines, read_text

# Characters of these kinds are not seen: control, format, lone surrogates.
_HIDDEN = ("Cc", "Cf", "Cs")
_JOINERS = "\u200c\u200d"  # which spelling needs in some languages, between other characters


@dataclass(frozen=True)
class Options:
    """What to export, and to where; `command` is what makes it again."""

    source: Checkpoints
    deployment: Deployment
    repository: Path
    class_names: Path | None
    compute_capability: str | None
    timing_cache: Path
    force: bool
    ensemble: tuple[str, ...] | None
    presets: Path | None
    guidance_scale: float | None
    command: str

    # Read once: what was checked is what is installed, though it came through a pipe.
    @cached_property
    def names(self) -> list[str]:
        """The classes' names, none if none were given; raises TextFileError."""
        return read_lines(self.class_names) if self.class_names else []

    @cached_property
    def presets_text(self) -> str:
        """The content of the file of presets, which was given; raises TextFileError."""
        assert self.presets
        return read_text(self.presets)


def export_pipeline(options: Options) -> None:
    """Exports, verifies and installs; does nothing if this very pipeline is installed.

    Raises CheckpointError, VerificationError or EngineError, or RepositoryError for presets that
    the models cannot serve, and then leaves networks, ensembles and presets as they were.
    """
    presets = _presets(options)  # refused before minutes of export
    # Before all else: the ensembles get its settings.
    if install.mend_orchestrator(options.repository, options.guidance_scale):
        print(f"export: {contract.ORCHESTRATOR} is of this version now, its settings as before")
    _export_models(options, presets)
    if options.presets:
        install.install_presets(options.presets_text, options.repository)
        shown = ", ".join(f"{name} {schedule}" for name, schedule in presets.items())
        print(f"export: presets in {options.repository}: {shown or 'none'}")


def _presets(options: Options) -> Presets:
    """Those given, or those that the repository has or gets."""
    has_refiner = options.source.refiner is not None
    if options.presets:
        return parse_presets(options.presets_text, options.presets, has_refiner=has_refiner)
    return load_presets(options.repository, has_refiner=has_refiner)


def _export_models(options: Options, presets: Presets) -> None:
    repository = options.repository
    builders: list[Builder] = []
    if options.deployment.engine == "tensorrt":  # found missing before minutes of export
        builders = find_builders(options.compute_capability)
    settings, schedules = _settings(options), _ensembles(options, presets)
    fingerprint = _fingerprint(options)
    installed = not options.force and _is_installed(repository, fingerprint)
    lacking = installed and any(_lacking(repository, builder) for builder in builders)
    current = installed and not lacking and _configs_are_installed(options)
    if current and ensembles_are_installed(repository, settings, schedules):
        print(f"export: {repository} is up to date")
        return
    with install.staging(repository) as staged:
        if installed:
            install.link_installed(repository, staged)
        else:
            _write_models(options, fingerprint, staged)
        for builder in builders:
            for model in _lacking(staged, builder):
                _add_engine(staged / model, builder, options)
        for folder in staged.iterdir():
            _write_config(folder, options.deployment)
        write_ensembles(staged, settings, schedules)
        install.add_orchestrator(staged, settings, repository)
        install.install(staged, repository, [*contract.COMPOSED, *ensemble_models(repository)])
    print(
        f"export: installed in {repository}, ensembles: {', '.join(map(str, schedules)) or 'none'}"
    )


def _settings(options: Options) -> Settings:
    """Those of the repository's orchestrator, or of the one that it is about to get."""
    if (options.repository / contract.ORCHESTRATOR).exists():
        return Settings.load(options.repository)
    # The committed one has the guidance that glyphs were tuned at.
    scale, committed = options.guidance_scale, Settings.load(install.COMMITTED.parent)
    usual = Settings.default_guidance_scale
    return replace(committed, default_guidance_scale=usual if scale is None else scale)


def _ensembles(options: Options, presets: Presets) -> tuple[Schedule, ...]:
    """The schedules asked for, or those that the repository has and the new models can serve."""
    if options.ensemble is None:
        found = installed_ensembles(options.repository)
        return tuple(s for s in found if options.source.refiner or not s.refines)
    schedules = tuple(dict.fromkeys(find_schedule(text, presets) for text in options.ensemble))
    for schedule in schedules:
        if schedule.refines and not options.source.refiner:
            raise CheckpointError(f"--ensemble {schedule} has refiner steps: it needs --refiner")
    return schedules


def _fingerprint(options: Options) -> dict[str, Any]:
    """All that decides the result: sources, options, tools and code."""
    return {
        "sha256": source_digests(options.source),
        "options": options.source.reading() | asdict(options.deployment),
        "class_names": options.names,
        "versions": install.versions(),
        # What runs fastest on one processor need not on another.
        "processor": install.processor_digest() if options.deployment.engine == "python" else None,
        "code": install.source_digest(),
    }


def _is_installed(repository: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether `repository` has the models of this fingerprint and no others."""
    present = [model for model in contract.COMPOSED if (repository / model).exists()]
    found = {model: install.installed_fingerprint(repository, model) for model in present}
    return found == dict.fromkeys(fingerprint["sha256"], fingerprint)


def _configs_are_installed(options: Options) -> bool:
    folders = [options.repository / model for model in options.source.files()]
    texts = [folder / "config.pbtxt" for folder in folders]
    return all(
        text.is_file() and text.read_text() == _config(folder, options.deployment)
        for folder, text in zip(folders, texts, strict=True)
    )


def _check_names(options: Options, config: SiTConfig) -> None:
    names = options.names
    if options.class_names and not names:
        raise CheckpointError(f"{options.class_names} has no names, a line each is needed")
    if names and len(names) != config.num_classes:
        hint = (
            f". If the last name is that of a class which was trained, --num-classes {len(names)} "
            "says so: there is then no null class, and no guidance. A line that is no name, such "
            "as a heading, would shift all others"
        )
        hint = hint if len(names) == config.label_rows else ""
        raise CheckpointError(
            f"{options.class_names} has {len(names)} names, "
            f"the predictor {config.num_classes} classes{hint}"
        )
    for line, name in enumerate(names, 1):
        if name != name.strip():
            raise CheckpointError(
                f"{options.class_names}: line {line} must be a name without blanks in front"
            )
        if not name:
            raise CheckpointError(f"{options.class_names}: line {line} must be a name, it is empty")
        if hidden := next(_hidden(name), None):
            raise CheckpointError(
                f"{options.class_names}: line {line} must be a name that one can read and type, it "
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


def _write_models(options: Options, fingerprint: dict[str, Any], staged: Path) -> None:
    """Exports every model, verified, and records what they are to run in."""
    written: dict[str, _Written] = {}
    for exported in modules(options.source):
        _check_names(options, exported.config)
        written[exported.model] = _write(exported, options, staged / exported.model)
    chosen: dict[str, Runtime] = {}
    for precision in dict.fromkeys(model.precision for model in written.values()):
        group = {name: m.trials for name, m in written.items() if m.precision == precision}
        runtime = choose(group)
        chosen |= dict.fromkeys(group, runtime)
        if len(candidates(replace(options.deployment, precision=precision))) > 1:
            print(f"fastest here: {runtime}")
    for name, model in written.items():
        parity = model.trials[chosen[name]].parity
        print(f"{name}: {', '.join(f'{output} off by {e:.1e}' for output, e in parity.items())}")
        times = {str(runtime): trial.times_ms for runtime, trial in model.trials.items()}
        found = asdict(chosen[name]) | {"parity": parity, "times_ms": times}
        install.write_build(staged / name, model.build | found | {"fingerprint": fingerprint})


@dataclass(frozen=True)
class _Written:
    """A model's export in one precision: its build record, without what it is to run in."""

    build: dict[str, Any]
    precision: str
    trials: dict[Runtime, TrialResult]


def _write(exported: ExportTarget, options: Options, folder: Path) -> _Written:
    """Exports one model into `folder`; its configuration comes later."""
    (folder / "1").mkdir(parents=True)
    deployment, source = options.deployment, options.source.files()[exported.model]
    wanted = _precisions(exported.model, deployment)
    print(f"{exported.model}: PyTorch in float32 ... ", end="", flush=True)
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
    print(f"{source} to ", end="", flush=True)
    precision, trials = _export(exported, deployment, figures, wanted, folder / "1")
    if deployment.engine == "python":
        (folder / "1" / "model.py").write_text(install.MODEL_PY)
    build = {
        "source": source.name,
        "engine": deployment.engine,
        "on_gpu": deployment.on_gpu,
        "latent_shape": exported.latent_shape,
        "sizes": exported.sizes(figures.outputs),
        "num_classes": exported.config.num_classes,
        "null_class": exported.config.null_class,
        "class_names": options.names,
        "max_rows": deployment.max_rows,
        "kept_in_float32": too_large and wanted == ["fp32"],
        "peak": peak.magnitude if peak else None,
        "command": options.command,
        "files": install.file_digests(folder),
        "engines": {},
    }
    return _Written(build, precision, trials)


def _precisions(model: str, deployment: Deployment) -> list[str]:
    """What a model may compute in: the first of these that verifies is taken."""
    if (model, deployment.engine, deployment.precision) == (contract.DECODER, "tensorrt", "bf16"):
        return ["fp16", "bf16"]  # three bits more, and convolutions at least as fast
    return [deployment.precision]


def _export(
    exported: ExportTarget,
    deployment: Deployment,
    figures: Figures,
    precisions: list[str],
    version: Path,
) -> tuple[str, dict[Runtime, TrialResult]]:
    """Writes the file that is to be run; which of `precisions` it was, and its trials."""
    for precision in precisions[:-1]:
        tried = replace(exported, module=deepcopy(exported.module))
        try:
            return precision, _export_as(tried, deployment, figures, precision, version)
        except VerificationError as error:
            print(f"{error} ... ", end="", flush=True)
    return precisions[-1], _export_as(exported, deployment, figures, precisions[-1], version)


def _export_as(
    exported: ExportTarget, deployment: Deployment, figures: Figures, precision: str, version: Path
) -> dict[Runtime, TrialResult]:
    deployment = replace(deployment, precision=precision)
    # A float32 file is run in bfloat16 too.
    stored = "fp32" if precision == AUTO else precision
    form = "a PyTorch program" if deployment.runtime == "torch" else "ONNX"
    print(f"{form} in {stored} ... ", end="", flush=True)
    to_precision(exported.module, stored)
    path = export_for(deployment.runtime, exported, version)
    if stored == "fp8" and exported.model != contract.DECODER:
        from export.quantize import quantize

        quantize(exported, path)
    print("verify ... ", end="", flush=True)
    _, opt_rows, _ = deployment.profile
    trials = try_runtimes(
        exported, path, figures, candidates(deployment), opt_rows, on_gpu=deployment.on_gpu
    )
    print(", ".join(map(_shown, trials, trials.values())), flush=True)
    return trials


def _shown(runtime: Runtime, trial: TrialResult) -> str:
    times = ", ".join(f"{ms:.1f} ms for {rows} rows" for rows, ms in trial.times_ms.items())
    return f"{runtime} ({times})" if times else str(runtime)


def _lacking(repository: Path, builder: Builder) -> list[str]:
    """The models in `repository` that have no engine of this TensorRT for this GPU."""
    lacking = []
    for model in contract.COMPOSED:
        folder = repository / model
        if not folder.is_dir():
            continue
        engine = install.read_build(folder)["engines"].get(builder.capability, {})
        fits = (engine.get("tensorrt"), engine.get("gpu")) == (builder.version, builder.gpu)
        if not fits or not install.is_whole(folder, engine):
            lacking.append(model)
    return lacking


def _add_engine(folder: Path, builder: Builder, options: Options) -> None:
    """Builds an engine from a model's ONNX file and records it beside those for other GPUs.

    Raises VerificationError for one that answers something else than PyTorch did.
    """
    build = install.read_build(folder)
    replaced = build["engines"].get(builder.capability, {})
    name = replaced.get("file") or (builder.file if build["engines"] else "model.plan")
    cache = options.timing_cache / f"timing-{builder.version}-{builder.capability}.cache"
    plan = folder / "1" / name
    plan.unlink(missing_ok=True)
    record = build_engine(
        builder, folder / "1" / "model.onnx", plan, options.deployment.profiles, cache
    )
    print(f"{folder.name}: {name}, {record['bytes'] / 1e6:.1f} MB in {record['seconds']} s")
    if not builder.cross:
        record |= _check_engine(folder, builder.load(plan), build, options.deployment)
    build["engines"][builder.capability] = record
    install.write_build(folder, build)


def _check_engine(
    folder: Path, engine: TensorRtModel, build: dict[str, Any], deployment: Deployment
) -> dict[str, Any]:
    """An engine's errors and fused attentions, for its record; raises VerificationError."""
    batches = batches_up_to(deployment.max_rows)
    allowed, figures = TOLERANCES[build["precision"]], Figures.load(folder)
    parity: dict[str, float] = {}
    for rows in batches:
        try:
            found = figures.check(folder.name, engine, allowed, [rows])
        except VerificationError as error:
            raise VerificationError(
                f"the engine is wrong for {rows} rows and was not installed: {error}. Another "
                "--precision, or another release of TensorRT, may compute it right"
            ) from error
        parity = {name: max(of, parity.get(name, 0.0)) for name, of in found.items()}
    fused = engine.fused_attentions()
    of = count_attentions(folder / "1" / "model.onnx")
    shown = ", ".join(f"{name} off by {error:.1e}" for name, error in parity.items())
    count = "unknown" if fused is None else fused
    print(f"{folder.name}: on the GPU {shown}; attentions fused: {count} of {of}")
    return {"parity": parity, "fused_attentions": fused}


def _write_config(folder: Path, deployment: Deployment) -> None:
    install.replace_text(folder / "config.pbtxt", _config(folder, deployment))


def _config(folder: Path, deployment: Deployment) -> str:
    build = install.read_build(folder)
    engines = {capability: engine["file"] for capability, engine in build["engines"].items()}
    decided = replace(deployment, runtime=build["runtime"], precision=build["precision"])
    digest = build["files"][model_file(build["runtime"])]
    config = model_config(folder.name, build["sizes"], decided, engines, digest)
    return text_format.MessageToString(config)
