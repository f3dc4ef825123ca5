"""From a checked request to its output tensors. The caller supplies the evaluation of models."""

import json
import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from flowturbo.contract import (
    ENCODED_IMAGE,
    IMAGE,
    LATENT,
    SEED,
    SETTINGS,
    Role,
)
from flowturbo.errors import NotFiniteError
from flowturbo.latents import encode_images
from flowturbo.pipeline import Pipeline
from flowturbo.request import GenerationRequest
from flowturbo.rows import AwaitedInfer, Infer, Tensors, guided_block, to_images, to_rows
from flowturbo.settings import Settings
from flowturbo.solver.calls import Network, Variant
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.program import LARGEST_TRAINED_STEP, Program, compile_program
from flowturbo.solver.sampler import Array, AwaitedBlock, run_sync, sample_async
from flowturbo.solver.schedule import Schedule
from flowturbo.tiles import Tiles

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
    made = run_sync(make_images(request, pipeline, program, awaited(infer)))
    return complete(request, pipeline, settings, made)


def awaited(infer: Infer) -> AwaitedInfer:
    """`infer` as a coroutine function that never waits."""

    async def evaluated(role: Role, tensors: Tensors) -> tuple[Array, ...]:
        return infer(role, tensors)

    return evaluated


async def make_images(
    request: GenerationRequest, pipeline: Pipeline, program: Program, infer: AwaitedInfer
) -> Tensors:
    """The latent and the image that `request` needs, by these names."""
    infer = in_chunks(infer, pipeline.rows_for(request.latent_shape))
    made: Tensors = {}
    if request.needs_decoder or LATENT in request.outputs:
        made[LATENT] = await _latent(request, pipeline, program, infer)
        check_finite(made[LATENT], "latent")
    if request.needs_decoder:
        made[IMAGE] = await decode(infer, made[LATENT], pipeline.largest_decode)
    return made


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
    request: GenerationRequest, pipeline: Pipeline, settings: Settings, made: Mapping[str, Array]
) -> Tensors:
    """The output tensors that `request` asks for; `made` has its image and latent."""
    answer: Tensors = {SEED: request.seeds, **made}
    if ENCODED_IMAGE in request.outputs:
        answer[ENCODED_IMAGE] = encode_images(answer[IMAGE], request.output_format)
    if SETTINGS in request.outputs:
        answer[SETTINGS] = as_json(request.settings(pipeline, settings))
    if any(spec.name in request.outputs for spec in pipeline.condition.request_outputs):
        answer |= pipeline.condition.answer(request.condition)
    return {name: answer[name] for name in request.outputs}


def as_json(document: Any) -> Array:
    """`document` as a BYTES tensor [1]."""
    return np.array([json.dumps(document).encode()], dtype=object)


async def _latent(
    request: GenerationRequest, pipeline: Pipeline, program: Program, infer: AwaitedInfer
) -> Array:
    block = await image_block(infer, pipeline, request.condition, request.guidance)
    noise = to_rows(request.start(), request.guidance)
    return to_images(await sample_async(program, noise, block), request.guidance)


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
        rows = len(next(iter(tensors.values())))
        if rows <= size:
            return await infer(role, tensors)
        parts = [
            await infer(role, {name: value[k : k + size] for name, value in tensors.items()})
            for k in range(0, rows, size)
        ]
        return tuple(np.concatenate(of_output) for of_output in zip(*parts, strict=True))

    return chunked
