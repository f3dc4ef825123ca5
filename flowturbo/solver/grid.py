"""Time grids: from noise at 0 to data at 1."""

from collections.abc import Sequence

import numpy as np

from flowturbo.errors import RequestError


def time_grid(steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """`steps` + 1 times on [0, 1], uniform or shifted towards the noise.

    The uniform grid has the share of noise s = 1 - t. The grid shifted by a has the share
    a s / (1 + (a - 1) s) (Esser et al., arXiv 2403.03206, Eq. 23).
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
    if not np.all(np.isfinite(grid)):
        raise RequestError(f"times must be finite, got {grid[~np.isfinite(grid)][0]}")
    if not np.all(rises := np.diff(grid) > 0):
        low, high = grid[rises.argmin() :][:2]
        raise RequestError(f"times must rise strictly, got {low} and then {high}")
    if grid[0] < 0 or grid[-1] > 1:
        raise RequestError(f"times must lie within [0, 1], got {grid[0]} to {grid[-1]}")
    return tuple(float(t) for t in grid)
