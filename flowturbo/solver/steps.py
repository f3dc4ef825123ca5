"""The solver steps: each is one function and one entry of STEPS.

Names, help texts, the rules of schedules and the table in docs/schedules.md come from there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from flowturbo.solver.calls import BlockCall, PredictorCall, RefinerCall, Variant


@dataclass(frozen=True)
class Stand:
    """Where one step of a schedule stands: from the time `start` to the time `end`.

    The cached velocity is for the time `cached_at`; `call` evaluated it. Both are None at first.
    """

    index: int
    start: float
    end: float
    cached_at: float | None
    variant: Variant
    call: BlockCall | None

    @property
    def size(self) -> float:
        """The step's length: below 0 on a falling grid, from an image to noise."""
        return self.end - self.start

    def comes_after(self, time: float, at: float) -> bool:
        """Whether the grid reaches the time `at` after `time`."""
        return (at - time) * self.size > 0

    def evaluate(self) -> BlockCall:
        """The velocity at the start, moving nothing."""
        return PredictorCall(self.index, self.start, self.start, self.start, v_at=self.cached_at)

    def move(self, w_prev: float, w_next: float) -> BlockCall:
        """The velocity at the start, and with it to the end."""
        at = self.start, self.start, self.end
        return PredictorCall(self.index, *at, 0.0, w_prev, w_next, self.cached_at)

    def correct(self, v_at: float) -> BlockCall:
        """Trapezoidal rule, the end reached by an Euler step with the velocity of time `v_at`."""
        h = self.size
        return PredictorCall(self.index, self.end, self.start, self.end, h, h / 2, h / 2, v_at)


_Calls = tuple[list[BlockCall], float]  # and the time that the velocity cached afterwards is for


def _heun(step: Stand) -> _Calls:
    """Eq. 3: the velocity at both ends."""
    return [step.evaluate(), step.correct(step.start)], step.end


def _pseudo_corrector(step: Stand) -> _Calls:
    """Eq. 9: as Heun, but the velocity at the start is the one cached by the step before."""
    if step.cached_at is None:
        return _heun(step)
    return [step.correct(step.cached_at)], step.end


def _refiner(step: Stand) -> _Calls:
    """Eq. 7: as Heun, but both velocities come from the refiner; keeps the first."""
    reads_refined = step.variant is Variant.PAPER
    return [RefinerCall(step.index, step.start, step.end, reads_refined)], step.start


def _euler(step: Stand) -> _Calls:
    """First order, for comparison."""
    return [step.move(0.0, step.size)], step.start


def _midpoint(step: Stand) -> _Calls:
    """The velocity in the middle, reached with the cached one, and with it to the end.

    FireFlow's rule (arXiv 2412.07517): the pseudo corrector's idea for the midpoint method.
    """
    h, first = step.size, [] if step.cached_at is not None else [step.evaluate()]
    v_at = step.start if step.cached_at is None else step.cached_at
    middle = step.start + h / 2
    ends = step.start, step.end
    return [*first, PredictorCall(step.index, middle, *ends, h / 2, 0.0, h, v_at)], middle


def _adams_bashforth(step: Stand) -> _Calls:
    """Second order from the cached velocity of an earlier time, variable steps; for comparison.

    Without an earlier velocity it is an Euler step. That is so at the start, and right after a step
    that caches the velocity of its end.
    """
    if step.cached_at is None or not step.comes_after(step.cached_at, step.start):
        return _euler(step)
    h = step.size
    extrapolated = h * h / (2 * (step.start - step.cached_at))
    return [step.move(-extrapolated, h + extrapolated)], step.start


def _kept(step: Stand) -> PredictorCall:
    """The velocity last evaluated, v(t) = v: the call before it goes further."""
    assert isinstance(step.call, PredictorCall)  # as Schedule demands
    w_next = step.call.w_next + step.size
    return replace(step.call, w_next=w_next, lands_at=step.end)


def _extrapolated(step: Stand) -> PredictorCall:
    """v(t) on the line through the last two evaluated, integrated exactly over the step.

    TaylorSeer (arXiv 2503.06923) of order 1, on the network's output. With no earlier velocity, as
    for Adams-Bashforth, the last is kept.
    """
    call = _kept(step)
    if call.v_at is None or not step.comes_after(call.v_at, call.t):
        return call
    ahead = (step.start + step.end) / 2 - call.t
    slope = step.size * ahead / (call.t - call.v_at)
    return replace(call, w_prev=call.w_prev - slope, w_next=call.w_next + slope)


@dataclass(frozen=True)
class StepKind:
    """A solver step: its name, what it does and costs, and how it becomes block calls.

    `compile` makes the calls of a step that evaluates a network, and says for which time the
    velocity is that is cached afterwards. `prolong` makes the call before a step longer, for one
    that evaluates nothing. Exactly one of both is given. `needs_velocity`: it cannot come first.
    """

    name: str
    does: str
    predictor: int = 0
    refiner: int = 0
    compile: Callable[[Stand], _Calls] | None = None
    prolong: Callable[[Stand], PredictorCall] | None = None
    needs_velocity: bool = False


STEPS = {
    "H": StepKind("Heun", "velocity at both ends, order 2 (Eq. 3)", predictor=2, compile=_heun),
    "P": StepKind(
        "pseudo corrector",
        "as H, with the cached velocity at the start, order 2 (Eq. 9)",
        predictor=1,
        compile=_pseudo_corrector,
    ),
    "R": StepKind(
        "refiner",
        "as H, with velocities that the refiner corrects (Eq. 7)",
        refiner=2,
        compile=_refiner,
        needs_velocity=True,
    ),
    "E": StepKind("Euler", "order 1, for comparison", predictor=1, compile=_euler),
    "A": StepKind(
        "Adams-Bashforth 2",
        "order 2 from the cached velocity of an earlier time",
        predictor=1,
        compile=_adams_bashforth,
    ),
    "M": StepKind(
        "midpoint",
        "velocity in the middle, reached with the cached one, order 2",
        predictor=1,
        compile=_midpoint,
    ),
    "Z": StepKind("velocity kept", "reuses the last velocity", prolong=_kept, needs_velocity=True),
    "T": StepKind(
        "velocity extrapolated",
        "extrapolates the last two velocities (TaylorSeer, order 1)",
        prolong=_extrapolated,
        needs_velocity=True,
    ),
}


def letters(of: Callable[[StepKind], bool]) -> list[str]:
    """The letters of the kinds for which `of` holds."""
    return [letter for letter, kind in STEPS.items() if of(kind)]


def steps_table() -> str:
    """The table of all steps, for docs/schedules.md."""
    rows = [
        f"| `{letter}` | {kind.name} | {kind.does} | {kind.predictor} | {kind.refiner} |"
        for letter, kind in STEPS.items()
    ]
    head = "| letter | step | what it does | predictor evaluations | refiner evaluations |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])
