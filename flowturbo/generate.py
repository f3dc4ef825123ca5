"""From a checked request to its answer, over whatever evaluates the exported models."""

import logging
from collections.abc import Callable, Coroutine, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from flowturbo import contract
from flowturbo.errors import NotFiniteError
from flowturbo.latents import encode_images
from flowturbo.repository import Pipeline
from flowturbo.request import GenerationRequest
from flowturbo.solver.guidance import Guidance, Tensors, guided_block, to_images, to_rows
from flowturbo.solver.program import Network, Program, Variant, compile_program
from flowturbo.solver.sampler import Array, AwaitedBlock, run_sync, sample_async
from flowturbo.solver.schedule import Schedule

# Evaluates a composed model: (its name, its inputs [rows, ...]) to its outputs in contract order.
Infer = Callable[[str, Tensors], tuple[Array, ...]]
AwaitedInfer = Callable[[str, Tensors], Coroutine[Any, Any, tuple[Array, ...]]]

LARGEST_TRAINED_STEP = 0.12  # the paper's range is (0, 0.12]
_logger = logging.getLogger(__name__)
BLOCK_MODELS = {Network.PREDICTOR: contract.PREDICTOR, Network.REFINER: contract.REFINER}


def generate(
    request: GenerationRequest, pipeline: Pipeline, program: Program, infer: Infer
) -> dict[str, Array]:
    """The output tensors that `request` asks for, by name (contract.REQUEST_OUTPUTS)."""
    made = run_sync(make_images(request, pipeline, program, awaited(infer)))
    return complete(request, pipeline, made)


def awaited(infer: Infer) -> AwaitedInfer:
    """`infer` for a coroutine, which it keeps waiting for nothing."""

    async def evaluated(model: str, tensors: Tensors) -> tuple[Array, ...]:
        return infer(model, tensors)

    return evaluated


async def make_images(
    request: GenerationRequest, pipeline: Pipeline, program: Program, infer: AwaitedInfer
) -> Tensors:
    """The latent and the image that `request` needs, by these names."""
    infer = in_chunks(infer, pipeline.max_rows)
    made: Tensors = {}
    if request.needs_decoder or "latent" in request.outputs:
        made["latent"] = await _latent(request, pipeline, program, infer)
        check_finite(made["latent"], "latent")
    if request.needs_decoder:
        made["image"] = await decode(infer, made["latent"])
    return made


async def decode(infer: AwaitedInfer, latent: Array) -> Array:
    """Images [n, H, W, 3] uint8 of `latent` [n, C, h, w]; raises NotFiniteError."""
    image, magnitude = await infer(contract.DECODER, {"latent": latent})
    check_finite(magnitude, "image")
    return image


def check_finite(values: Array, what: str) -> None:
    """Raises NotFiniteError unless all of `values` [n, ...] are finite; `what` names them."""
    finite = np.isfinite(values).all(tuple(range(1, values.ndim)))
    if not finite.all():
        raise NotFiniteError(
            f"the {what} of image {int(finite.argmin()) + 1} of {len(values)} is not finite: the "
            "networks left the range of the precision that they compute in; export them with "
            "--precision bf16 or fp32"
        )


def complete(
    request: GenerationRequest, pipeline: Pipeline, made: Mapping[str, Array]
) -> dict[str, Array]:
    """The output tensors that `request` asks for, from the image and latent `made` for it."""
    answer: dict[str, Array] = {"seed": request.seeds, **made}
    if "encoded_image" in request.outputs:
        answer["encoded_image"] = encode_images(answer["image"], request.output_format)
    if "class_name" in request.outputs:
        names = [pipeline.name_of(int(label)).encode() for label in request.labels]
        answer["class_name"] = np.array(names, dtype=object)
    return {name: answer[name] for name in request.outputs}


async def _latent(
    request: GenerationRequest, pipeline: Pipeline, program: Program, infer: AwaitedInfer
) -> Array:
    block = image_block(infer, pipeline, request.labels, request.guidance)
    noise = to_rows(request.start(pipeline), request.guidance)
    return to_images(await sample_async(program, noise, block), request.guidance)


def image_block(
    infer: AwaitedInfer, pipeline: Pipeline, labels: Array, guidance: Guidance
) -> AwaitedBlock:
    """The sampler's block for images of the classes `labels` [n]."""

    async def evaluate(network: Network, tensors: Tensors) -> tuple[Array, Array]:
        x_next, velocity_next = await infer(BLOCK_MODELS[network], tensors)
        return x_next, velocity_next

    return guided_block(
        evaluate,
        conditioning={"label": labels[:, None]},
        null={"label": np.array([[pipeline.null_label]], dtype=np.int64)}
        if guidance.enabled
        else {},
        guidance=guidance,
    )


def models_called(program: Program) -> list[str]:
    """The composed model of each block call, in order."""
    return [BLOCK_MODELS[call.network] for call in program.calls]


@lru_cache(maxsize=256)
def program_for(schedule: Schedule, variant: Variant) -> Program:
    """The program on the uniform grid, compiled once for all requests that share a schedule."""
    program = compile_program(schedule, variant=variant)
    if (size := program.largest_refiner_step()) > LARGEST_TRAINED_STEP:
        _logger.warning(
            "schedule %s refines in steps of %.3f, refiners are trained on steps up to %g",
            schedule,
            size,
            LARGEST_TRAINED_STEP,
        )
    return program


def in_chunks(infer: AwaitedInfer, max_rows: int) -> AwaitedInfer:
    """`infer` for any number of rows, at most `max_rows` at a time."""
    size = max_rows - max_rows % 2  # even, so that no guidance pair is torn apart

    async def chunked(model: str, tensors: Tensors) -> tuple[Array, ...]:
        rows = len(next(iter(tensors.values())))
        if rows <= size:
            return await infer(model, tensors)
        parts = [
            await infer(
                model, {name: value[start : start + size] for name, value in tensors.items()}
            )
            for start in range(0, rows, size)
        ]
        return tuple(np.concatenate(of_output) for of_output in zip(*parts, strict=True))

    return chunked
