"""Fits the coefficients of a solver, step after step, on the states that it reaches itself.

A step moves the state by a sum of all velocities so far, plus what a linear operator makes of the
state and the velocities around each pixel. Both are least squares. The target is the change from
the solver's own state to the exact trajectory at the end of the step: so later steps mend what
earlier ones missed. A fit to exact states alone is much worse.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flowturbo.solver.operator import features, from_squares, to_squares
from flowturbo.solver.sampler import Array
from flowturbo.solvers import scale_terms
from tuning.trajectories import Trajectories, Velocity

_RIDGE = 1e-6  # of the sums of velocities, in parts of their squares
_OPERATOR_RIDGE = 1e-3  # of the operator, whose features are scaled to 1
_SOFT = 0.3  # of the mean distance: trajectories nearer than that count alike
_CHUNK = 64  # trajectories whose windows are in memory at once


@dataclass
class Walk:
    """One batch on its way: its exact trajectories, the solver's state and velocities so far."""

    exact: Trajectories
    velocity: Velocity
    x: Array
    seen: list[Array]

    @classmethod
    def start(cls, exact: Trajectories, velocity: Velocity) -> "Walk":
        """At the noise."""
        return cls(exact, velocity, exact.x[0].astype(np.float32), [])


@dataclass(frozen=True)
class Step:
    """What was fitted for one step: `weights` [k, velocities], `matrix` [k, features, outputs]."""

    weights: Array
    matrix: Array | None


def fit_steps(
    times: Sequence[float],
    scales: tuple[float, float],
    side: int,
    fitted: Sequence[Walk],
    others: Sequence[Walk] = (),
    progress: Callable[[int], object] = lambda count: None,
) -> Iterator[Step]:
    """The steps on the grid `times`; `side` 0 is without operators.

    All walks are moved, `others` too. `progress` is called with the trajectories that were
    evaluated.
    """
    for t, end in zip(times[:-1], times[1:], strict=True):
        for walk in (*fitted, *others):
            walk.seen.append(walk.velocity(walk.x, t))
            progress(len(walk.exact))
        targets = [walk.exact.state(end) for walk in fitted]
        counts = [np.ones(len(walk.exact)) for walk in fitted]
        step = _fit(fitted, targets, counts, scales, side)
        # A second time, with less weight on trajectories that are far off: the mean distance is to
        # be small, not the mean of its square.
        off = [
            _rms(target - walk.x - _moved(walk, step, scales, side))
            for walk, target in zip(fitted, targets, strict=True)
        ]
        mean = float(np.concatenate(off).mean())
        counts = [1 / (each + _SOFT * mean) for each in off]
        step = _fit(fitted, targets, counts, scales, side)
        for walk in (*fitted, *others):
            walk.x = walk.x + _moved(walk, step, scales, side)
        yield step


def _fit(
    walks: Sequence[Walk],
    targets: Sequence[Array],
    counts: Sequence[Array],
    scales: tuple[float, float],
    side: int,
) -> Step:
    """Weights, and then the operator for what they leave; `counts` weigh trajectories."""
    square: Array | float = 0.0
    right: Array | float = 0.0
    for walk, target, count in zip(walks, targets, counts, strict=True):
        terms = _terms(walk, scales)
        seen = np.stack(walk.seen).reshape(len(walk.seen), len(count), -1)
        change = (target - walk.x).reshape(len(count), -1)
        inner = np.einsum("inp,jnp,n->ij", seen, seen, count, optimize=True)
        square = square + np.kron(np.outer(terms, terms), inner)
        right = right + np.kron(terms, np.einsum("inp,np,n->i", seen, change, count, optimize=True))
    square = np.asarray(square)
    square[np.diag_indices(len(square))] *= 1 + _RIDGE
    weights = np.linalg.solve(square, right).reshape(-1, len(walks[0].seen))
    step = Step(weights, None)
    return Step(weights, _operator(walks, targets, counts, step, scales, side)) if side else step


def _operator(
    walks: Sequence[Walk],
    targets: Sequence[Array],
    counts: Sequence[Array],
    step: Step,
    scales: tuple[float, float],
    side: int,
) -> Array:
    square: Array | float = 0.0
    right: Array | float = 0.0
    for walk, target, count in zip(walks, targets, counts, strict=True):
        left = target - walk.x - _moved(walk, step, scales, side)
        terms = _terms(walk, scales)
        for part in _parts(len(count)):
            windows = _windows(walk, side, part)
            heavy = windows * np.repeat(count[part], len(windows) // len(count[part]))[:, None]
            inner = (heavy.T @ windows).astype(np.float64)
            outer = (heavy.T @ to_squares(left[part], _square(side))).astype(np.float64)
            square = square + np.kron(np.outer(terms, terms), inner)
            right = right + np.kron(terms[:, None], outer)
    square, right = np.asarray(square), np.asarray(right)
    size = np.sqrt(np.maximum(square.diagonal(), 1e-30))
    scaled = square / size / size[:, None]
    scaled[np.diag_indices(len(scaled))] += _OPERATOR_RIDGE
    found = np.linalg.solve(scaled, right / size[:, None]) / size[:, None]
    return found.reshape(len(step.weights), -1, right.shape[1])


def _moved(walk: Walk, step: Step, scales: tuple[float, float], side: int) -> Array:
    """The change of the state of `walk` by a step, [n, C, h, w] float32."""
    terms = _terms(walk, scales)
    change = np.tensordot((terms @ step.weights).astype(np.float32), np.stack(walk.seen), 1)
    if step.matrix is None:
        return np.asarray(change)
    matrix = np.tensordot(terms, step.matrix, 1).astype(np.float32)
    for part in _parts(len(change)):
        made = _windows(walk, side, part) @ matrix
        change[part] += from_squares(made, change[part].shape, _square(side))
    return np.asarray(change)


def _windows(walk: Walk, side: int, part: slice) -> Array:
    """The features of the operator, and 1, [n * squares, features]."""
    found = features([walk.x[part], *(v[part] for v in walk.seen)], side)
    return np.concatenate([found, np.ones((len(found), 1), found.dtype)], 1)


def _parts(count: int) -> list[slice]:
    return [slice(k, min(k + _CHUNK, count)) for k in range(0, count, _CHUNK)]


def _square(side: int) -> int:
    return 1 if side == 1 else 2


def _terms(walk: Walk, scales: tuple[float, float]) -> Array:
    return scale_terms(np.array([walk.exact.scale]), *scales)[0]


def _rms(values: Array) -> Array:
    """Of each trajectory, [n]."""
    return np.sqrt(np.square(values).mean(tuple(range(1, values.ndim))))
