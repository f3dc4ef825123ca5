"""Classifier-free guidance as rows: a guided sample is two rows, conditional then unconditional."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import numpy as np

from flowturbo.errors import RequestError
from flowturbo.solver.program import BlockCall, Network
from flowturbo.solver.sampler import Array, AwaitedBlock

MAX_SCALE = 100.0
Tensors = dict[str, Array]
# Evaluates a step block on its named input tensors (contract.py), answers (x_next, velocity_next).
RunBlock = Callable[[Network, Tensors], Awaitable[tuple[Array, Array]]]


@dataclass(frozen=True)
class Guidance:
    """u + scale * (c - u) at times within `interval`; a scale of 1 is no guidance.

    Raises RequestError unless the scale is in [0, 100] and the interval within [0, 1].
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0.0 <= self.scale <= MAX_SCALE:  # false for NaN too
            raise RequestError(
                f"guidance_scale must be a number from 0 to {MAX_SCALE:g}, got {self.scale}"
            )
        low, high = (float(np.float32(end)) for end in self.interval)
        object.__setattr__(self, "interval", (low, high))
        if not 0.0 <= low <= high <= 1.0:
            raise RequestError(
                f"guidance_interval must be two times with 0 <= low <= high <= 1, got {low}, {high}"
            )

    @property
    def enabled(self) -> bool:
        """Whether any evaluation is guided."""
        return self.scale != 1.0

    @property
    def rows(self) -> int:
        """Rows of an image in a network evaluation: two where it is guided."""
        return 2 if self.enabled else 1

    def applies_at(self, t: float) -> bool:
        """Whether an evaluation at time `t` is guided."""
        # The ends come as float32: compared as such, a time named as an end is within.
        return self.enabled and self.interval[0] <= float(np.float32(t)) <= self.interval[1]

    def scale_at(self, t: float) -> float:
        """The scale of an evaluation at time `t`."""
        return self.scale if self.applies_at(t) else 1.0


def to_rows(images: Array, guidance: Guidance) -> Array:
    """One value an image, [n, ...], to one a row: [2n, ...] with guidance, as it is without."""
    return np.repeat(images, 2, axis=0) if guidance.enabled else images


def to_images(rows: Array, guidance: Guidance) -> Array:
    """One value an image from one a row: those of the conditional rows."""
    return rows[::2] if guidance.enabled else rows


def guided_block(
    run: RunBlock,
    conditioning: Mapping[str, Array],
    null: Mapping[str, Array],
    guidance: Guidance,
) -> AwaitedBlock:
    """The sampler's block over `run`, for images with `conditioning` (tensors [n, ...]).

    `null` holds the unconditional value of each tensor ([1, ...]: null label, empty prompt), and
    nothing where guidance is not used. State
    has a row or two an image throughout; a call outside the guidance interval sends only the
    conditional ones and costs half. A refiner step of which one evaluation is inside has both, and
    scale 1 for the other.
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
    """The named tensors of one block call; unless `guided`, rows stand alone."""
    return {
        "x": x,
        "velocity": v,
        "scalars": scalar_rows(call, len(x), guidance),
        "pair": pair_rows(len(x), guided=guided),
        **conditioning,
    }


def scalar_rows(call: BlockCall, rows: int, guidance: Guidance) -> Array:
    """The block's `scalars` tensor, [rows, 5] float32: every row has the same."""
    row = np.array(call.scalars(guidance.scale_at), dtype=np.float32)
    return np.tile(row, (rows, 1))


def pair_rows(rows: int, *, guided: bool) -> Array:
    """The block's `pair` tensor, [rows, 1] int32: 1 and -1 in turn, or 0 throughout."""
    pair = np.zeros((rows, 1), dtype=np.int32)
    if guided:
        pair[::2], pair[1::2] = 1, -1
    return pair


def interleave(conditional: Array, unconditional: Array) -> Array:
    """[n, ...] and [1, ...] to [2n, ...]: conditional, unconditional, conditional, ..."""
    out = np.repeat(conditional, 2, axis=0)
    out[1::2] = unconditional
    return out
