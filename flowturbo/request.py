"""One request, read and checked once at the edge into a frozen value."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowturbo import contract
from flowturbo.errors import RepositoryError, RequestError
from flowturbo.latents import FORMATS, MAX_SEED, draw_seeds, noise
from flowturbo.presets import find_schedule
from flowturbo.repository import Pipeline, Settings
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.schedule import Schedule

_SPECS = {spec.name: spec for spec in contract.REQUEST_INPUTS}
LARGEST_NOISE = 10.0  # of standard normal numbers, none of 10^20 is larger
_TYPE_NAMES = {np.int64: "INT64", np.float32: "FP32", np.object_: "BYTES"}


@dataclass(frozen=True)
class GenerationRequest:
    """What one request asks for: n images that share a schedule and a guidance.

    `labels` and `seeds` are [n] int64; `initial_noise`, [n, C, h, w] float32, stands instead of the
    seeds (then 0) where it is given; `outputs` names the tensors to answer with, in order.
    """

    labels: np.ndarray
    seeds: np.ndarray
    initial_noise: np.ndarray | None
    schedule: Schedule
    guidance: Guidance
    output_format: str
    outputs: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Rows of a network evaluation: two a guided image."""
        return len(self.labels) * self.guidance.rows

    @property
    def needs_decoder(self) -> bool:
        return bool({"image", "encoded_image"} & set(self.outputs))

    def start(self, pipeline: Pipeline) -> np.ndarray:
        """The noise to start from, [n, C, h, w] float32."""
        if self.initial_noise is not None:
            return self.initial_noise
        return noise(self.seeds, pipeline.latent_shape)


def parse_request(
    tensors: Mapping[str, np.ndarray],
    outputs: Iterable[str],
    pipeline: Pipeline,
    settings: Settings,
) -> GenerationRequest:
    """Checks input `tensors` (contract.REQUEST_INPUTS) and the names of the outputs asked for.

    All of the outputs means that the request named none: it gets those that its pipeline and its
    output format have. Raises RequestError with the value and what is allowed.
    """
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, pipeline)
    labels = _labels(tensors, pipeline, settings)
    schedule = _schedule(tensors, pipeline, settings)
    if schedule.refines and not pipeline.has_refiner:
        raise RequestError(
            f"schedule {schedule} has refiner steps, and this server has no {contract.REFINER}: "
            "leave R out"
        )
    _check_start(tensors, len(labels))
    given_noise = tensors.get("initial_noise")
    seeds = draw_seeds(len(labels)) if given_noise is None else np.zeros_like(labels)
    output_format = _text(tensors, "output_format", "raw")
    request = GenerationRequest(
        labels=labels,
        seeds=tensors.get("seed", seeds),
        initial_noise=given_noise,
        schedule=schedule,
        guidance=_guidance(tensors, pipeline, settings),
        output_format=output_format,
        outputs=_wanted(tuple(dict.fromkeys(outputs)), output_format, pipeline),
    )
    _check_outputs(request, pipeline)
    return request


def default_schedule(pipeline: Pipeline, settings: Settings) -> Schedule:
    """The setting's; without its refiner steps where there is no refiner.

    Raises RepositoryError where it is the name of a preset that the repository lacks.
    """
    try:
        schedule = find_schedule(settings.default_schedule, pipeline.presets)
    except RequestError as error:
        raise RepositoryError(f"orchestrator config: default_schedule: {error}") from None
    return schedule if pipeline.has_refiner else schedule.without_refiner()


def _check_tensor(name: str, tensor: np.ndarray, pipeline: Pipeline) -> None:
    if name not in _SPECS:
        raise RequestError(f"unknown input {name!r}, known are {', '.join(_SPECS)}")
    spec = _SPECS[name]
    if tensor.dtype != spec.dtype:
        raise RequestError(f"{name} must be {_TYPE_NAMES[spec.dtype]}, got {tensor.dtype}")
    sizes: dict[int | str, int] = dict(zip("Chw", pipeline.latent_shape, strict=True))
    dims = [sizes.get(dim, dim) for dim in spec.dims]
    fits = len(dims) == tensor.ndim and all(
        want in (-1, got) for want, got in zip(dims, tensor.shape, strict=True)
    )
    if not fits:
        shown = ", ".join("n" if dim == -1 else str(dim) for dim in dims)
        raise RequestError(f"{name} must have shape [{shown}], got {list(tensor.shape)}")


def _labels(
    tensors: Mapping[str, np.ndarray], pipeline: Pipeline, settings: Settings
) -> np.ndarray:
    given = [name for name in ("label", "class_name") if name in tensors]
    if len(given) != 1:
        found = "both" if given else "neither"
        raise RequestError(
            f"give either label (class ids, INT64 [n]) or class_name (BYTES [n]), got {found}"
        )
    wanted = tensors[given[0]]
    if not 1 <= len(wanted) <= settings.max_images:
        raise RequestError(
            f"a request asks for 1 to {settings.max_images} images, got {len(wanted)} in {given[0]}"
        )
    if given == ["class_name"]:
        return np.array([_label_of(name, pipeline) for name in wanted], dtype=np.int64)
    bad = wanted[(wanted < 0) | (wanted >= pipeline.num_classes)]
    if len(bad):
        raise RequestError(f"label must be 0 to {pipeline.num_classes - 1}, got {bad[0]}")
    return wanted


def _schedule(
    tensors: Mapping[str, np.ndarray], pipeline: Pipeline, settings: Settings
) -> Schedule:
    if "schedule" not in tensors:
        return default_schedule(pipeline, settings)
    return find_schedule(_decode("schedule", tensors["schedule"][0]), pipeline.presets)


def _label_of(name: Any, pipeline: Pipeline) -> int:
    text = _decode("class_name", name)
    try:
        return pipeline.class_names.index(text)
    except ValueError:
        known = ", ".join(pipeline.class_names[:40]) or "none (this model's classes have no names)"
        raise RequestError(f"class_name {text[:40]!r} is unknown, known are {known}") from None


def _text(tensors: Mapping[str, np.ndarray], name: str, default: str) -> str:
    return _decode(name, tensors[name][0]) if name in tensors else default


def _decode(name: str, value: Any) -> str:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise RequestError(f"{name} must be UTF-8 text, got {value[:40]!r}") from None


def _guidance(
    tensors: Mapping[str, np.ndarray], pipeline: Pipeline, settings: Settings
) -> Guidance:
    scale = default_guidance_scale(pipeline, settings)
    if "guidance_scale" in tensors:
        scale = float(tensors["guidance_scale"][0])
    interval = Guidance().interval
    if "guidance_interval" in tensors:
        low, high = (float(t) for t in tensors["guidance_interval"])
        interval = low, high
    guidance = Guidance(scale, interval)
    if guidance.enabled and not pipeline.null_class:
        raise RequestError(
            "guidance needs a network that also knows images without a class, this one was trained "
            f"with classes alone: guidance_scale must be 1, got {scale:g}"
        )
    return guidance


def default_guidance_scale(pipeline: Pipeline, settings: Settings) -> float:
    """The scale of a request that names none: the setting's, or 1 where guidance is impossible."""
    return settings.default_guidance_scale if pipeline.null_class else 1.0


def _check_start(tensors: Mapping[str, np.ndarray], count: int) -> None:
    if "seed" in tensors and "initial_noise" in tensors:
        raise RequestError("give either seed or initial_noise, got both")
    for name in ("seed", "initial_noise"):
        if name in tensors and len(tensors[name]) != count:
            raise RequestError(
                f"{name} must have one entry an image, {count} here, got {len(tensors[name])}"
            )
    seeds = tensors.get("seed", np.zeros(1))
    if np.any(seeds < 0):
        raise RequestError(f"seed must be 0 to {MAX_SEED}, got {seeds[seeds < 0][0]}")
    given = tensors.get("initial_noise", np.zeros(1))
    if not np.all(np.isfinite(given)):
        raise RequestError("initial_noise must be finite, got NaN or infinity")
    if (largest := float(np.abs(given).max(initial=0.0))) > LARGEST_NOISE:
        raise RequestError(
            f"initial_noise must be standard normal, within {LARGEST_NOISE:g}, got values up to "
            f"{largest:.3g}"
        )


def _wanted(outputs: tuple[str, ...], output_format: str, pipeline: Pipeline) -> tuple[str, ...]:
    if set(outputs) != {spec.name for spec in contract.REQUEST_OUTPUTS}:
        return outputs
    lacking = {"encoded_image"} if output_format == "raw" else set()
    if not pipeline.has_decoder:
        lacking = {"image", "encoded_image"}
    return tuple(name for name in outputs if name not in lacking)


def _check_outputs(request: GenerationRequest, pipeline: Pipeline) -> None:
    if request.output_format not in FORMATS:
        raise RequestError(
            f"output_format must be one of {', '.join(FORMATS)}, got {request.output_format[:40]!r}"
        )
    if "encoded_image" in request.outputs and request.output_format == "raw":
        raise RequestError(
            f"encoded_image needs output_format {', '.join(FORMATS[1:])}, got raw: ask for image "
            "instead"
        )
    if request.needs_decoder and not pipeline.has_decoder:
        raise RequestError(
            f"this server has no {contract.DECODER} and answers latents only: ask for latent"
        )
