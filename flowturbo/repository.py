"""What a model repository says of itself: the pipeline's shape, presets, the service's settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowturbo import contract
from flowturbo.errors import RepositoryError, RequestError
from flowturbo.presets import DEFAULT, Presets, built_in, load_presets, may_be_preset
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.program import Variant
from flowturbo.solver.schedule import Schedule
from flowturbo.textfile import TextFileError, read_json, read_text

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

BUILD_FILE = "build.json"  # beside each composed model's config, written by export
_BUILD_KEYS = (
    "latent_shape",
    "num_classes",
    "null_class",
    "class_names",
    "max_rows",
    "precision",
    "runtime",
    "on_gpu",
)
ENSEMBLE_SCHEDULE = "ensemble_schedule"  # in the build file of an ensemble
EXPORT_HINT = "python -m export --predictor FILE --refiner FILE --vae DIR --repository {}"


@dataclass(frozen=True)
class Pipeline:
    """What the exported networks take and give.

    `latent_shape` is (C, h, w). `max_rows` is the most rows that one execution of a composed model
    takes. `precision` is what the predictor computes in, `runtime` what runs it within the Python
    backend (runtimes.RUNTIMES). `on_gpu` says whether the service runs them on GPUs. `presets`
    are the schedules that have a name. Without `null_class` the networks were trained with classes
    alone and cannot be guided.
    """

    latent_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    max_rows: int
    has_refiner: bool
    has_decoder: bool
    precision: str = "fp32"
    runtime: str = "onnxruntime"
    on_gpu: bool = False
    presets: Presets = field(default_factory=built_in)
    null_class: bool = True

    @property
    def null_label(self) -> int:
        """The class id of the unconditional rows; only for pipelines with a null class."""
        return self.num_classes

    @classmethod
    def load(cls, repository: Path) -> "Pipeline":
        """Reads the build files of `repository`; raises RepositoryError, saying what is missing."""
        builds = {name: read_build(repository, name) for name in contract.COMPOSED}
        predictor = builds[contract.PREDICTOR]
        if predictor is None:
            path = repository / contract.PREDICTOR / BUILD_FILE
            hint = EXPORT_HINT.format(repository)
            raise RepositoryError(f"{path} is missing, make it with: {hint}")
        for name, build in builds.items():
            _check_fit(name, build or predictor, predictor)
        channels, height, width = predictor["latent_shape"]
        has_refiner = builds[contract.REFINER] is not None
        return cls(
            latent_shape=(channels, height, width),
            num_classes=predictor["num_classes"],
            class_names=tuple(predictor["class_names"]),
            max_rows=min(build["max_rows"] for build in builds.values() if build),
            precision=predictor["precision"],
            runtime=predictor["runtime"],
            on_gpu=predictor["on_gpu"],
            has_refiner=has_refiner,
            has_decoder=builds[contract.DECODER] is not None,
            presets=load_presets(repository, has_refiner=has_refiner),
            null_class=predictor["null_class"],
        )

    def name_of(self, label: int) -> str:
        """The class's name, or its id where the export was given no names."""
        return self.class_names[label] if self.class_names else str(label)


def read_build(repository: Path, name: str) -> dict[str, Any] | None:
    """A composed model's build record, None without one; raises RepositoryError."""
    path = repository / name / BUILD_FILE
    if not path.exists():
        return None
    build = read_record(path)
    if missing := [key for key in _BUILD_KEYS if key not in build]:
        raise RepositoryError(
            f"{path} lacks {missing[0]!r}, it is of another version: export again"
        )
    return build


def read_record(path: Path) -> dict[str, Any]:
    """A build record; raises RepositoryError."""
    try:
        return read_json(path)
    except TextFileError as error:
        raise RepositoryError(f"{error}: export again") from error


def read_config(path: Path) -> "ModelConfig":
    """A model's config.pbtxt; raises RepositoryError."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(read_text(path), model_config_pb2.ModelConfig())
    except (TextFileError, text_format.ParseError) as error:
        raise RepositoryError(f"{path} is no configuration of a model: {error}") from error


def _check_fit(name: str, build: Mapping[str, Any], predictor: Mapping[str, Any]) -> None:
    for key in ("latent_shape", "num_classes", "null_class", "fingerprint"):
        if key in build and build[key] != predictor[key]:
            raise RepositoryError(
                f"{name} and {contract.PREDICTOR} come from different exports (they differ in "
                f"{key}): export them together"
            )


def read_ensembles(repository: Path, variant: str) -> dict[str, str]:
    """The ensembles in `repository` that compute refiner steps as `variant`: schedule to model.

    Raises RepositoryError for a build file that cannot be read.
    """
    found = {}
    for path in repository.glob(f"{contract.ORCHESTRATOR}_*/{BUILD_FILE}"):
        build = read_record(path)
        if build.get("variant") == variant and ENSEMBLE_SCHEDULE in build:
            found[build[ENSEMBLE_SCHEDULE]] = path.parent.name
    return found


@dataclass(frozen=True)
class Settings:
    """The service's settings, each a `parameters` entry of the orchestrator's config.pbtxt.

    `default_schedule` may be a preset's name. `max_inflight` is how many requests are worked on at
    a time: more are refused at once. `max_images` is how many images one request may ask for,
    `default_timeout_s` the deadline of a request that sets none. Raises RepositoryError for a value
    that is not allowed.
    """

    default_schedule: str = DEFAULT
    default_guidance_scale: float = 1.5
    variant: str = Variant.REFERENCE.value
    max_inflight: int = 64
    max_images: int = 64
    default_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        try:
            if not may_be_preset(self.default_schedule):
                Schedule.parse(self.default_schedule)
            Guidance(self.default_guidance_scale)
            Variant(self.variant)
        except (RequestError, ValueError) as error:
            raise RepositoryError(f"orchestrator config: {error}") from error
        for name in ("max_inflight", "max_images", "default_timeout_s"):
            if not getattr(self, name) > 0:
                raise RepositoryError(
                    f"orchestrator config: {name} must be above 0, got {getattr(self, name)}"
                )

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> "Settings":
        """Settings from the config's `parameters`; unknown names are refused.

        Names in capitals are the Python backend's own.
        """
        parameters = {name: text for name, text in parameters.items() if not name.isupper()}
        types: dict[str, Any] = {field.name: type(field.default) for field in fields(cls)}
        unknown = parameters.keys() - types.keys()
        if unknown:
            raise RepositoryError(
                f"orchestrator config: unknown parameter {sorted(unknown)[0]!r}, "
                f"known are {', '.join(types)}"
            )
        values: dict[str, Any] = {}
        for name, text in parameters.items():
            try:
                values[name] = types[name](text)
            except ValueError:
                kind = types[name].__name__
                raise RepositoryError(
                    f"orchestrator config: {name} must be {kind}, got {text!r}"
                ) from None
        return cls(**values)

    @classmethod
    def load(cls, repository: Path) -> "Settings":
        """Settings from `repository`'s orchestrator; the defaults where it has none."""
        path = repository / contract.ORCHESTRATOR / "config.pbtxt"
        if not path.exists():
            return cls()
        parameters = read_config(path).parameters
        return cls.from_parameters({k: v.string_value for k, v in parameters.items()})
