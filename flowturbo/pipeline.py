"""The pipeline record: one JSON file that describes an installed pipeline.

A pipeline is installed when its record exists: `<repository>/flowturbo/1/pipelines/<name>.json`.
The export writes it last. Only this module reads records. Other modules ask it for a pipeline's
models, sizes, precision and presets.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from flowturbo.conditions import Condition, read_condition, write_condition
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import ORCHESTRATOR, Role, Specs, composed_tensors, model_name
from flowturbo.errors import RepositoryError, RequestError
from flowturbo.presets import Presets, built_in, find_schedule, parsed
from flowturbo.settings import Settings
from flowturbo.solver.schedule import Schedule
from flowturbo.textfile import TextFileError, read_json

VERSION = 1  # of the record format
RECORDS = Path(ORCHESTRATOR, "1", "pipelines")
UNKNOWN = "unknown"  # in metrics: the pipeline of requests that were refused too early to know it
EXPORT_HINT = "python -m export --name NAME --predictor FILE --refiner FILE --vae DIR"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


@dataclass(frozen=True)
class ModelRecord:
    """One composed model as it was exported.

    `engine` is the Triton backend. `runtime` runs the network within the Python backend.
    `precision` is the precision of the network. `max_rows` is the largest batch of one execution.
    `sizes` has the values of the contract's letters.

    The other fields are provenance:

    - `source`: name of the checkpoint; `files`: digest of each file of the model's version
    - `engines`: TensorRT engines by compute capability
    - `parity`: errors against PyTorch by output
    - `times_ms`: milliseconds by runtime and rows
    - `peak`: the largest magnitude found; `kept_in_float32`: whether it kept the network in float32
    """

    engine: str = "python"
    runtime: str = "onnxruntime"
    precision: str = "fp32"
    on_gpu: bool = False
    max_rows: int = 64
    sizes: Mapping[str, int] = field(default_factory=dict)
    source: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    engines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parity: Mapping[str, float] = field(default_factory=dict)
    times_ms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    peak: float | None = None
    kept_in_float32: bool = False


@dataclass(frozen=True)
class Defaults:
    """Defaults of a pipeline for requests; None means the default of the service's settings."""

    schedule: str | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True)
class Pipeline:
    """An installed pipeline.

    `latent_shape` is (C, h, w). `own_presets` are schedules by name, besides the built-in ones.
    `ensembles` maps each schedule with an ensemble to its Triton model, for refiner steps of
    `ensemble_variant`. `parts` are the other models that the ensembles need. `default_shift` is
    the time grid of schedules without @. `history` is the number of earlier velocities that a block
    reads. `command` exports the pipeline again. `fingerprint` has everything that determined the
    result of the export.
    """

    name: str
    condition: Condition
    latent_shape: tuple[int, int, int]
    models: Mapping[Role, ModelRecord]
    own_presets: Mapping[str, str] = field(default_factory=dict)
    ensembles: Mapping[str, str] = field(default_factory=dict)
    ensemble_variant: str = ""
    parts: tuple[str, ...] = ()
    defaults: Defaults = Defaults()
    default_shift: float = 1.0
    history: int = 1
    command: str = ""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    def has(self, role: Role) -> bool:
        """Whether the pipeline has a model with this role."""
        return role in self.models

    def model(self, role: Role) -> str:
        """The Triton model with this role."""
        return model_name(self.name, role)

    @property
    def folders(self) -> list[str]:
        """Every Triton model of this pipeline."""
        return [*map(self.model, self.models), *self.ensembles.values(), *self.parts]

    def tensors(self, role: Role) -> tuple[Specs, Specs]:
        """Inputs and outputs of the model with this role (flowturbo.contract)."""
        return composed_tensors(role, self.condition.block_inputs)

    @property
    def sizes(self) -> dict[int | str, int]:
        """The values of the contract's letters."""
        return {key: size for each in self.models.values() for key, size in each.sizes.items()}

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images in pixels; None if the pipeline makes latents only."""
        sizes = self.sizes
        return (sizes["H"], sizes["W"]) if "H" in sizes else None

    @property
    def predictor(self) -> ModelRecord:
        return self.models[Role.PREDICTOR]

    @property
    def precision(self) -> str:
        """The precision of the predictor."""
        return self.predictor.precision

    @property
    def runtime(self) -> str:
        """The runtime of the predictor within the Python backend."""
        return self.predictor.runtime

    @property
    def max_rows(self) -> int:
        """The largest batch in rows that every model of the pipeline accepts."""
        return min(model.max_rows for model in self.models.values())

    @property
    def on_gpu(self) -> bool:
        """Whether the service runs the models on GPUs."""
        return self.predictor.on_gpu

    @cached_property
    def presets(self) -> Presets:
        """The built-in presets that the pipeline can serve, and its own presets."""
        own = parsed(self.own_presets, self.default_shift)
        return {**built_in(has_refiner=self.has(Role.REFINER)), **own}

    def find_schedule(self, text: str) -> Schedule:
        """The schedule that `text` names or is. Raises RequestError if it cannot be served."""
        schedule = find_schedule(text, self.presets, self.default_shift)
        if schedule.refines and not self.has(Role.REFINER):
            raise RequestError(
                f"schedule {schedule} has refiner steps, and pipeline {self.name} has no refiner: "
                "leave R out"
            )
        return schedule

    def default_schedule(self, settings: Settings) -> Schedule:
        """The pipeline's own default, else the setting's, without R steps if there is no refiner.

        Raises RepositoryError if the default names a preset that the pipeline lacks.
        """
        try:
            if self.defaults.schedule:
                return self.find_schedule(self.defaults.schedule)
            text = settings.default_schedule
            schedule = find_schedule(text, self.presets, self.default_shift)
        except RequestError as error:
            raise RepositoryError(
                f"pipeline {self.name}: the default schedule cannot be used: {error}"
            ) from None
        return schedule if self.has(Role.REFINER) else schedule.without_refiner()

    def default_guidance_scale(self, settings: Settings) -> float:
        """The pipeline's own default, else the setting's; 1 if guidance is impossible."""
        if not self.condition.can_guide:
            return 1.0
        own = self.defaults.guidance_scale
        return settings.default_guidance_scale if own is None else own

    def described(self, settings: Settings) -> dict[str, Any]:
        """The description of the pipeline in the output `pipelines`."""
        return {
            "name": self.name,
            "condition": self.condition.described(),
            "size": self.image_size,
            "latent_shape": self.latent_shape,
            "refiner": self.has(Role.REFINER),
            "presets": {name: str(schedule) for name, schedule in self.presets.items()},
            "default_schedule": str(self.default_schedule(settings)),
            "default_guidance_scale": self.default_guidance_scale(settings),
        }


def class_label(pipeline: Pipeline) -> ClassLabel:
    """The condition of a class-conditional pipeline. Raises RepositoryError for other kinds."""
    if not isinstance(pipeline.condition, ClassLabel):
        kind = pipeline.condition.kind
        raise RepositoryError(f"pipeline {pipeline.name} is of kind {kind}, not class_label")
    return pipeline.condition


def check_name(name: str) -> str:
    """Returns `name` if it is allowed for a pipeline. Raises RequestError."""
    if not re.fullmatch(_NAME, name) or name == UNKNOWN:
        raise RequestError(
            "a pipeline's name has at most 40 small letters, digits, - and _, starts with a letter "
            f"or digit and is not {UNKNOWN!r}, got {name[:60]!r}"
        )
    return name


def record_path(repository: Path, name: str) -> Path:
    """The record file of the pipeline `name`."""
    return repository / RECORDS / f"{name}.json"


def installed(repository: Path) -> list[str]:
    """The names of the pipelines in `repository`."""
    return sorted(path.stem for path in (repository / RECORDS).glob("*.json"))


def read_pipelines(repository: Path) -> dict[str, Pipeline]:
    """All pipelines in `repository` by name. Raises RepositoryError if there are none."""
    found = {name: read_pipeline(repository, name) for name in installed(repository)}
    if not found:
        raise RepositoryError(
            f"{repository} has no pipeline, make one with: {EXPORT_HINT} --repository {repository}"
        )
    return found


def read_pipeline(repository: Path, name: str | None = None) -> Pipeline:
    """The pipeline `name` of `repository`; None means the default. Raises RepositoryError."""
    if name is None:
        pipelines = read_pipelines(repository)
        return pipelines[default_name(pipelines, Settings.load(repository))]
    path = record_path(repository, name)
    if not path.is_file():
        there = ", ".join(installed(repository)) or "none"
        raise RepositoryError(f"{repository} has no pipeline {name!r}; installed: {there}")
    return _read(path)


def default_name(pipelines: Mapping[str, Pipeline], settings: Settings) -> str:
    """The pipeline for requests that name none. Raises RepositoryError."""
    there = ", ".join(pipelines)
    if settings.default_pipeline:
        if settings.default_pipeline not in pipelines:
            raise RepositoryError(
                f"orchestrator config: default_pipeline {settings.default_pipeline!r} is not "
                f"installed; installed: {there}"
            )
        return settings.default_pipeline
    if len(pipelines) > 1:
        raise RepositoryError(
            f"orchestrator config: default_pipeline must name one of {there}: it is not set"
        )
    return next(iter(pipelines))


def _read(path: Path) -> Pipeline:
    """Reads a record. Raises RepositoryError, with the command that exports it again."""
    try:
        stated = read_json(path)
    except TextFileError as error:
        raise RepositoryError(f"{error}: export the pipeline again with: {EXPORT_HINT}") from error
    again = stated.get("command") or EXPORT_HINT
    version = stated.pop("version", None)
    if version != VERSION:
        raise RepositoryError(
            f"{path} is a record of version {version}, this release reads {VERSION}: export the "
            f"pipeline again with: {again}"
        )
    try:
        if stated.keys() != {each.name for each in fields(Pipeline)}:
            odd = stated.keys() ^ {each.name for each in fields(Pipeline)}
            raise KeyError(min(odd))
        channels, height, width = stated["latent_shape"]
        models = {Role(role): ModelRecord(**of) for role, of in stated["models"].items()}
        found = Pipeline(
            **{
                **stated,
                "condition": read_condition(stated["condition"]),
                "latent_shape": (channels, height, width),
                "models": models,
                "defaults": Defaults(**stated["defaults"]),
                "parts": tuple(stated["parts"]),
            }
        )
        if found.name != path.stem or Role.PREDICTOR not in models or found.history != 1:
            raise ValueError(f"name {found.name!r}, models {[*models]}, history {found.history}")
        _ = found.presets
    except (AttributeError, KeyError, TypeError, ValueError, RepositoryError) as error:
        raise RepositoryError(
            f"{path} is no record of a pipeline ({type(error).__name__}: {error}): export it again "
            f"with: {again}"
        ) from error
    return found


def record_text(pipeline: Pipeline) -> str:
    """The text of the record file."""
    stated = {each.name: getattr(pipeline, each.name) for each in fields(Pipeline)}
    stated |= {
        "condition": write_condition(pipeline.condition),
        "models": {role.value: asdict(model) for role, model in pipeline.models.items()},
        "defaults": asdict(pipeline.defaults),
    }
    return json.dumps({"version": VERSION, **stated}, indent=1) + "\n"
