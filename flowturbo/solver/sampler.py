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
# (call, x_next, v_next) to what takes their place.
After = Callable[[BlockCall, State, State], Awaitable[tuple[State, State]]]
T = TypeVar("T")


async def sample_async(
    program: Program,
    noise: State,
    block: Callable[[BlockCall, State, State], Awaitable[tuple[State, State]]],
    after: After[State] | None = None,
    rows_per_image: int = 1,
) -> State:
    """Latents at the end of the program's time grid, from `noise` [rows, C, h, w] at its start.

    A coroutine, so that a server can run many side by side and evaluate their blocks together.
    `after` each call may replace the state and the velocity. Of the rows of an image the networks
    read the first one's state only, so operators do so too.
    """
    zero: State = 0 * noise  # type: ignore
    x, velocities, kept = noise, [zero], max(1, program.history)
    for call in program.calls:
        moved, v = await block(call, *call.inputs(x, velocities))
        if call.operator:
            first: list[Any] = [each[::rows_per_image] for each in (x, *velocities, v)]  # type: ignore
            change = call.operator(first[0], first[1:])
            moved = moved + np.repeat(change, rows_per_image, 0)
        if after:
            moved, v = await after(call, moved, v)
        x, velocities = moved, [*velocities, v][-kept:]
    return x


def sample(program: Program, noise: State, block: Block[State], rows_per_image: int = 1) -> State:
    """As `sample_async`, at once."""

    async def evaluated(call: BlockCall, x: State, v: State) -> tuple[State, State]:
        return block(call, x, v)

    return run_sync(sample_async(program, noise, evaluated, None, rows_per_image))


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise RuntimeError("block() awaited something; use `sample_async` under a Batcher")
