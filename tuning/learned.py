"""Fits the coefficients of a solver, step after step, on the states that it reaches itself.

A step moves the state by a sum of all velocities so far. A linear operator adds what it makes of
the state and the velocities around each pixel. Both are least squares. The target is the change
from the solver's own state to the exact trajectory at the end of the step. So later steps mend what
earlier ones missed. A fit to exact states alone is much worse.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flowturbo.solver.operator import features, from_squares, outputs, to_squares
from flowturbo.solver.sampler import Array
from flowturbo.solvers import scale_terms
from research.quality.engine import distances
from tuning.trajectories import Trajectories, Velocity

_RIDGE = 1e-6  # of the sums of velocities, in parts of their squares
_OPERATOR_RIDGE = 1e-4  # of the operator, whose features are scaled to 1
_SOFT = 0.3  # of the mean distance: trajectories nearer than that count alike
_GRID_STEPS = (0.2, 0.1)  # of the search, in parts of the gap between neighbours
_GAIN = 1e-3  # what a moved time must gain to stay, in parts of the distance
_CHUNK = 64  # trajectories whose windows are in memory at once


@dataclass(frozen=True)
class Rollout:
    """One batch on its way: its exact trajectories, the solver's state and velocities so far."""

    exact: Trajectories
    velocity: Velocity
    x: Array
    velocities: tuple[Array, ...] = ()

    def __len__(self) -> int:
        return len(self.exact)

    @classmethod
    def start(cls, exact: Trajectories, velocity: Velocity) -> "Rollout":
        """At the noise."""
        return cls(exact, velocity, exact.x[0].astype(np.float32))

    def evaluate(self, t: float) -> "Rollout":
        """With the velocity at its state, too."""
        return replace(self, velocities=(*self.velocities, self.velocity(self.x, t)))

    @property
    def distances(self) -> Array:
        """From the ends of the exact trajectories, [n]."""
        return distances(self.x, self.exact.state(1.0))


@dataclass(frozen=True)
class Step:
    """What was fitted for one step: `weights` [k, velocities], `matrix` [k, features, outputs].

    With a `refiner` [units, outputs] the matrix has a column more for each unit.
    """

    weights: Array
    matrix: Array | None
    refiner: Array | None = None


@dataclass(frozen=True)
class Task:
    """For which guidance `scales`, and with windows of which `side`; 0 is without an operator.

    The last steps have a refiner of so many `units`.
    """

    scales: tuple[float, float]
    side: int
    units: int = 0

    def fit(self, rollouts: Sequence[Rollout], end: float) -> Step:
        """The best step of `rollouts` to the time `end`; all know their velocity."""
        targets = [rollout.exact.state(end) for rollout in rollouts]
        counts = [np.ones(len(rollout)) for rollout in rollouts]
        step = _fit(rollouts, targets, counts, self)
        # A second time, with less weight on trajectories that are far off: the mean distance is to
        # be small, not the mean of its square.
        off = [
            distances(target, self.moved(rollout, step).x)
            for rollout, target in zip(rollouts, targets, strict=True)
        ]
        return _fit(rollouts, targets, counts_of(off), self)

    def moved(self, rollout: Rollout, step: Step) -> Rollout:
        """`rollout` after the step."""
        return replace(rollout, x=rollout.x + _moved(rollout, step, self))


def refined_grid(
    times: Sequence[float],
    rollouts: Sequence[Rollout],
    scales: tuple[float, float],
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[float, ...]:
    """`times`, moved one after the other as long as the solver without operators comes nearer.

    `rollouts` are at the noise. What a moved time does not change is not evaluated again, and
    `progress` is called with the trajectories that were evaluated.
    """
    task = Task(scales, 0)

    def path(stages: list[list[Rollout]], times: Sequence[float]) -> list[list[Rollout]]:
        """The rollouts at each time, at the last without a velocity; `stages` are kept."""
        stages = [*stages]
        for k in range(len(stages) - 1, len(times) - 1):
            step = task.fit(stages[-1], times[k + 1])
            moved = [task.moved(rollout, step) for rollout in stages[-1]]
            if k + 2 < len(times):
                moved = [rollout.evaluate(times[k + 1]) for rollout in moved]
                progress(sum(map(len, moved)))
            stages.append(moved)
        return stages

    def error(stages: list[list[Rollout]]) -> float:
        return float(np.concatenate([rollout.distances for rollout in stages[-1]]).mean())

    stages = path([[rollout.evaluate(times[0]) for rollout in rollouts]], times)
    best, found = error(stages), list(times)
    for part in _GRID_STEPS:
        for k in range(1, len(found) - 1):
            for side in (-1, 1):
                while True:
                    tried = [*found]
                    tried[k] += part * (found[k + side] - found[k])
                    other = path(stages[:k], tried)
                    if (apart := error(other)) > best * (1 - _GAIN):
                        break
                    found, stages, best = tried, other, apart
    return tuple(found)


def _fit(
    rollouts: Sequence[Rollout],
    targets: Sequence[Array],
    counts: Sequence[Array],
    task: Task,
) -> Step:
    """Weights, and then the operator for what they leave; `counts` weigh trajectories."""
    square: Array | float = 0.0
    right: Array | float = 0.0
    for rollout, target, count in zip(rollouts, targets, counts, strict=True):
        terms = terms_of(rollout, task)
        velocities = np.stack(rollout.velocities).reshape(len(rollout.velocities), len(count), -1)
        change = (target - rollout.x).reshape(len(count), -1)
        inner = np.einsum("inp,jnp,n->ij", velocities, velocities, count, optimize=True)
        square = square + np.kron(np.outer(terms, terms), inner)
        right = right + np.kron(
            terms, np.einsum("inp,np,n->i", velocities, change, count, optimize=True)
        )
    square = np.asarray(square)
    square[np.diag_indices(len(square))] *= 1 + _RIDGE
    weights = np.linalg.solve(square, right).reshape(-1, len(rollouts[0].velocities))
    step = Step(weights, None)
    return Step(weights, _operator(rollouts, targets, counts, step, task)) if task.side else step


def _operator(
    rollouts: Sequence[Rollout],
    targets: Sequence[Array],
    counts: Sequence[Array],
    step: Step,
    task: Task,
) -> Array:
    square: Array | float = 0.0
    right: Array | float = 0.0
    for rollout, target, count in zip(rollouts, targets, counts, strict=True):
        left = target - rollout.x - _moved(rollout, step, task)
        terms = terms_of(rollout, task)
        for part in parts(len(count)):
            windows = windows_of(rollout, task.side, part)
            heavy = windows * np.repeat(count[part], len(windows) // len(count[part]))[:, None]
            inner = (heavy.T @ windows).astype(np.float64)
            outer = (heavy.T @ to_squares(left[part], square_of(task.side))).astype(np.float64)
            square = square + np.kron(np.outer(terms, terms), inner)
            right = right + np.kron(terms[:, None], outer)
    square, right = np.asarray(square), np.asarray(right)
    size = np.sqrt(np.maximum(square.diagonal(), 1e-30))
    scaled = square / size / size[:, None]
    scaled[np.diag_indices(len(scaled))] += _OPERATOR_RIDGE
    found = np.linalg.solve(scaled, right / size[:, None]) / size[:, None]
    return rounded(found.reshape(len(step.weights), -1, right.shape[1]))


def rounded(values: Array) -> Array:
    """To float16, as files of solvers keep matrices: later steps mend that too."""
    return values.astype(np.float16).astype(np.float32)


def _moved(rollout: Rollout, step: Step, task: Task) -> Array:
    """The change of the state of `rollout` by a step, [n, C, h, w] float32."""
    terms = terms_of(rollout, task)
    change = np.tensordot(
        (terms @ step.weights).astype(np.float32), np.stack(rollout.velocities), 1
    )
    if step.matrix is None:
        return np.asarray(change)
    matrix = np.tensordot(terms, step.matrix, 1).astype(np.float32)
    for part in parts(len(change)):
        made = outputs(windows_of(rollout, task.side, part) @ matrix, step.refiner)
        change[part] += from_squares(made, change[part].shape, square_of(task.side))
    return np.asarray(change)


def windows_of(rollout: Rollout, side: int, part: slice) -> Array:
    """The features of the operator, and 1, [n * squares, features]."""
    found = features([rollout.x[part], *(v[part] for v in rollout.velocities)], side)
    return np.concatenate([found, np.ones((len(found), 1), found.dtype)], 1)


def counts_of(off: Sequence[Array]) -> list[Array]:
    """How much trajectories count whose distances to the target are `off`: nearer ones more."""
    mean = float(np.concatenate(off).mean())
    return [1 / (each + _SOFT * mean) for each in off]


def parts(count: int) -> list[slice]:
    """`count` trajectories, so many at once that their windows fit in memory."""
    return [slice(k, min(k + _CHUNK, count)) for k in range(0, count, _CHUNK)]


def square_of(side: int) -> int:
    """The side of the square of pixels that windows of `side` belong to."""
    return 1 if side == 1 else 2


def terms_of(rollout: Rollout, task: Task) -> Array:
    """The factors [k] of coefficients at the guidance scale of `rollout`."""
    return scale_terms(np.array([rollout.exact.scale]), *task.scales)[0]
