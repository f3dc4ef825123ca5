"""The service's settings: `parameters` of the orchestrator's config.pbtxt."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowturbo import contract
from flowturbo.errors import RepositoryError, RequestError
from flowturbo.presets import DEFAULT, may_be_preset
from flowturbo.solver.calls import Variant
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.schedule import Schedule
from flowturbo.textfile import TextFileError, read_text

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig


def read_config(path: Path) -> "ModelConfig":
    """Reads a model's config.pbtxt. Raises RepositoryError."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(read_text(path), model_config_pb2.ModelConfig())
    except (TextFileError, text_format.ParseError) as error:
        raise RepositoryError(f"{path} is no configuration of a model: {error}") from error


def orchestrator_config(repository: Path) -> Path:
    """The file with the settings of a repository."""
    return repository / contract.ORCHESTRATOR / "config.pbtxt"


@dataclass(frozen=True)
class Settings:
    """The service's settings, each a `parameters` entry of the orchestrator's config.pbtxt.

    `default_pipeline` serves the requests that name none. It may be empty if only one pipeline is
    installed. `default_schedule` (or preset) and `default_guidance_scale` are for pipelines without
    their own defaults. `max_inflight` is the largest number of in-flight requests: more are refused
    at once. `max_images` is the largest number of images per request. `text_cache_mb`
    megabytes (2^20 bytes) of encoded texts are kept. `default_timeout_s` is the deadline of a
    request that sets none. Raises RepositoryError for a value that is not allowed.
    """

    default_pipeline: str = ""
    default_schedule: str = DEFAULT
    default_guidance_scale: float = 1.5
    variant: str = Variant.REFERENCE.value
    max_inflight: int = 64
    max_images: int = 64
    text_cache_mb: int = 256
    default_timeout_s: float = 120.0
    caller_weights: str = ""

    @cached_property
    def weights(self) -> dict[str, float]:
        """Callers' shares by name. Raises ValueError."""
        pairs = [part.partition("=") for part in self.caller_weights.split(",") if part.strip()]
        found = {name.strip(): float(share) for name, _, share in pairs}
        if wrong := [name for name, share in found.items() if not (name and 0 < share < math.inf)]:
            raise ValueError(f"the share of {wrong[0]!r} must be above 0, got {found[wrong[0]]:g}")
        return found

    def __post_init__(self) -> None:
        try:
            if not may_be_preset(self.default_schedule):
                Schedule.parse(self.default_schedule)
            Guidance(self.default_guidance_scale)
            Variant(self.variant)
        except (RequestError, ValueError) as error:
            raise RepositoryError(f"orchestrator config: {error}") from error
        try:
            _ = self.weights
        except ValueError as error:
            raise RepositoryError(
                "orchestrator config: caller_weights must be like 'alice=3,bob=0.5', got "
                f"{self.caller_weights!r}: {error}"
            ) from error
        for name in ("max_inflight", "max_images", "text_cache_mb", "default_timeout_s"):
            if not getattr(self, name) > 0:
                raise RepositoryError(
                    f"orchestrator config: {name} must be above 0, got {getattr(self, name)}"
                )

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> "Settings":
        """Settings from the config's `parameters`. Unknown names are refused.

        Names in capitals belong to the Python backend and are ignored.
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
        """Settings of `repository`'s orchestrator; the defaults if it has no orchestrator."""
        path = orchestrator_config(repository)
        if not path.exists():
            return cls()
        parameters = read_config(path).parameters
        return cls.from_parameters({k: v.string_value for k, v in parameters.items()})
