"""A schedule compiled to a program: the step-block calls that carry noise to an image.

Times run from noise at 0 to data at 1. One block around the predictor serves every step that
evaluates it, with other coefficients:

    x_in   = x + euler * v
    v_next = guide(predictor(x_in, t))
    x_next = x + w_prev * v + w_next * v_next

A refiner step needs nothing in between its two evaluations and is one call of the block around the
refiner, which regresses the change of the velocity (h = end - t):

    d      = guide(refiner([x, v], t)) + v
    d_next = guide(refiner([x + h * d, v or d], end)) + d
    x_next = x + h/2 * (d + d_next),  v_next = d

A step that evaluates nothing (Z, T) is no call: it makes the step of the call before it longer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar

import numpy as np

from flowturbo.errors import RequestError
from flowturbo.solver.schedule import Schedule


class Network(StrEnum):
    """Which of the two networks a call evaluates."""

    PREDICTOR = "predictor"
    REFINER = "refiner"


class Variant(StrEnum):
    """What the second evaluation of a refiner step reads beside x.

    `reference`: the velocity from before the step, as the public code does and the published
    figures were made. `paper`: the velocity just refined (FlowTurbo, Eq. 7).
    """

    REFERENCE = "reference"
    PAPER = "paper"


ScaleAt = Callable[[float], float]  # the guidance scale of an evaluation at time t


@dataclass(frozen=True)
class PredictorCall:
    """One evaluation of the predictor; times and coefficients are dimensionless, t in [0, 1].

    `v_at` is the time of the velocity cached before it, None at the start.
    """

    step: int
    t: float
    euler: float = 0.0
    w_prev: float = 0.0
    w_next: float = 0.0
    v_at: float | None = None
    network: ClassVar[Network] = Network.PREDICTOR

    @property
    def times(self) -> tuple[float, ...]:
        """When the network is evaluated."""
        return (self.t,)

    def scalars(self, scale_at: ScaleAt) -> tuple[float, ...]:
        """A row of the block's `scalars` tensor."""
        return self.t, self.euler, self.w_prev, self.w_next, scale_at(self.t)


@dataclass(frozen=True)
class RefinerCall:
    """One refiner step from time `t` to `end`: two evaluations of the refiner (FlowTurbo, Eq. 7).

    `reads_refined`: the second reads the velocity that the first refined (Variant.PAPER).
    """

    step: int
    t: float
    end: float
    reads_refined: bool
    network: ClassVar[Network] = Network.REFINER

    @property
    def times(self) -> tuple[float, ...]:
        """When the network is evaluated."""
        return self.t, self.end

    def scalars(self, scale_at: ScaleAt) -> tuple[float, ...]:
        """A row of the block's `scalars` tensor."""
        return self.t, self.end, scale_at(self.t), scale_at(self.end), float(self.reads_refined)


BlockCall = PredictorCall | RefinerCall


@dataclass(frozen=True)
class Program:
    """The block calls of one schedule on one time grid."""

    schedule: Schedule
    calls: tuple[BlockCall, ...]

    def evaluations(self, network: Network) -> int:
        """How often `network` is evaluated: H1P5R3 is 7 predictor and 6 refiner evaluations."""
        return sum(len(call.times) for call in self.calls if call.network is network)

    def largest_refiner_step(self) -> float:
        """The longest step that the refiner takes, 0 without any."""
        sizes = (call.end - call.t for call in self.calls if isinstance(call, RefinerCall))
        return max(sizes, default=0.0)


@dataclass(frozen=True)
class _Step:
    """Where one step stands: from `start` to `end`, with a velocity cached for time `cached_at`.

    `call` is the one that evaluated it, None at the start.
    """

    index: int
    start: float
    end: float
    cached_at: float | None
    variant: Variant
    call: BlockCall | None

    @property
    def size(self) -> float:
        return self.end - self.start

    def evaluate(self) -> BlockCall:
        """The velocity at the start, moving nothing."""
        return PredictorCall(self.index, self.start, v_at=self.cached_at)

    def correct(self, v_at: float) -> BlockCall:
        """Trapezoidal rule, the end reached by an Euler step with the velocity of time `v_at`."""
        h = self.size
        return PredictorCall(self.index, self.end, h, h / 2, h / 2, v_at)


_Calls = tuple[list[BlockCall], float]  # and the time that the velocity cached afterwards is for


def _heun(step: _Step) -> _Calls:
    """Eq. 3: the velocity at both ends."""
    return [step.evaluate(), step.correct(step.start)], step.end


def _pseudo_corrector(step: _Step) -> _Calls:
    """Eq. 9: as Heun, but the velocity at the start is the one cached by the step before."""
    if step.cached_at is None:
        return _heun(step)
    return [step.correct(step.cached_at)], step.end


def _refiner(step: _Step) -> _Calls:
    """Eq. 7: as Heun, but both velocities come from the refiner; keeps the first."""
    reads_refined = step.variant is Variant.PAPER
    return [RefinerCall(step.index, step.start, step.end, reads_refined)], step.start


def _euler(step: _Step) -> _Calls:
    """First order, for comparison."""
    call = PredictorCall(step.index, step.start, w_next=step.size, v_at=step.cached_at)
    return [call], step.start


def _adams_bashforth(step: _Step) -> _Calls:
    """Second order from the cached velocity of an earlier time, variable steps; for comparison.

    With no earlier velocity (at the start, or right after a step that caches the velocity of its
    end) there is nothing to extrapolate from, and it is an Euler step.
    """
    if step.cached_at is None or step.cached_at >= step.start:
        return _euler(step)
    h = step.size
    extrapolated = h * h / (2 * (step.start - step.cached_at))
    w_next = h + extrapolated
    call = PredictorCall(step.index, step.start, 0.0, -extrapolated, w_next, step.cached_at)
    return [call], step.start


def _kept(step: _Step) -> PredictorCall:
    """v(t) = v, the velocity last evaluated."""
    assert isinstance(step.call, PredictorCall)  # as Schedule demands
    return replace(step.call, w_next=step.call.w_next + step.size)


def _extrapolated(step: _Step) -> PredictorCall:
    """v(t) on the line through the last two evaluated, integrated exactly over the step.

    TaylorSeer (arXiv 2503.06923) of order 1, on the network's output. With no earlier velocity, as
    for Adams-Bashforth, the last is kept.
    """
    call = _kept(step)
    if call.v_at is None or call.v_at >= call.t:
        return call
    ahead = (step.start + step.end) / 2 - call.t
    slope = step.size * ahead / (call.t - call.v_at)
    return replace(call, w_prev=call.w_prev - slope, w_next=call.w_next + slope)


_PROLONGING: dict[str, Callable[[_Step], PredictorCall]] = {"Z": _kept, "T": _extrapolated}
_COMPILERS: dict[str, Callable[[_Step], _Calls]] = {
    "H": _heun,
    "P": _pseudo_corrector,
    "R": _refiner,
    "E": _euler,
    "A": _adams_bashforth,
}


def compile_program(
    schedule: Schedule,
    times: Sequence[float] | None = None,
    variant: Variant = Variant.REFERENCE,
) -> Program:
    """The block calls of `schedule` on the grid `times` (a time more than steps).

    Without `times` it is the grid of the schedule's shift. Raises RequestError for a grid of
    another length, or one that does not rise within [0, 1].
    """
    steps = len(schedule)
    grid = time_grid(steps, schedule.shift) if times is None else checked_grid(steps, times)
    calls: list[BlockCall] = []
    cached_at: float | None = None
    for index, letter in enumerate(schedule.steps):
        last = calls[-1] if calls else None
        step = _Step(index, grid[index], grid[index + 1], cached_at, variant, last)
        if letter in _PROLONGING:
            calls[-1] = _PROLONGING[letter](step)
            continue
        of_step, cached_at = _COMPILERS[letter](step)
        calls += of_step
    return Program(schedule, tuple(calls))


def time_grid(steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """`steps` + 1 times on [0, 1], uniform or shifted towards the noise.

    With the share of noise s = 1 - t, uniform in the steps, a grid shifted by a has
    a s / (1 + (a - 1) s) of it (Esser et al., arXiv 2403.03206, Eq. 23).
    """
    t = np.linspace(0.0, 1.0, steps + 1)
    return tuple(float(shifted) for shifted in t / (t + shift * (1 - t)))


def checked_grid(steps: int, times: Sequence[float]) -> tuple[float, ...]:
    """`times`, which must be `steps` + 1 that rise within [0, 1]; raises RequestError."""
    grid = np.asarray(times, dtype=np.float64)
    if grid.shape != (steps + 1,):
        raise RequestError(
            f"a schedule of {steps} steps needs {steps + 1} times, got shape {grid.shape}"
        )
    if not (np.all(np.isfinite(grid)) and np.all(np.diff(grid) > 0)):
        raise RequestError(f"times must be finite and rise strictly, got {grid.tolist()}")
    if grid[0] < 0 or grid[-1] > 1:
        raise RequestError(f"times must lie within [0, 1], got {grid[0]} to {grid[-1]}")
    return tuple(float(t) for t in grid)
