"""The sampler: one pure function that runs a program over injected networks."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import numpy as np

from flowturbo.solver.program import BlockCall, Program

Array = np.ndarray
# (call, x, v) to (x_next, v_next), all [rows, C, h, w] float32.
Block = Callable[[BlockCall, Array, Array], tuple[Array, Array]]
AwaitedBlock = Callable[[BlockCall, Array, Array], Awaitable[tuple[Array, Array]]]
T = TypeVar("T")


async def sample_async(program: Program, noise: Array, block: AwaitedBlock) -> Array:
    """Latents at the end of the program's time grid, from `noise` [rows, C, h, w] at its start.

    A coroutine, so that a server can run many side by side and evaluate their blocks together.
    """
    x, v = noise, np.zeros_like(noise)
    for call in program.calls:
        x, v = await block(call, x, v)
    return x


def sample(program: Program, noise: Array, block: Block) -> Array:
    """As `sample_async`, at once."""

    async def evaluated(call: BlockCall, x: Array, v: Array) -> tuple[Array, Array]:
        return block(call, x, v)

    return run_sync(sample_async(program, noise, evaluated))


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise RuntimeError("block() awaited something; use `sample_async` under a Batcher")
