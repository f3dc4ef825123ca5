"""The pipeline record: one JSON file that describes an installed pipeline.

A pipeline is installed when its record exists: `<repository>/flowturbo/1/pipelines/<name>.json`.
The export writes it last. Only this module reads records. Other modules ask it for a pipeline's
models, sizes, precision and presets.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flowturbo.conditions import Condition, read_condition, write_condition
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import ORCHESTRATOR, Role, Specs, composed_tensors, model_name
from flowturbo.errors import RepositoryError, RequestError
from flowturbo.presets import Presets, built_in, find_schedule, parsed, shown
from flowturbo.settings import Settings
from flowturbo.solver.grid import GridRule, time_grid
from flowturbo.solver.program import LARGEST_TRAINED_STEP
from flowturbo.solver.schedule import Schedule
from flowturbo.solver.steps import STEPS
from flowturbo.solver.table import Table
from flowturbo.solvers import Solvers
from flowturbo.textfile import TextFileError, read_json

VERSION = 3  # of the record format
RECORDS = Path(ORCHESTRATOR, "1", "pipelines")
UNKNOWN = "unknown"  # in metrics: the pipeline of requests that were refused too early to know it
EXPORT_HINT = "python -m export --name NAME --predictor FILE --refiner FILE --vae DIR"
_OF_FLOW = (Role.PREDICTOR, Role.TEXT_ENCODER)
# Options of the export that change the velocity.
_READ_AS = (
    *("weights", "num_heads", "num_classes", "reverse_time", "guidance_channels"),
    *("distilled", "rectified_flow", "without_t5", "text_length"),
)
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


@dataclass(frozen=True)
class ModelRecord:
    """One composed model as it was exported.

    `engine` is the Triton backend. `runtime` runs the network within the Python backend.
    `precision` is the precision of the network. `max_rows` is the largest batch of one execution.
    `sizes` has the values of the contract's letters. `block_ms` has milliseconds per call by rows,
    as measured where it was exported; it is empty for engines and GPUs. `fixed_rows` are the
    batches that OpenVINO has programs for; empty for one program for any batch.

    The other fields are provenance:

    - `source`: name of the checkpoint; `files`: digest of each file of the model's version
    - `engines`: TensorRT engines by compute capability
    - `parity`: errors against PyTorch by output
    - `times_ms`: milliseconds by runtime and rows
    - `device_bytes`: an estimate of its memory: weights, and tensors of the largest batch
    - `peak`: the largest magnitude found; `kept_in_float32`: whether it kept the network in float32
    """

    engine: str = "python"
    runtime: str = "onnxruntime"
    precision: str = "fp32"
    on_gpu: bool = False
    max_rows: int = 64
    sizes: Mapping[str, int] = field(default_factory=dict)
    block_ms: Mapping[str, float] = field(default_factory=dict)
    fixed_rows: Sequence[int] = field(default_factory=list)
    source: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    engines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parity: Mapping[str, float] = field(default_factory=dict)
    times_ms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    device_bytes: int = 0
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
    `ensemble_variant`. `parts` are the other models that the ensembles need. `grid` is the time
    grid of schedules without @. `image_sizes` are the sizes (H, W) that a request may ask for,
    first the default; it is empty if there is one size only. A latent has one token per square of
    `patch` x `patch`, and a batch at most `token_budget` tokens (0: any). A latent larger than
    `largest_decode` on a side is decoded in tiles. `solver_steps` are the letters that schedules
    may have; empty means all. `trained_step` is the largest step that the refiner was trained on.
    `family` is the name of the model family, empty for SiT. `command` exports the pipeline again.
    `fingerprint` has everything that determined the result of the export. `solvers` are not part of
    the record: they come from a file beside it, if there is one.
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
    family: str = ""
    grid: GridRule = GridRule()
    image_sizes: tuple[tuple[int, int], ...] = ()
    patch: int = 1
    token_budget: int = 0
    largest_decode: int = 0
    solver_steps: str = ""
    trained_step: float = LARGEST_TRAINED_STEP
    command: str = ""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    solvers: Solvers | None = None

    @property
    def flow(self) -> str:
        """A digest of what determines the velocity (`flow_of`)."""
        return flow_of(self.fingerprint)

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
        condition = self.condition
        return composed_tensors(role, condition.block_inputs, condition.encoder_inputs)

    @property
    def sizes(self) -> dict[int | str, int]:
        """The values of the contract's letters."""
        return {key: size for each in self.models.values() for key, size in each.sizes.items()}

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images in pixels, if the request does not say.

        None if the pipeline makes latents only.
        """
        if self.image_sizes:
            return self.image_sizes[0]
        sizes = self.sizes
        return (sizes["H"], sizes["W"]) if "H" in sizes else None

    @property
    def generating(self) -> list[Role]:
        """The roles of the models that make images: all but the encoder, which only reads them."""
        return [role for role in self.models if role is not Role.ENCODER]

    @property
    def factor(self) -> int:
        """How many pixels a latent pixel is wide; 1 if the pipeline makes latents only."""
        return self.image_size[1] // self.latent_shape[2] if self.image_size else 1

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
    def block_seconds(self) -> dict[str, dict[int, float]]:
        """Seconds per call by Triton model and rows, as far as the export measured them."""
        return {
            self.model(role): {int(rows): ms / 1e3 for rows, ms in record.block_ms.items()}
            for role, record in self.models.items()
        }

    def rows_for(self, latent_shape: tuple[int, int, int]) -> int:
        """The largest batch in rows of this shape: larger latents have smaller batches."""
        if not self.token_budget:
            return self.max_rows
        return min(self.max_rows, max(2, self.token_budget // self.tokens(latent_shape)))

    @property
    def device_bytes(self) -> int:
        """An estimate of the device memory of all models."""
        return sum(model.device_bytes for model in self.models.values())

    @property
    def on_gpu(self) -> bool:
        """Whether the service runs the models on GPUs."""
        return self.predictor.on_gpu

    @cached_property
    def digests(self) -> dict[str, str]:
        """What identifies each model as it was exported, by role."""
        return {
            role.value: short_digest(
                json.dumps(
                    # Programs of fixed rows round differently.
                    [of.runtime, of.precision, *sorted(of.files.items()), *of.fixed_rows]
                ).encode()
            )
            for role, of in self.models.items()
        }

    @cached_property
    def presets(self) -> Presets:
        """The built-in presets that the pipeline can serve, and its own presets."""
        ready_made = {} if self.solver_steps else built_in(has_refiner=self.has(Role.REFINER))
        return {**ready_made, **parsed(self.own_presets)}

    def find_schedule(self, text: str) -> Schedule:
        """The schedule that `text` names or is. Raises RequestError if it cannot be served."""
        schedule = find_schedule(text, self.presets)
        if schedule.refines and not self.has(Role.REFINER):
            raise RequestError(
                f"schedule {schedule} has refiner steps, and pipeline {self.name} has no refiner: "
                "leave R out"
            )
        return self._allowed(schedule)

    def _allowed(self, schedule: Schedule) -> Schedule:
        allowed = self.solver_steps
        if allowed and (other := set(schedule.steps) - set(allowed)):
            raise RequestError(
                f"pipeline {self.name} is step-distilled and takes {' and '.join(allowed)} steps "
                f"only, such as {allowed[0]}4, got {min(other)} in schedule {schedule}"
            )
        if schedule.otherwise:
            schedule = replace(schedule, otherwise=self._allowed(schedule.otherwise))
        if schedule.learned and len(schedule) not in (self.solvers.counts if self.solvers else []):
            if schedule.otherwise:
                return schedule.otherwise
            there = [f"L{count}" for count in self.solvers.counts] if self.solvers else ["none"]
            raise RequestError(
                f"pipeline {self.name} has no fitted solver L{len(schedule)}, fitted: "
                f"{', '.join(there)} (python -m tuning.fit fits others)"
            )
        if schedule.shift == 1 and self.grid == GridRule():  # its own grid by another name
            return replace(schedule, shift=None)
        return schedule

    def on_own_grid(
        self, schedule: Schedule, latent_shape: tuple[int, int, int]
    ) -> tuple[Schedule, tuple[float, ...] | None]:
        """`schedule` on its time grid: with a shift, or as it is with the times of its grid.

        A schedule with a shift keeps it.
        """
        if schedule.own_grid or schedule.shift is not None or self.grid == GridRule():
            return schedule, None
        if self.grid.is_fixed:
            return replace(schedule, shift=self.grid.shift), None
        steps = len(schedule)
        return schedule, time_grid(steps, self.grid.shift_for(self.tokens(latent_shape), steps))

    def fitted(self, schedule: Schedule, scale: float) -> Table | None:
        """The table of a learned schedule at this guidance scale; None for other schedules.

        Raises RequestError for a scale that it was not fitted for.
        """
        return (
            self.solvers.table(len(schedule), scale) if self.solvers and schedule.learned else None
        )

    def learned_at(self, scale: float) -> list[int]:
        """The numbers of evaluations of the solvers that are fitted for this guidance scale."""
        fits = self.solvers.fits if self.solvers else ()
        return sorted({fit.evaluations for fit in fits if fit.covers(scale)})

    def tokens(self, latent_shape: tuple[int, int, int]) -> int:
        """The image tokens of a latent (C, h, w)."""
        _, height, width = latent_shape
        return height * width // self.patch**2

    def latent_shape_of(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The shape (C, h, w) of the latent of an image of `size` (H, W), which must be allowed.

        Raises RequestError.
        """
        allowed = self.image_sizes or tuple([self.image_size] if self.image_size else [])
        if size not in allowed:
            shown = ", ".join(map(shown_size, allowed)) or "none: it answers latents only"
            nearest = min(allowed, key=lambda each: _distance(each, size), default=None)
            hint = f"; the nearest is {shown_size(nearest)}" if nearest and len(allowed) > 1 else ""
            raise RequestError(
                f"size {shown_size(size)} (width x height) is not one of pipeline {self.name}: "
                f"{shown}{hint}"
            )
        channels, height, width = self.latent_shape
        assert self.image_size
        return (
            channels,
            height * size[0] // self.image_size[0],
            width * size[1] // self.image_size[1],
        )

    def default_schedule(self, settings: Settings) -> Schedule:
        """The pipeline's own default, else the setting's, without R steps if there is no refiner.

        Raises RepositoryError if the default names a preset that the pipeline lacks.
        """
        try:
            if self.defaults.schedule:
                return self.find_schedule(self.defaults.schedule)
            text = settings.default_schedule
            schedule = find_schedule(text, self.presets)
            if not self.has(Role.REFINER):
                schedule = schedule.without_refiner()
            return self._allowed(schedule)
        except RequestError as error:
            raise RepositoryError(
                f"pipeline {self.name}: the default schedule cannot be used: {error}"
            ) from None

    def default_guidance_scale(self, settings: Settings) -> float:
        """The pipeline's own default, else the setting's; 1 if guidance is impossible."""
        if not self.condition.can_guide:
            return 1.0
        own = self.defaults.guidance_scale
        return settings.default_guidance_scale if own is None else own

    @property
    def described_solvers(self) -> dict[str, Any]:
        """The fitted solvers and their guidance scales, in the output `pipelines`."""
        if not self.solvers:
            return {}
        return {f"L{n}": self.solvers.ranges(n) for n in self.solvers.counts}

    def described(self, settings: Settings) -> dict[str, Any]:
        """The description of the pipeline in the output `pipelines`."""
        return {
            "name": self.name,
            "condition": self.condition.described(),
            "size": self.image_size,
            "sizes": self.image_sizes or ([self.image_size] if self.image_size else []),
            "family": self.family,
            "latent_shape": self.latent_shape,
            "refiner": self.has(Role.REFINER),
            "edits": self.has(Role.ENCODER),
            "steps": self.solver_steps or "".join(STEPS),
            "grid": asdict(self.grid),
            "solvers": self.described_solvers,
            "presets": {name: shown(schedule) for name, schedule in self.presets.items()},
            "default_schedule": str(self.default_schedule(settings)),
            "default_guidance_scale": self.default_guidance_scale(settings),
        }


_STATED = [each.name for each in fields(Pipeline) if each.name != "solvers"]


def flow_of(fingerprint: Mapping[str, Any]) -> str:
    """A digest of what determines the velocity: weights, and how the export read them.

    Engines and precisions do not count.
    """
    sources, options = fingerprint.get("sha256", {}), fingerprint.get("options", {})
    weights = {role: of for role, of in sources.items() if role in _OF_FLOW}
    unset = (None, False)  # not 0, which equals False
    read = {
        name: options[name]
        for name in _READ_AS
        if not any(options.get(name) is each for each in unset)
    }
    return short_digest(json.dumps([weights, read], sort_keys=True).encode())


def short_digest(data: bytes) -> str:
    """The start of a SHA-256: enough to tell things apart."""
    return hashlib.sha256(data).hexdigest()[:16]


def shown_size(size: tuple[int, int]) -> str:
    """A size (height, width) as people write it: WIDTHxHEIGHT."""
    return f"{size[1]}x{size[0]}"


def _distance(one: tuple[int, int], other: tuple[int, int]) -> float:
    """How far two sizes are apart, in factors of their sides."""
    return sum(abs(math.log(max(a, 1) / max(b, 1))) for a, b in zip(one, other, strict=True))


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


def read_pipelines(repository: Path, *, solvers: bool = True) -> dict[str, Pipeline]:
    """All pipelines in `repository` by name. Raises RepositoryError if there are none."""
    found = {
        name: read_pipeline(repository, name, solvers=solvers) for name in installed(repository)
    }
    if not found:
        raise RepositoryError(
            f"{repository} has no pipeline, make one with: {EXPORT_HINT} --repository {repository}"
        )
    return found


def read_pipeline(repository: Path, name: str | None = None, *, solvers: bool = True) -> Pipeline:
    """The pipeline `name` of `repository`; None means the default. Raises RepositoryError.

    Without `solvers` the file of the fitted ones is not read.
    """
    if name is None:
        pipelines = read_pipelines(repository, solvers=solvers)
        return pipelines[default_name(pipelines, Settings.load(repository))]
    path = record_path(repository, name)
    if not path.is_file():
        there = ", ".join(installed(repository)) or "none"
        raise RepositoryError(f"{repository} has no pipeline {name!r}; installed: {there}")
    found = _read(path)
    return with_solvers(found, solvers_path(repository, name)) if solvers else found


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
        if odd := stated.keys() ^ set(_STATED):
            raise KeyError(min(odd))
        channels, height, width = stated["latent_shape"]
        models = {Role(role): ModelRecord(**of) for role, of in stated["models"].items()}
        encoder = path.parents[3] / model_name(path.stem, Role.TEXT_ENCODER) / "1"
        grid = stated["grid"]
        linear = tuple(grid["linear"]) if grid["linear"] else None
        found = Pipeline(
            **{
                **stated,
                "condition": read_condition(stated["condition"], encoder),
                "latent_shape": (channels, height, width),
                "models": models,
                "defaults": Defaults(**stated["defaults"]),
                "parts": tuple(stated["parts"]),
                "grid": GridRule(**{**grid, "linear": linear}),
                "image_sizes": tuple((high, wide) for high, wide in stated["image_sizes"]),
            }
        )
        if found.name != path.stem or Role.PREDICTOR not in models:
            raise ValueError(f"name {found.name!r}, models {[*models]}")
        _ = found.presets
    except (AttributeError, KeyError, TypeError, ValueError, RepositoryError) as error:
        raise RepositoryError(
            f"{path} is no record of a pipeline ({type(error).__name__}: {error}): export it again "
            f"with: {again}"
        ) from error
    return found


def solvers_path(repository: Path, name: str) -> Path:
    """The file of the fitted solvers of the pipeline `name`."""
    return repository / RECORDS / f"{name}.solvers.npz"


def with_solvers(pipeline: Pipeline, path: Path) -> Pipeline:
    """`pipeline` with the fitted solvers of `path`, if it exists.

    Raises RepositoryError for a file that cannot be read, or that belongs to another model.
    """
    if not path.is_file():
        return pipeline
    solvers = Solvers.read(path)
    check_solvers(pipeline, solvers, path)
    return replace(pipeline, solvers=solvers)


def check_solvers(pipeline: Pipeline, solvers: Solvers, path: Path) -> None:
    """Raises RepositoryError if `solvers`, of the file `path`, are of another model or size."""
    other = "model" if solvers.flow != pipeline.flow else "size of images"
    if (solvers.flow, solvers.latent_shape) != (pipeline.flow, pipeline.latent_shape):
        raise RepositoryError(
            f"{path} was fitted to another {other} than that of pipeline {pipeline.name}: fit it "
            f"again with python -m tuning.fit --pipeline {pipeline.name}, or delete the file"
        )


def record_text(pipeline: Pipeline) -> str:
    """The text of the record file."""
    stated = {name: getattr(pipeline, name) for name in _STATED}
    stated |= {
        "condition": write_condition(pipeline.condition),
        "models": {role.value: asdict(model) for role, model in pipeline.models.items()},
        "defaults": asdict(pipeline.defaults),
        "grid": asdict(pipeline.grid),
    }
    return json.dumps({"version": VERSION, **stated}, indent=1) + "\n"
