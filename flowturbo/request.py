"""One request, read and checked once at the edge into a frozen value."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowturbo.conditions import REQUEST_INPUTS, REQUEST_OUTPUTS, Condition, refuse_others
from flowturbo.contract import (
    COMMON_OUTPUTS,
    EDIT_INPUTS,
    ENCODED_IMAGE,
    FEATHER,
    GUIDANCE_INTERVAL,
    GUIDANCE_SCALE,
    IMAGE,
    INITIAL_NOISE,
    INVERT,
    LATENT,
    MASK,
    MASK_FILE,
    OUTPUT_FORMAT,
    OUTPUT_QUALITY,
    PIPELINE,
    PREVIEW_EVERY,
    SCHEDULE,
    SEED,
    SETTINGS,
    SIZE,
    START_TIME,
    STRENGTH,
    STRIP_METADATA,
    TIMES,
    Role,
    latent_sizes,
    shown_dims,
    text_of,
)
from flowturbo.editing import FILL_NOISE, Edit, inverts, parse_edit
from flowturbo.errors import RequestError
from flowturbo.latents import FORMATS, MAX_SEED, QUALITY, draw_seeds, noise
from flowturbo.pipeline import Pipeline
from flowturbo.settings import Settings
from flowturbo.solver.grid import checked_grid, time_grid, unshifted
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.schedule import Schedule

_SPECS = {spec.name: spec for spec in REQUEST_INPUTS}
LARGEST_NOISE = 10.0  # 10^20 standard normal numbers have none larger than this
_TYPE_NAMES = {
    np.int64: "INT64",
    np.float32: "FP32",
    np.uint8: "UINT8",
    np.bool_: "BOOL",
    np.object_: "BYTES",
}
_IMAGES = {IMAGE, ENCODED_IMAGE}


@dataclass(frozen=True)
class GenerationRequest:
    """What one request asks for: n images that share a schedule and a guidance.

    `condition` has n entries; the pipeline's condition parsed it. `seeds` is [n] int64. If
    `initial_noise` [n, C, h, w] float32 is given, it replaces the seeds, which are then 0.
    `latent_shape` is (C, h, w), and `size` is (H, W) of the image, None if there is none. `times`
    is a time grid in place of the schedule's, or None. `outputs`
    names the output tensors, in order. `edit` is the image to start from, or None. Files have
    `quality` if they are JPEG or WebP, and without `strip_metadata` the metadata of their making.
    """

    condition: Any
    seeds: np.ndarray
    initial_noise: np.ndarray | None
    latent_shape: tuple[int, int, int]
    size: tuple[int, int] | None
    schedule: Schedule
    times: tuple[float, ...] | None
    guidance: Guidance
    output_format: str
    outputs: tuple[str, ...]
    edit: Edit | None = None
    quality: int = QUALITY
    strip_metadata: bool = False

    @property
    def images(self) -> int:
        """The number of images."""
        return len(self.seeds)

    @property
    def rows(self) -> int:
        """Rows per network evaluation: two per guided image."""
        return self.images * self.guidance.rows

    @property
    def needs_decoder(self) -> bool:
        return bool(_IMAGES & set(self.outputs))

    @property
    def start_time(self) -> float:
        """Where the time grid starts: 0 is noise, 1 is an image."""
        return self.times[0] if self.times else 0.0

    def noise(self) -> np.ndarray:
        """The noise of each image, [n, C, h, w] float32."""
        if self.initial_noise is not None:
            return self.initial_noise
        return noise(self.seeds, self.latent_shape)

    def settings(self, pipeline: Pipeline, settings: Settings) -> dict[str, Any]:
        """The output `settings`: the settings that are used, with defaults resolved."""
        return {
            "pipeline": pipeline.name,
            "schedule": str(self.schedule),
            "times": self.times,
            "guidance_scale": self.guidance.scale,
            "guidance_interval": self.guidance.interval,
            "size": self.size,
            "variant": settings.variant,
            "output_format": self.output_format,
            **({"edit": self._edit_settings(self.edit)} if self.edit else {}),
        }

    def _edit_settings(self, edit: Edit) -> dict[str, Any]:
        if edit.invert:
            return {INVERT: True}
        found: dict[str, Any] = {START_TIME: self.start_time}
        if edit.fill:
            found["fill"] = True
        elif edit.strength is not None:
            found[STRENGTH] = edit.strength
        return found | ({FEATHER: edit.feather} if edit.masks and edit.feather is not None else {})


def named_pipeline(tensors: Mapping[str, np.ndarray], names: Iterable[str], default: str) -> str:
    """The pipeline that a request names, else `default`. Raises RequestError."""
    if PIPELINE not in tensors:
        return default
    _check_type(PIPELINE, tensors[PIPELINE])
    _check_shape(PIPELINE, tensors[PIPELINE], {})
    name, known = text_of(PIPELINE, tensors[PIPELINE][0]), list(names)
    if name not in known:
        raise RequestError(f"pipeline {name[:40]!r} is unknown, known are {', '.join(known)}")
    return name


def read_preview_every(tensors: Mapping[str, np.ndarray]) -> int:
    """After how many steps a stream shows a preview; 1 if the request does not say.

    Raises RequestError.
    """
    if PREVIEW_EVERY not in tensors:
        return 1
    value = tensors[PREVIEW_EVERY]
    if value.dtype != np.int64 or value.shape != (1,) or value[0] < 1:
        raise RequestError(
            f"{PREVIEW_EVERY} must be a number of steps, INT64 [1], from 1 on, got "
            f"{value.dtype} {value.tolist()}"
        )
    return int(value[0])


def parse_request(
    tensors: Mapping[str, np.ndarray],
    outputs: Iterable[str],
    pipeline: Pipeline,
    settings: Settings,
    conditions: Mapping[str, Condition] | None = None,
) -> GenerationRequest:
    """Checks the input `tensors` (REQUEST_INPUTS) and the names of the requested `outputs`.

    If `outputs` has all outputs, the request named none. It then gets the image (or the encoded
    image), the seed, the settings and the outputs of the condition. `conditions` are those of all
    pipelines, to name the one that would take an input. Raises RequestError with the value and what
    is allowed.
    """
    size, latent_shape = _size(tensors, pipeline)
    sizes = latent_sizes(latent_shape)
    for name, tensor in tensors.items():
        _check_type(name, tensor)
        _check_shape(name, tensor, sizes)
    refuse_others(pipeline.name, tensors, conditions or {pipeline.name: pipeline.condition})
    _check_encoder(tensors, pipeline)
    guidance = _guidance(tensors, pipeline, settings)
    condition = pipeline.condition.parse(tensors, settings.max_images, guided=guidance.enabled)
    schedule = _schedule(tensors, pipeline, settings)
    schedule = _that_serves(schedule, tensors, pipeline, guidance, latent_shape)
    schedule, times = pipeline.on_own_grid(schedule, latent_shape)
    _check_start(tensors, len(condition))
    fills = not schedule.own_grid  # a filled hole starts with less noise
    edit = parse_edit(tensors, len(condition), size, pipeline.factor, fills=fills)
    if edit:
        times = _edit_times(edit, schedule, pipeline, latent_shape) or times
    given_noise = tensors.get(INITIAL_NOISE)
    if SEED in tensors:
        seeds = tensors[SEED]
    elif given_noise is None and not (edit and edit.invert):
        seeds = draw_seeds(len(condition))
    else:
        seeds = np.zeros(len(condition), dtype=np.int64)
    output_format = _text(tensors, OUTPUT_FORMAT, "raw")
    request = GenerationRequest(
        condition=condition,
        seeds=seeds,
        initial_noise=given_noise,
        latent_shape=latent_shape,
        size=size,
        schedule=schedule,
        times=_times(tensors, schedule, falling=bool(edit and edit.invert)) or times,
        guidance=guidance,
        output_format=output_format,
        outputs=_wanted(tuple(dict.fromkeys(outputs)), output_format, pipeline, edit),
        edit=edit,
        quality=_quality(tensors, output_format),
        strip_metadata=bool(tensors[STRIP_METADATA][0]) if STRIP_METADATA in tensors else False,
    )
    _check_outputs(request, pipeline)
    return request


def _check_type(name: str, tensor: np.ndarray) -> None:
    if name not in _SPECS:
        raise RequestError(f"unknown input {name!r}, known are {', '.join(_SPECS)}")
    if tensor.dtype != _SPECS[name].dtype:
        wanted = _TYPE_NAMES[_SPECS[name].dtype]
        raise RequestError(f"{name} must be {wanted}, got {tensor.dtype}")


def _check_shape(name: str, tensor: np.ndarray, sizes: Mapping[int | str, int]) -> None:
    dims = [sizes.get(dim, dim) for dim in _SPECS[name].dims]
    fits = len(dims) == tensor.ndim and all(
        want in (-1, got) for want, got in zip(dims, tensor.shape, strict=True)
    )
    if not fits:
        shown = shown_dims(dims)
        raise RequestError(f"{name} must have shape [{shown}], got {list(tensor.shape)}")


def _size(
    tensors: Mapping[str, np.ndarray], pipeline: Pipeline
) -> tuple[tuple[int, int] | None, tuple[int, int, int]]:
    """The size (H, W) of the images, None if there are none, and the shape of their latents."""
    if SIZE not in tensors:
        return pipeline.image_size, pipeline.latent_shape
    _check_type(SIZE, tensors[SIZE])
    _check_shape(SIZE, tensors[SIZE], {})
    height, width = tensors[SIZE].tolist()
    return (height, width), pipeline.latent_shape_of((height, width))


def _schedule(
    tensors: Mapping[str, np.ndarray], pipeline: Pipeline, settings: Settings
) -> Schedule:
    if SCHEDULE not in tensors:
        usual = pipeline.default_schedule(settings)
        if not inverts(tensors):
            return usual
        usual = usual.otherwise or usual
        return Schedule("A" * len(usual)) if usual.alone else usual.without_refiner()
    return pipeline.find_schedule(text_of(SCHEDULE, tensors[SCHEDULE][0]))


def _that_serves(
    schedule: Schedule,
    tensors: Mapping[str, np.ndarray],
    pipeline: Pipeline,
    guidance: Guidance,
    latent_shape: tuple[int, int, int],
) -> Schedule:
    """`schedule`, or what its preset names for requests that it cannot serve.

    Raises RequestError if there is no other.
    """
    if inverts(tensors) and schedule.alone and schedule.otherwise:
        return schedule.otherwise.without_refiner()
    if not schedule.own_grid:
        return schedule
    fills = {MASK, MASK_FILE} & tensors.keys() and STRENGTH not in tensors
    try:
        _check_whole(schedule, tensors, pipeline, guidance, latent_shape)
        return schedule.otherwise or schedule if fills else schedule
    except RequestError:
        if schedule.otherwise is None:
            raise
        return schedule.otherwise


def _check_whole(
    schedule: Schedule,
    tensors: Mapping[str, np.ndarray],
    pipeline: Pipeline,
    guidance: Guidance,
    latent_shape: tuple[int, int, int],
) -> None:
    """Raises RequestError unless the request fits a solver that belongs to one time grid."""
    own = f"schedule {schedule} belongs to its time grid from noise to data"
    if TIMES in tensors:
        raise RequestError(f"{own}: give no {TIMES}")
    if inverts(tensors):
        raise RequestError(f"{own}: an inversion takes other letters, such as A8")
    if STRENGTH in tensors and not tensors[STRENGTH][0] >= 1:
        raise RequestError(f"{own}: {STRENGTH} must be 1, got {tensors[STRENGTH][0]:g}")
    if not schedule.learned:
        return
    if guidance.enabled and guidance.interval != Guidance().interval:
        raise RequestError(
            f"schedule {schedule} was fitted with guidance at all times: give no "
            f"{GUIDANCE_INTERVAL}, or other letters"
        )
    assert pipeline.solvers  # as `find_schedule` demands
    if latent_shape != pipeline.solvers.latent_shape:
        raise RequestError(
            f"schedule {schedule} was fitted to the default size of pipeline {pipeline.name}: give "
            f"no {SIZE}, or other letters"
        )
    pipeline.solvers.fit_for(len(schedule), guidance.scale)


def _times(
    tensors: Mapping[str, np.ndarray], schedule: Schedule, *, falling: bool
) -> tuple[float, ...] | None:
    if TIMES not in tensors:
        return None
    return checked_grid(len(schedule), tensors[TIMES].tolist(), falling=falling)


def _edit_times(
    edit: Edit, schedule: Schedule, pipeline: Pipeline, latent_shape: tuple[int, int, int]
) -> tuple[float, ...] | None:
    """The part of the grid that an edit runs, backwards for an inversion; None for all of it."""
    steps = len(schedule)
    shift = schedule.shift or pipeline.grid.shift_for(pipeline.tokens(latent_shape), steps)
    if edit.invert:
        schedule.check_falling()
        return time_grid(steps, shift)[::-1]
    strength = unshifted(FILL_NOISE, shift) if edit.fill else edit.strength or 1.0
    return time_grid(steps, shift, strength) if strength < 1 else None


def _check_encoder(tensors: Mapping[str, np.ndarray], pipeline: Pipeline) -> None:
    given = [spec.name for spec in EDIT_INPUTS if spec.name in tensors]
    if given and not pipeline.has(Role.ENCODER):
        raise RequestError(
            f"pipeline {pipeline.name} has no encoder for images and takes no {given[0]}"
        )


def _text(tensors: Mapping[str, np.ndarray], name: str, default: str) -> str:
    return text_of(name, tensors[name][0]) if name in tensors else default


def _quality(tensors: Mapping[str, np.ndarray], output_format: str) -> int:
    if OUTPUT_QUALITY not in tensors:
        return QUALITY
    quality = int(tensors[OUTPUT_QUALITY][0])
    if not output_format.startswith(("jpeg", "webp")):
        raise RequestError(
            f"{OUTPUT_QUALITY} is of JPEG and WebP files, not of {output_format[:40]}: leave it out"
        )
    if not 1 <= quality <= 100:
        raise RequestError(f"{OUTPUT_QUALITY} must be 1 to 100, got {quality}")
    return quality


def _guidance(
    tensors: Mapping[str, np.ndarray], pipeline: Pipeline, settings: Settings
) -> Guidance:
    # Guided trajectories do not lead back to the noise that they came from.
    scale = 1.0 if inverts(tensors) else pipeline.default_guidance_scale(settings)
    if GUIDANCE_SCALE in tensors:
        scale = float(tensors[GUIDANCE_SCALE][0])
    interval = Guidance().interval
    if GUIDANCE_INTERVAL in tensors:
        low, high = (float(t) for t in tensors[GUIDANCE_INTERVAL])
        interval = low, high
    guidance = Guidance(scale, interval)
    if guidance.enabled and not pipeline.condition.can_guide:
        raise RequestError(
            f"{pipeline.condition.unguided_because}: guidance_scale must be 1, got {scale:g}"
        )
    return guidance


def _check_start(tensors: Mapping[str, np.ndarray], count: int) -> None:
    if SEED in tensors and INITIAL_NOISE in tensors:
        raise RequestError(f"give either {SEED} or {INITIAL_NOISE}, got both")
    for name in (SEED, INITIAL_NOISE):
        if name in tensors and len(tensors[name]) != count:
            raise RequestError(
                f"{name} must have one entry per image, {count} here, got {len(tensors[name])}"
            )
    seeds = tensors.get(SEED, np.zeros(1))
    if np.any(seeds < 0):
        raise RequestError(f"{SEED} must be 0 to {MAX_SEED}, got {seeds[seeds < 0][0]}")
    given = tensors.get(INITIAL_NOISE, np.zeros(1))
    if not np.all(np.isfinite(given)):
        raise RequestError(f"{INITIAL_NOISE} must be finite, got NaN or infinity")
    if (largest := float(np.abs(given).max(initial=0.0))) > LARGEST_NOISE:
        raise RequestError(
            f"{INITIAL_NOISE} must be standard normal, within {LARGEST_NOISE:g}, got values up to "
            f"{largest:.3g}"
        )


def _wanted(
    outputs: tuple[str, ...], output_format: str, pipeline: Pipeline, edit: Edit | None
) -> tuple[str, ...]:
    if set(outputs) != {spec.name for spec in REQUEST_OUTPUTS}:
        return outputs
    image = IMAGE if output_format == "raw" else ENCODED_IMAGE
    shows = pipeline.has(Role.DECODER) and not (edit and edit.invert)
    wanted = {image if shows else LATENT, SEED, SETTINGS}
    wanted |= {START_TIME} if edit else set()
    wanted |= {spec.name for spec in pipeline.condition.request_outputs}
    return tuple(name for name in outputs if name in wanted)


def _check_outputs(request: GenerationRequest, pipeline: Pipeline) -> None:
    if request.output_format not in FORMATS:
        raise RequestError(
            f"output_format must be one of {', '.join(FORMATS)}, got {request.output_format[:40]!r}"
        )
    if ENCODED_IMAGE in request.outputs and request.output_format == "raw":
        raise RequestError(
            f"{ENCODED_IMAGE} needs output_format {', '.join(FORMATS[1:])}, got raw: ask for "
            f"{IMAGE} instead"
        )
    if request.needs_decoder and not pipeline.has(Role.DECODER):
        raise RequestError(
            f"pipeline {pipeline.name} has no decoder and answers latents only: ask for {LATENT}"
        )
    if request.needs_decoder and request.edit and request.edit.invert:
        raise RequestError(f"an inversion answers noise: ask for {LATENT}, not for an image")
    known = {spec.name for spec in (*COMMON_OUTPUTS, *pipeline.condition.request_outputs)}
    if other := [name for name in request.outputs if name not in known]:
        raise RequestError(f"pipeline {pipeline.name} does not answer {other[0]}")
