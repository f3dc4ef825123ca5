"""Block calls: what a program asks of the networks, one row of coefficients each.

One block around the predictor serves every step that evaluates it, with other coefficients:

    x_in   = x + euler * v
    v_next = guide(predictor(x_in, t))
    x_next = x + w_prev * v + w_next * v_next

`v` is the velocity of the call before. A call that uses more velocities gives the block other
inputs for the same result. With r and u, the sums of earlier velocities that the network's input
and the update take:

    x_in   = (x + r)
    x_next = (x + r) + (u - r) + w_next * v_next

A refiner step is one call of the block around the refiner: its two evaluations need nothing in
between. The refiner regresses the change of the velocity. The first evaluation refines that at t:

    d = guide(refiner([x, v], t)) + v

The second one reads the state at the end, with h = end - t:

    d_next = guide(refiner([x + h * d, v or d], end)) + d

The step is Heun's:

    x_next = x + h/2 * (d + d_next),  v_next = d
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple, TypeVar

from flowturbo.solver.operator import Operator

State = TypeVar("State")  # arrays [rows, C, h, w] of numpy or torch, or what stands for them


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


class PredictorScalars(NamedTuple):
    """The columns of `scalars` in the block around the predictor."""

    t: Any
    euler: Any
    w_prev: Any
    w_next: Any
    scale: Any


class RefinerScalars(NamedTuple):
    """The columns of `scalars` in the block around the refiner; `reads_refined` is 0 or 1."""

    t: Any
    end: Any
    scale: Any
    scale_end: Any
    reads_refined: Any


ScaleAt = Callable[[float], float]  # the guidance scale of an evaluation at time t


@dataclass(frozen=True)
class PredictorCall:
    """One evaluation of the predictor; times and coefficients are dimensionless, t in [0, 1].

    The call moves x from the time `starts_at` to the time `lands_at`; they are equal where it only
    evaluates. `reads` and `moves` are coefficients of the velocities of the calls before it, the
    newest last. `reads` make the state that the network reads, `moves` the update. `w_next` is that
    of its own velocity in the update. `operator` then adds what it makes of all of them. `v_at` is
    the time of the newest velocity before it, None at the start.
    """

    step: int
    t: float
    starts_at: float
    lands_at: float
    reads: tuple[float, ...] = ()
    moves: tuple[float, ...] = ()
    w_next: float = 0.0
    v_at: float | None = None
    operator: Operator | None = None
    network: ClassVar[Network] = Network.PREDICTOR

    @property
    def times(self) -> tuple[float, ...]:
        """When the network is evaluated."""
        return (self.t,)

    @property
    def history(self) -> int:
        """How many earlier velocities the call uses."""
        known = 0 if self.operator is None else self.operator.velocities - 1
        return max(len(self.reads), len(self.moves), known)

    @property
    def _summed(self) -> bool:
        return max(len(self.reads), len(self.moves)) > 1

    @property
    def euler(self) -> float:
        """The block's coefficient of its velocity input in what the network reads."""
        return 0.0 if self._summed else sum(self.reads)

    @property
    def w_prev(self) -> float:
        """The block's coefficient of its velocity input in the update."""
        return 1.0 if self._summed else sum(self.moves)

    def inputs(self, x: State, velocities: Sequence[State]) -> tuple[State, State]:
        """The block's state and velocity; `velocities` are those of earlier calls, newest last."""
        if not self._summed:
            return x, velocities[-1]
        read = _weighted(self.reads, velocities)
        moved = _weighted(self.moves, velocities)
        return x + read, moved - read

    def scalars(self, scale_at: ScaleAt) -> PredictorScalars:
        """A row of the block's `scalars` tensor."""
        return PredictorScalars(self.t, self.euler, self.w_prev, self.w_next, scale_at(self.t))


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

    history: ClassVar[int] = 1
    operator: ClassVar[None] = None

    def inputs(self, x: State, velocities: Sequence[State]) -> tuple[State, State]:
        """The block's state and velocity; `velocities` are those of earlier calls, newest last."""
        return x, velocities[-1]

    @property
    def starts_at(self) -> float:
        """The time from which the call moves x."""
        return self.t

    @property
    def lands_at(self) -> float:
        """The time to which the call moves x."""
        return self.end

    @property
    def times(self) -> tuple[float, ...]:
        """When the network is evaluated."""
        return self.t, self.end

    def scalars(self, scale_at: ScaleAt) -> RefinerScalars:
        """A row of the block's `scalars` tensor."""
        scales = scale_at(self.t), scale_at(self.end)
        return RefinerScalars(self.t, self.end, *scales, float(self.reads_refined))


def _weighted(weights: Sequence[float], velocities: Sequence[Any]) -> Any:
    """The sum of the last velocities, each with its weight; 0 without any."""
    used = [] if not weights else zip(weights, velocities[-len(weights) :], strict=True)
    return sum(weight * velocity for weight, velocity in used if weight)


BlockCall = PredictorCall | RefinerCall
