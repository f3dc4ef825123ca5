"""The sampler: one pure function that runs a program over injected networks."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import numpy as np

from flowturbo.solver.calls import BlockCall
from flowturbo.solver.program import Program

Array = np.ndarray
State = TypeVar("State")  # arrays [rows, C, h, w] of numpy or torch, or what stands for them
# (call, x, v) to (x_next, v_next).
Block = Callable[[BlockCall, State, State], tuple[State, State]]
AwaitedBlock = Callable[[BlockCall, Array, Array], Awaitable[tuple[Array, Array]]]
T = TypeVar("T")


async def sample_async(
    program: Program,
    noise: State,
    block: Callable[[BlockCall, State, State], Awaitable[tuple[State, State]]],
) -> State:
    """Latents at the end of the program's time grid, from `noise` [rows, C, h, w] at its start.

    A coroutine, so that a server can run many side by side and evaluate their blocks together.
    """
    zero: State = 0 * noise  # type: ignore
    x, v = noise, zero
    for call in program.calls:
        x, v = await block(call, x, v)
    return x


def sample(program: Program, noise: State, block: Block[State]) -> State:
    """As `sample_async`, at once."""

    async def evaluated(call: BlockCall, x: State, v: State) -> tuple[State, State]:
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
