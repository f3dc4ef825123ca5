"""A block call as tensors: images to rows, and the named inputs of a step block.

A guided image has two adjacent rows, conditional then unconditional.
"""

from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from flowturbo.contract import PAIR, SCALARS, VELOCITY, Role, X
from flowturbo.solver.calls import BlockCall, Network
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.sampler import Array, AwaitedBlock

Tensors = dict[str, Array]
# Evaluates a composed model: (its role, its inputs [rows, ...]) to its outputs in contract order.
Infer = Callable[[Role, Tensors], tuple[Array, ...]]
AwaitedInfer = Callable[[Role, Tensors], Coroutine[Any, Any, tuple[Array, ...]]]
# Evaluates a step block on its named input tensors (contract.py); returns (x_next, velocity_next).
RunBlock = Callable[[Network, Tensors], Awaitable[tuple[Array, Array]]]

_CALL_ROWS = 2  # the fixed cost of a call, in rows


def row_count(tensors: Tensors) -> int:
    """The number of rows of each of `tensors`."""
    return len(next(iter(tensors.values())))


def to_rows(images: Array, guidance: Guidance) -> Array:
    """One value per image, [n, ...], to one per row: [2n, ...] with guidance, else unchanged."""
    return np.repeat(images, 2, axis=0) if guidance.enabled else images


def to_images(rows: Array, guidance: Guidance) -> Array:
    """One value per row to one per image: keeps the conditional rows."""
    return rows[::2] if guidance.enabled else rows


def interleave(conditional: Array, unconditional: Array) -> Array:
    """[n, ...] and [1 or n, ...] to [2n, ...]: conditional, unconditional, conditional, ..."""
    out = np.repeat(conditional, 2, axis=0)
    out[1::2] = unconditional
    return out


def guided_block(
    run: RunBlock,
    conditioning: Mapping[str, Array],
    null: Mapping[str, Array],
    guidance: Guidance,
) -> AwaitedBlock:
    """The sampler's block over `run`, for images with `conditioning` (tensors [n, ...]).

    `null` has the unconditional value of each tensor ([1 or n, ...]); it is empty if guidance is
    not enabled. The number of rows per image is constant: one, or two with guidance. A call outside
    the guidance interval sends only the conditional rows and costs half. A refiner step with one
    evaluation inside the interval sends both, with scale 1 for the other evaluation.
    """
    paired = {name: interleave(value, null[name]) for name, value in conditioning.items() if null}

    async def block(call: BlockCall, x: Array, v: Array) -> tuple[Array, Array]:
        if any(guidance.applies_at(t) for t in call.times):
            return await run(call.network, block_inputs(call, x, v, paired, guidance, guided=True))
        x, v = to_images(x, guidance), to_images(v, guidance)
        inputs = block_inputs(call, x, v, conditioning, guidance, guided=False)
        x_next, v_next = await run(call.network, inputs)
        return to_rows(x_next, guidance), to_rows(v_next, guidance)

    return block


def block_inputs(
    call: BlockCall,
    x: Array,
    v: Array,
    conditioning: Mapping[str, Array],
    guidance: Guidance,
    *,
    guided: bool,
) -> Tensors:
    """The named tensors of one block call. Unless `guided`, rows have no partner."""
    return {
        X: x,
        VELOCITY: v,
        SCALARS: scalar_rows(call, len(x), guidance),
        PAIR: pair_rows(len(x), guided=guided),
        **conditioning,
    }


def scalar_rows(call: BlockCall, rows: int, guidance: Guidance) -> Array:
    """The block's `scalars` tensor, [rows, 5] float32, with the same values in every row."""
    row = np.array(call.scalars(guidance.scale_at), dtype=np.float32)
    return np.tile(row, (rows, 1))


def pair_rows(rows: int, *, guided: bool) -> Array:
    """The block's `pair` tensor, [rows, 1] int32: alternately 1 and -1, or all 0."""
    pair = np.zeros((rows, 1), dtype=np.int32)
    if guided:
        pair[::2], pair[1::2] = 1, -1
    return pair


def in_batches(tensors: Tensors, sizes: Sequence[int]) -> Iterator[tuple[Tensors, int]]:
    """Cuts `tensors` [rows, ...] into batches of the given numbers of rows, without cutting a pair.

    Returns each batch and how many of its rows count: a batch may end with copies of its last row.
    `sizes` has a number above 1 if there are pairs.
    """
    rows, start = row_count(tensors), 0
    pair = tensors.get(PAIR)
    while start < rows:
        size = _first_batch(rows - start, tuple(sizes))
        end = min(start + size, rows)
        if pair is not None and end < rows and pair[end - 1, 0] > 0:  # its partner is the next row
            end -= 1
            if end == start:
                size, end = min(each for each in sizes if each > 1), start + 2
        batch = {name: tensor[start:end] for name, tensor in tensors.items()}
        if end - start < size:
            more = [(0, size - (end - start))]
            batch = {
                name: np.pad(part, more + [(0, 0)] * (part.ndim - 1), "edge")
                for name, part in batch.items()
            }
        yield batch, end - start
        start = end


@cache
def _first_batch(rows: int, sizes: tuple[int, ...]) -> int:
    """The first and largest of the batches that take the least time for `rows` rows."""
    least: list[tuple[int, int]] = [(0, 0)]  # by rows: the time, and the largest batch
    for count in range(1, rows + 1):
        choices = ((least[max(count - s, 0)][0] + s + _CALL_ROWS, -s) for s in sizes)
        time, size = min(choices)
        least.append((time, -size))
    return least[rows][1]
