"""The solver steps: each is one function and one entry of STEPS.

Names, help texts, the rules of schedules and the table in docs/schedules.md come from there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from flowturbo.errors import RequestError
from flowturbo.solver.calls import BlockCall, PredictorCall, RefinerCall, Variant
from flowturbo.solver.exponential import dpm_solver, unipc
from flowturbo.solver.neural import listed_counts, neural_solver
from flowturbo.solver.table import Table


@dataclass(frozen=True)
class Stand:
    """Where one step of a schedule stands: from the time `start` to the time `end`.

    `calls` are all before it.
    """

    index: int
    start: float
    end: float
    variant: Variant
    calls: tuple[BlockCall, ...]

    @property
    def size(self) -> float:
        """The step's length: below 0 on a falling grid, from an image to noise."""
        return self.end - self.start

    @property
    def cached_at(self) -> float | None:
        """The time of the velocity evaluated last, None at the start."""
        return self.calls[-1].times[0] if self.calls else None

    def comes_after(self, time: float, at: float) -> bool:
        """Whether the grid reaches the time `at` after `time`."""
        return (at - time) * self.size > 0

    def evaluate(self) -> BlockCall:
        """The velocity at the start, moving nothing."""
        return PredictorCall(self.index, self.start, self.start, self.start, v_at=self.cached_at)

    def move(self, *weights: float) -> BlockCall:
        """The velocity at the start, and with it to the end.

        `weights` are of earlier velocities, the newest last, and then of this one.
        """
        at = self.start, self.start, self.end
        *moves, w_next = weights
        return PredictorCall(self.index, *at, (), tuple(moves), w_next, self.cached_at)

    def correct(self, v_at: float) -> BlockCall:
        """Trapezoidal rule, the end reached by an Euler step with the velocity of time `v_at`."""
        h = self.size
        at = self.end, self.start, self.end
        return PredictorCall(self.index, *at, (h,), (h / 2,), h / 2, v_at)


def _heun(step: Stand) -> list[BlockCall]:
    """Eq. 3: the velocity at both ends."""
    return [step.evaluate(), step.correct(step.start)]


def _pseudo_corrector(step: Stand) -> list[BlockCall]:
    """Eq. 9: as Heun, but the velocity at the start is the one cached by the step before."""
    if step.cached_at is None:
        return _heun(step)
    return [step.correct(step.cached_at)]


def _refiner(step: Stand) -> list[BlockCall]:
    """Eq. 7: as Heun, but both velocities come from the refiner; keeps the first."""
    reads_refined = step.variant is Variant.PAPER
    return [RefinerCall(step.index, step.start, step.end, reads_refined)]


def _euler(step: Stand) -> list[BlockCall]:
    """First order, for comparison."""
    return [step.move(step.size)]


def _midpoint(step: Stand) -> list[BlockCall]:
    """The velocity in the middle, reached with the cached one, and with it to the end.

    FireFlow's rule (arXiv 2412.07517): the pseudo corrector's idea for the midpoint method.
    """
    h, first = step.size, [] if step.cached_at is not None else [step.evaluate()]
    v_at = step.start if step.cached_at is None else step.cached_at
    middle = step.start + h / 2
    ends = step.start, step.end
    return [*first, PredictorCall(step.index, middle, *ends, (h / 2,), (), h, v_at)]


def _adams_bashforth(step: Stand) -> list[BlockCall]:
    """Second order from the cached velocity of an earlier time, variable steps; for comparison.

    Without an earlier velocity it is an Euler step. That is so at the start, and right after a step
    that caches the velocity of its end.
    """
    if step.cached_at is None or not step.comes_after(step.cached_at, step.start):
        return _euler(step)
    h = step.size
    extrapolated = h * h / (2 * (step.start - step.cached_at))
    return [step.move(-extrapolated, h + extrapolated)]


def _adams_bashforth_of(order: int) -> Callable[[Stand], list[BlockCall]]:
    """Of this order, on any grid: the polynomial through the velocities, integrated exactly.

    The velocities are the newest of different times. With fewer the order is lower.
    """

    def compile_step(step: Stand) -> list[BlockCall]:
        ages, times = [0], [step.start]
        for age, call in enumerate(reversed(step.calls), start=1):
            if len(times) < order and step.comes_after(call.times[0], times[-1]):
                ages.append(age)
                times.append(call.times[0])
        weights = np.zeros(ages[-1] + 1)
        weights[ages] = integral_weights(times, step.start, step.end)
        return [step.move(*weights[::-1].tolist())]

    return compile_step


def integral_weights(times: Sequence[float], start: float, end: float) -> np.ndarray:
    """Of values at `times`, for the integral of the polynomial through them, `start` to `end`."""
    nodes = (np.asarray(times) - start) / (end - start)
    powers = np.arange(len(nodes))
    weights: np.ndarray = np.linalg.solve(nodes[None] ** powers[:, None], 1 / (powers + 1))
    return weights * (end - start)


def _kept(step: Stand) -> PredictorCall:
    """The velocity last evaluated, v(t) = v: the call before it goes further."""
    call = step.calls[-1]
    assert isinstance(call, PredictorCall)  # as Schedule demands
    return replace(call, w_next=call.w_next + step.size, lands_at=step.end)


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
    *older, newest = call.moves or (0.0,)
    return replace(call, moves=(*older, newest - slope), w_next=call.w_next + slope)


def _not_fitted(steps: int) -> Table:
    raise RequestError(
        f"L{steps} is fitted to a pipeline, and none is given here: python -m tuning.fit fits it"
    )


@dataclass(frozen=True)
class StepKind:
    """A solver step: its name, what it does and costs, and how it becomes block calls.

    Exactly one of the functions is given. `compile` makes the calls of a step that evaluates a
    network. `prolong` makes the call before a step longer, for one that evaluates nothing. `whole`
    makes the table of a whole schedule from its time grid: such letters do not mix with others.
    `table` makes that of so many steps on a grid of its own.

    `needs_velocity`: the step cannot come first.
    """

    name: str
    does: str
    predictor: int = 0
    refiner: int = 0
    compile: Callable[[Stand], list[BlockCall]] | None = None
    prolong: Callable[[Stand], PredictorCall] | None = None
    whole: Callable[[Sequence[float]], Table] | None = None
    table: Callable[[int], Table] | None = None
    needs_velocity: bool = False

    @property
    def alone(self) -> bool:
        """Whether the letter mixes with no other."""
        return self.whole is not None or self.table is not None


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
    "B": StepKind(
        "Adams-Bashforth 3",
        "order 3 from two earlier velocities",
        predictor=1,
        compile=_adams_bashforth_of(3),
    ),
    "C": StepKind(
        "Adams-Bashforth 4",
        "order 4 from three earlier velocities",
        predictor=1,
        compile=_adams_bashforth_of(4),
    ),
    "D": StepKind(
        "DPM-Solver++(2M)",
        "order 2, extrapolates the predicted data",
        predictor=1,
        whole=partial(dpm_solver, highest=2),
    ),
    "G": StepKind(
        "DPM-Solver++(3M)",
        "order 3, extrapolates the predicted data",
        predictor=1,
        whole=partial(dpm_solver, highest=3),
    ),
    "U": StepKind(
        "UniPC of order 2",
        "predictor and corrector, order 2",
        predictor=1,
        whole=partial(unipc, highest=2),
    ),
    "V": StepKind(
        "UniPC of order 3",
        "predictor and corrector, order 3",
        predictor=1,
        whole=partial(unipc, highest=3),
    ),
    "N": StepKind(
        "NeuralSolver",
        f"coefficients found on SiT-XL/2, for {listed_counts()} evaluations",
        predictor=1,
        table=neural_solver,
    ),
    "L": StepKind(
        "learned",
        "coefficients fitted to the pipeline (tuning.fit)",
        predictor=1,
        table=_not_fitted,
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
