"""One pipeline's checkpoints to verified models, installed in a repository together."""

import unicodedata
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from export import install
from export.deployment import AUTO, Deployment, model_config
from export.engine import Builder, build_engine, find_builder
from export.ensemble import (
    ensemble_models,
    ensembles_are_installed,
    installed_ensembles,
    write_ensembles,
)
from export.onnx_graph import Exported, export_onnx, to_precision
from export.parity import block_outputs, torch_evaluation
from export.peaks import HALVES, LARGEST, watched_outputs
from export.quantize import quantize
from export.runtime import Execution, Trial, attempt, candidates, choose
from export.source import Source, modules, source_digests
from flowturbo import contract
from flowturbo.nets.sit import SiTConfig
from flowturbo.nets.weights import CheckpointError
from flowturbo.presets import Presets, find_schedule, load_presets, parse_presets
from flowturbo.repository import Settings
from flowturbo.schedule import Schedule
from flowturbo.textfile import read_lines, read_text

# Characters of these kinds are not seen: control, format, unassigned, lone surrogates.
_HIDDEN = ("Cc", "Cf", "Cn", "Cs")


@dataclass(frozen=True)
class Options:
    """What to export, and to where; `command` is what makes it again."""

    source: Source
    deployment: Deployment
    repository: Path
    class_names: Path | None
    compute_capability: str | None
    timing_cache: Path
    force: bool
    ensemble: tuple[str, ...] | None
    presets: Path | None
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
    the models cannot serve, and then leaves the repository as it was.
    """
    presets = _presets(options)  # found wanting before minutes of export
    if install.mend_orchestrator(options.repository):
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
    repository, builder = options.repository, None
    if options.deployment.engine == "tensorrt":  # found missing before minutes of export
        builder = find_builder(options.compute_capability)
    settings, schedules = _settings(repository), _ensembles(options, presets)
    fingerprint = _fingerprint(options)
    installed = not options.force and _is_installed(repository, fingerprint)
    lacking = installed and builder and _lacking(repository, builder)
    current = installed and not lacking and _configs_are_installed(options)
    if current and ensembles_are_installed(repository, settings, schedules):
        print(f"export: {repository} is up to date")
        return
    with install.staging(repository) as staged:
        if installed:
            install.link_installed(repository, staged)
        else:
            _write_models(options, fingerprint, staged)
        if builder:
            for model in _lacking(staged, builder):
                _add_engine(staged / model, builder, options)
        for folder in staged.iterdir():
            _write_config(folder, options.deployment)
        write_ensembles(staged, settings, schedules)
        install.install(staged, repository, [*contract.COMPOSED, *ensemble_models(repository)])
    print(
        f"export: installed in {repository}, ensembles: {', '.join(map(str, schedules)) or 'none'}"
    )


def _settings(repository: Path) -> Settings:
    """Those of the repository's orchestrator, or of the one that it is about to get."""
    has_one = (repository / contract.ORCHESTRATOR).exists()
    return Settings.load(repository if has_one else install.COMMITTED.parent)


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
        hint = f"; --num-classes {len(names)} says that its label table has no null class"
        hint = hint if len(names) == config.label_rows else ""
        raise CheckpointError(
            f"{options.class_names} has {len(names)} names, "
            f"the predictor {config.num_classes} classes{hint}"
        )
    for line, name in enumerate(names, 1):
        if not name.strip():
            raise CheckpointError(f"{options.class_names}: line {line} must be a name, it is empty")
        if hidden := next((c for c in name if unicodedata.category(c) in _HIDDEN), None):
            raise CheckpointError(
                f"{options.class_names}: line {line} must be a name that one can read and type, it "
                f"has U+{ord(hidden):04X}"
            )
        if (first := names.index(name) + 1) < line:
            raise CheckpointError(
                f"{options.class_names}: names must be unique, {name!r} is in lines {first} and "
                f"{line}"
            )


def _write_models(options: Options, fingerprint: dict[str, Any], staged: Path) -> None:
    """Exports every model, verified, and records what they are to run in."""
    builds: dict[str, dict[str, Any]] = {}
    trials: dict[str, dict[Execution, Trial]] = {}
    for exported in modules(options.source):
        _check_names(options, exported.config)
        builds[exported.model], trials[exported.model] = _write(
            exported, options, fingerprint, staged / exported.model
        )
    chosen: dict[str, Execution] = {}
    for kept in (False, True):  # those that were asked for in float16 and stay in float32
        group = {m: of for m, of in trials.items() if builds[m]["kept_in_float32"] == kept}
        if group:
            execution = choose(group)
            chosen |= dict.fromkeys(group, execution)
            if len(candidates(options.deployment)) > 1:
                print(f"fastest here: {execution}")
    for model, build in builds.items():
        parity = trials[model][chosen[model]].parity
        print(f"{model}: {', '.join(f'{name} off by {e:.1e}' for name, e in parity.items())}")
        times = {str(execution): trial.times_ms for execution, trial in trials[model].items()}
        install.write_build(
            staged / model, build | asdict(chosen[model]) | {"parity": parity, "times_ms": times}
        )


def _write(
    exported: Exported, options: Options, fingerprint: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], dict[Execution, Trial]]:
    """Exports one model into `folder`: its build record, without what it is to run in, and trials.

    Its configuration comes later.
    """
    (folder / "1").mkdir(parents=True)
    deployment = options.deployment
    source = options.source.files()[exported.model]
    print(f"{exported.model}: PyTorch in float32 ... ", end="", flush=True)
    peak = None
    if deployment.precision in HALVES:
        expected, peak = watched_outputs(exported)
    else:
        expected = block_outputs(exported, torch_evaluation(exported))
    too_large = peak is not None and not peak.fits_half
    if too_large:
        print(
            f"{peak}, float16 ends at {LARGEST:.0f}: stays in float32 "
            "(bf16 has float32's range) ... ",
            end="",
            flush=True,
        )
        deployment = replace(deployment, precision="fp32")
    # A float32 file is run in bfloat16 too.
    precision = "fp32" if deployment.precision == AUTO else deployment.precision
    to_precision(exported.module, precision)
    print(f"{source} to ONNX in {precision} ... ", end="", flush=True)
    path = folder / "1" / "model.onnx"
    export_onnx(exported, path)
    if precision == "fp8" and exported.model != contract.DECODER:
        quantize(exported, path)
    print("verify ... ", end="", flush=True)
    open_to, (_, opt_rows, _) = candidates(deployment), deployment.profile
    trials = attempt(exported, path, expected, open_to, opt_rows)
    print(", ".join(map(_shown, trials, trials.values())), flush=True)
    if options.deployment.engine == "python":
        (folder / "1" / "model.py").write_text(install.MODEL_PY)
    build = {
        "source": source.name,
        "engine": options.deployment.engine,
        "on_gpu": options.deployment.on_gpu,
        "latent_shape": exported.latent_shape,
        "sizes": exported.sizes(expected),
        "num_classes": exported.config.num_classes,
        "null_class": exported.config.null_class,
        "class_names": options.names,
        "max_rows": options.deployment.max_rows,
        "kept_in_float32": too_large,
        "peak": peak.magnitude if peak else None,
        "command": options.command,
        "files": install.file_digests(folder),
        "engines": {},
        "fingerprint": fingerprint,
    }
    return build, trials


def _shown(execution: Execution, trial: Trial) -> str:
    times = ", ".join(f"{ms:.1f} ms for {rows} rows" for rows, ms in trial.times_ms.items())
    return f"{execution} ({times})" if times else str(execution)


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
    """Builds an engine from a model's ONNX file and records it beside those for other GPUs."""
    build = install.read_build(folder)
    replaced = build["engines"].get(builder.capability, {})
    name = replaced.get("file") or (builder.file if build["engines"] else "model.plan")
    cache = options.timing_cache / f"timing-{builder.version}-{builder.capability}.cache"
    plan = folder / "1" / name
    plan.unlink(missing_ok=True)
    record = build_engine(
        builder, folder / "1" / "model.onnx", plan, options.deployment.profile, cache
    )
    print(f"{folder.name}: {name}, {record['bytes'] / 1e6:.1f} MB in {record['seconds']} s")
    build["engines"][builder.capability] = record
    install.write_build(folder, build)


def _write_config(folder: Path, deployment: Deployment) -> None:
    install.replace_text(folder / "config.pbtxt", _config(folder, deployment))


def _config(folder: Path, deployment: Deployment) -> str:
    build = install.read_build(folder)
    engines = {capability: engine["file"] for capability, engine in build["engines"].items()}
    decided = replace(deployment, runtime=build["runtime"], precision=build["precision"])
    digest = build["files"]["model.onnx"]
    config = model_config(folder.name, build["sizes"], decided, engines, digest)
    return text_format.MessageToString(config)
