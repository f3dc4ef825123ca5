"""From a checked request to its output tensors. The caller supplies the evaluation of models."""

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from flowturbo.contract import (
    ENCODED_IMAGE,
    IMAGE,
    LATENT,
    SEED,
    SETTINGS,
    SOLVER,
    START_TIME,
    Role,
)
from flowturbo.editing import OpenEdit, repainting
from flowturbo.errors import NotFiniteError
from flowturbo.latents import BASE64, encode_images
from flowturbo.learned import learned_program, solver_rows
from flowturbo.pipeline import Pipeline
from flowturbo.provenance import exif, provenance
from flowturbo.request import GenerationRequest
from flowturbo.rows import (
    AwaitedInfer,
    Infer,
    Tensors,
    guided_block,
    row_count,
    to_images,
    to_rows,
)
from flowturbo.settings import Settings
from flowturbo.solver.calls import BlockCall, Network, Variant
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.program import LARGEST_TRAINED_STEP, Program, compile_program
from flowturbo.solver.sampler import After, Array, AwaitedBlock, run_sync, sample_async
from flowturbo.solver.schedule import Schedule
from flowturbo.tiles import Tiles

# Is shown the step that was done, and latents [n, C, h, w] of what will probably be the images.
Show = Callable[[int, Array], Awaitable[None]]
_ROLES = {network: Role(network) for network in Network}
_logger = logging.getLogger(__name__)


def generate(
    request: GenerationRequest,
    pipeline: Pipeline,
    settings: Settings,
    program: Program,
    infer: Infer,
) -> Tensors:
    """The output tensors that `request` asks for, by name."""
    edit = request.edit.open() if request.edit else None
    chunked = in_chunks(awaited(infer), pipeline.rows_for(request.latent_shape))
    made = run_sync(make_images(request, pipeline, program, chunked, edit))
    return complete(request, pipeline, settings, made, edit)


def awaited(infer: Infer) -> AwaitedInfer:
    """`infer` as a coroutine function that never waits."""

    async def evaluated(role: Role, tensors: Tensors) -> tuple[Array, ...]:
        return infer(role, tensors)

    return evaluated


async def make_images(
    request: GenerationRequest,
    pipeline: Pipeline,
    program: Program,
    infer: AwaitedInfer,
    edit: OpenEdit | None = None,
    show: Show | None = None,
    *,
    at_once: bool = False,
) -> Tensors:
    """The latent and the image that `request` needs, by these names; `edit` is its opened edit.

    `infer` takes any number of rows (`in_chunks`). `show` is called after each step but the last.
    With `at_once` a fitted solver runs in one execution (`in_one_execution` says whether it can).
    """
    made: Tensors = {}
    if request.needs_decoder or LATENT in request.outputs:
        if at_once:
            made[LATENT] = await _latent_at_once(request, pipeline, program, infer)
        else:
            made[LATENT] = await _latent(request, pipeline, program, infer, edit, show)
        check_finite(made[LATENT], "latent")
    if request.needs_decoder:
        made[IMAGE] = await decode(infer, made[LATENT], pipeline.largest_decode)
    return made


async def encode(infer: AwaitedInfer, images: Array, pipeline: Pipeline) -> Array:
    """Latents [n, C, h, w] of `images` [n, H, W, 3] uint8; raises NotFiniteError.

    A latent with a side above `largest_decode` is encoded in tiles.
    """
    factor = pipeline.factor
    tiles = Tiles.of(images.shape[1] // factor, images.shape[2] // factor, pipeline.largest_decode)
    (parts,) = await infer(Role.ENCODER, {IMAGE: tiles.split_images(images, factor)})
    latents = tiles.join_latents(parts)
    check_finite(latents, "encoded latent")
    return latents


async def decode(infer: AwaitedInfer, latent: Array, largest: int = 0) -> Array:
    """Images [n, H, W, 3] uint8 of `latent` [n, C, h, w]; raises NotFiniteError.

    A latent with a side above `largest` is decoded in tiles.
    """
    tiles = Tiles.of(latent.shape[2], latent.shape[3], largest)
    parts, magnitude = await infer(Role.DECODER, {LATENT: tiles.split(latent)})
    check_finite(magnitude.reshape(len(latent), -1), "image")
    return tiles.join(parts)


def check_finite(values: Array, what: str) -> None:
    """Raises NotFiniteError unless all `values` [n, ...] are finite; `what` is their name."""
    finite = np.isfinite(values).all(tuple(range(1, values.ndim)))
    if not finite.all():
        raise NotFiniteError(
            f"the {what} of image {int(finite.argmin()) + 1} of {len(values)} is not finite: the "
            "networks left the range of their precision; export them with --precision bf16 or fp32"
        )


def complete(
    request: GenerationRequest,
    pipeline: Pipeline,
    settings: Settings,
    made: Mapping[str, Array],
    edit: OpenEdit | None = None,
) -> Tensors:
    """The output tensors that `request` asks for; `made` has its image and latent.

    An image that was repainted is pasted into the given one.
    """
    start_time = np.array([request.start_time], dtype=np.float32)
    answer: Tensors = {SEED: request.seeds, START_TIME: start_time, **made}
    if edit and edit.masks is not None and IMAGE in made:
        answer[IMAGE] = edit.pasted(made[IMAGE])
    if ENCODED_IMAGE in request.outputs:
        answer[ENCODED_IMAGE] = _files(request, pipeline, settings, answer[IMAGE])
    if SETTINGS in request.outputs:
        answer[SETTINGS] = as_json(request.settings(pipeline, settings))
    if any(spec.name in request.outputs for spec in pipeline.condition.request_outputs):
        answer |= pipeline.condition.answer(request.condition)
    return {name: answer[name] for name in request.outputs}


def _files(
    request: GenerationRequest, pipeline: Pipeline, settings: Settings, images: Array
) -> Array:
    form, metadata = request.output_format, []
    if not request.strip_metadata:
        made = provenance(request, pipeline, settings)
        metadata = [exif(record, form.removesuffix(BASE64)) for record in made]
    return encode_images(images, form, request.quality, metadata)


def as_json(document: Any) -> Array:
    """`document` as a BYTES tensor [1]."""
    return np.array([json.dumps(document).encode()], dtype=object)


async def _latent(
    request: GenerationRequest,
    pipeline: Pipeline,
    program: Program,
    infer: AwaitedInfer,
    edit: OpenEdit | None,
    show: Show | None,
) -> Array:
    guidance = request.guidance
    block = await image_block(infer, pipeline, request.condition, guidance)
    if edit is None or (request.start_time == 0 and edit.masks is None):
        start, settle = request.noise(), None  # nothing of an image is left
    else:
        start, settle = await _from_image(request, pipeline, infer, edit)
    after = _showing(program, guidance, show, settle) if show else settle
    rows = to_rows(start, guidance)
    return to_images(await sample_async(program, rows, block, after, guidance.rows), guidance)


async def _latent_at_once(
    request: GenerationRequest, pipeline: Pipeline, program: Program, infer: AwaitedInfer
) -> Array:
    """The latent of a fitted solver, by one execution of the predictor's block (learned.py)."""
    guidance, solvers = request.guidance, pipeline.solvers
    assert solvers
    rows = to_rows(request.noise(), guidance)
    solver = solver_rows(solvers, len(request.schedule), guidance.scale, len(rows))

    async def with_solver(role: Role, tensors: Tensors) -> tuple[Array, ...]:
        more = {SOLVER: solver} if role is Role.PREDICTOR else {}
        return await infer(role, {**tensors, **more})

    block = await image_block(with_solver, pipeline, request.condition, guidance)
    end, _ = await block(program.calls[0], rows, np.zeros_like(rows))
    return to_images(end, guidance)


async def _from_image(
    request: GenerationRequest, pipeline: Pipeline, infer: AwaitedInfer, edit: OpenEdit
) -> tuple[Array, After[Array] | None]:
    """The state [n, C, h, w] that an edit starts from, and what follows each of its calls."""

    def per_image(values: Array) -> Array:
        return np.broadcast_to(values, (request.images, *values.shape[1:]))

    data, t = per_image(await encode(infer, edit.images, pipeline)), request.start_time
    if request.edit and request.edit.invert:
        return data, None
    noise = request.noise()
    settle = None
    if edit.masks is not None:
        known = (per_image(edit.latent_masks), noise, data)
        settle = repainting(*(to_rows(each, request.guidance) for each in known))
    return (1 - t) * noise + t * data, settle


def _showing(
    program: Program, guidance: Guidance, show: Show, settle: After[Array] | None
) -> After[Array]:
    """`settle`, and then shows after each step where its velocity leads: x + (1 - t) v."""
    starts = [call.step for call in program.calls]
    done = dict(zip(map(id, program.calls), [*starts[1:], len(program.schedule)], strict=True))

    async def watched(call: BlockCall, x: Array, v: Array) -> tuple[Array, Array]:
        if settle:
            x, v = await settle(call, x, v)
        if call.lands_at != call.starts_at and call is not program.calls[-1]:
            await show(done[id(call)], to_images(x + (1 - call.lands_at) * v, guidance))
        return x, v

    return watched


async def image_block(
    infer: AwaitedInfer, pipeline: Pipeline, condition: Any, guidance: Guidance
) -> AwaitedBlock:
    """The sampler's block for images with `condition`, a value of the pipeline's condition."""

    async def evaluate(network: Network, tensors: Tensors) -> tuple[Array, Array]:
        x_next, velocity_next = await infer(_ROLES[network], tensors)
        return x_next, velocity_next

    encoded = pipeline.condition.encode(condition, infer, guided=guidance.enabled)
    conditioning, null = await encoded
    return guided_block(evaluate, conditioning, null, guidance)


def roles_called(program: Program) -> list[Role]:
    """The role of the model in each block call, in order."""
    return [_ROLES[call.network] for call in program.calls]


def program_of(request: GenerationRequest, pipeline: Pipeline, variant: Variant) -> Program:
    """The program of a request to `pipeline`. It is compiled once and then cached."""
    schedule = request.schedule
    if schedule.learned:
        assert pipeline.solvers  # as `find_schedule` demands
        return learned_program(schedule, pipeline.solvers, request.guidance.scale)
    return program_for(schedule, variant, request.times, pipeline.trained_step)


@lru_cache(maxsize=256)
def program_for(
    schedule: Schedule,
    variant: Variant,
    times: tuple[float, ...] | None = None,
    trained: float = LARGEST_TRAINED_STEP,
) -> Program:
    """The program on the schedule's grid, or on `times`. It is compiled once and then cached.

    `trained` is the largest step that the refiner was trained on; longer ones are logged.
    """
    program = compile_program(schedule, times, variant)
    if (size := program.largest_refiner_step()) > trained + 1e-6:
        _logger.warning(
            "schedule %s has refiner steps of %.3f, but the refiner was trained on steps up to %g",
            schedule,
            size,
            trained,
        )
    return program


def in_chunks(infer: AwaitedInfer, max_rows: int) -> AwaitedInfer:
    """`infer` for any number of rows: splits them into calls of at most `max_rows` rows."""
    size = max_rows - max_rows % 2  # even, so that no guidance pair is split

    async def chunked(role: Role, tensors: Tensors) -> tuple[Array, ...]:
        rows = row_count(tensors)
        if rows <= size:
            return await infer(role, tensors)
        parts = [
            await infer(role, {name: value[k : k + size] for name, value in tensors.items()})
            for k in range(0, rows, size)
        ]
        return tuple(np.concatenate(of_output) for of_output in zip(*parts, strict=True))

    return chunked
