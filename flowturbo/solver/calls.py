"""Block calls: what a program asks of the networks, one row of coefficients each.

One block around the predictor serves every step that evaluates it, with other coefficients:

    x_in   = x + euler * v
    v_next = guide(predictor(x_in, t))
    x_next = x + w_prev * v + w_next * v_next

A refiner step is one call of the block around the refiner: its two evaluations need nothing in
between. The refiner regresses the change of the velocity. With h = end - t:

    d      = guide(refiner([x, v], t)) + v
    d_next = guide(refiner([x + h * d, v or d], end)) + d
    x_next = x + h/2 * (d + d_next),  v_next = d
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple


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
    evaluates. `v_at` is the time of the velocity cached before it, None at the start.
    """

    step: int
    t: float
    starts_at: float
    lands_at: float
    euler: float = 0.0
    w_prev: float = 0.0
    w_next: float = 0.0
    v_at: float | None = None
    network: ClassVar[Network] = Network.PREDICTOR

    @property
    def times(self) -> tuple[float, ...]:
        """When the network is evaluated."""
        return (self.t,)

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


BlockCall = PredictorCall | RefinerCall
