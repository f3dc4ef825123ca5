"""The time grid on which a multistep method errs least, from inner products of trajectories.

A step errs by the part of the state's change that no sum of the velocities so far can make. It
follows from the inner products of the trajectories' states and velocities, so a search calls no
network.
"""

from collections.abc import Sequence

import numpy as np

from flowturbo.solver.grid import time_grid
from tuning.trajectories import STATE_AT, VELOCITY_AT

_RIDGE = 1e-6
_STEPS = (0.3, 0.1, 0.03, 0.01)  # of the search, in parts of the gap between neighbours
_LEAST = 0.004  # of a time step
_SHIFTS = (2.0, 3.0, 4.0, 5.0)  # of the grids that the search starts from
# Later steps mend a part of what earlier ones missed: of 1, 1.5 and 2 this led to the nearest
# solvers on glyphs.
POWER = 1.5


def best_grid(evaluations: int, products: np.ndarray) -> tuple[float, ...]:
    """The grid of so many steps with the smallest error.

    `products` is tuning.trajectories.gram. From each of several shifted grids one time after the
    other is moved as long as the error falls.
    """
    found = [_searched(time_grid(evaluations, shift), products) for shift in _SHIFTS]
    return min(found, key=lambda times: error(times, products))


def _searched(start: Sequence[float], products: np.ndarray) -> tuple[float, ...]:
    times, best = list(start), error(start, products)
    for part in _STEPS:
        moved = True
        while moved:
            moved = False
            for k in range(1, len(times) - 1):
                for side in (-1, 1):
                    gap = times[k + side] - times[k]
                    tried = [*times]
                    tried[k] += part * gap
                    if min(np.diff(tried)) < _LEAST:
                        continue
                    found = error(tried, products)
                    if found < best * (1 - 1e-4):
                        times, best, moved = tried, found, True
    return tuple(times)


def error(times: Sequence[float], products: np.ndarray) -> float:
    """The sum over steps of what the velocities so far cannot make, its RMS to the power POWER."""
    states, velocities = STATE_AT(np.asarray(times)), VELOCITY_AT(np.asarray(times[:-1]))
    total = 0.0
    for k in range(len(times) - 1):
        change, seen = states[k + 1] - states[k], velocities[: k + 1]
        square = seen @ products @ seen.T
        square[np.diag_indices(k + 1)] *= 1 + _RIDGE
        right = seen @ products @ change
        left = change @ products @ change - right @ np.linalg.solve(square, right)
        total += max(left, 0.0) ** (POWER / 2)
    return total
