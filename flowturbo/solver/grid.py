"""Time grids: from noise at 0 to data at 1."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowturbo.errors import RequestError


def time_grid(steps: int, shift: float | None = None, strength: float = 1.0) -> tuple[float, ...]:
    """`steps` + 1 times that end at 1, uniform (None) or shifted towards the noise.

    The uniform grid has the share of noise s = 1 - t, from `strength` to 0. The grid shifted by a
    has the share a s / (1 + (a - 1) s) (Esser et al., arXiv 2403.03206, Eq. 23).
    """
    t, shift = np.linspace(1.0 - strength, 1.0, steps + 1), shift or 1.0
    return tuple(float(shifted) for shifted in t / (t + shift * (1 - t)))


def unshifted(share: float, shift: float) -> float:
    """The share of noise on the uniform grid where the grid shifted by `shift` has `share`."""
    return share / (shift - (shift - 1) * share)


@dataclass(frozen=True)
class GridRule:
    """The time grid of a pipeline's own: a shift, or a rule for it by image tokens and steps.

    diffusers states such rules for mu, the logarithm of our shift. `linear` is (tokens, mu, tokens,
    mu): mu on the line through both points. `flux2` is the formula of FLUX.2.
    """

    shift: float = 1.0
    linear: tuple[float, float, float, float] | None = None
    flux2: bool = False

    @property
    def is_fixed(self) -> bool:
        """Whether the shift is the same for all sizes and numbers of steps."""
        return self.linear is None and not self.flux2

    def shift_for(self, tokens: int, steps: int) -> float:
        """The shift for images of so many tokens and so many steps."""
        if self.linear:
            low, mu_low, high, mu_high = self.linear
            return math.exp(mu_low + (mu_high - mu_low) * (tokens - low) / (high - low))
        return math.exp(_flux2_mu(tokens, steps)) if self.flux2 else self.shift


def _flux2_mu(tokens: int, steps: int) -> float:
    """FLUX.2's fit of mu (diffusers 0.42, `compute_empirical_mu`)."""
    many = 0.00016927 * tokens + 0.45666666  # at 200 steps
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333  # at 10 steps
    slope = (many - few) / 190
    return slope * steps + many - 200 * slope


def checked_grid(steps: int, times: Sequence[float], *, falling: bool = False) -> tuple[float, ...]:
    """`times`, which must be `steps` + 1 that rise within [0, 1]; raises RequestError.

    With `falling` they must fall: from an image to noise.
    """
    grid = np.asarray(times, dtype=np.float64)
    if grid.shape != (steps + 1,):
        raise RequestError(
            f"a schedule of {steps} steps needs {steps + 1} times, got shape {grid.shape}"
        )
    if not np.all(np.isfinite(grid)):
        raise RequestError(f"times must be finite, got {grid[~np.isfinite(grid)][0]}")
    steady = np.diff(grid) < 0 if falling else np.diff(grid) > 0
    if not np.all(steady):
        one, after = grid[steady.argmin() :][:2]
        word = "fall" if falling else "rise"
        raise RequestError(f"times must {word} strictly, got {one} and then {after}")
    if grid.min() < 0 or grid.max() > 1:
        raise RequestError(f"times must lie within [0, 1], got {grid[0]} to {grid[-1]}")
    return tuple(float(t) for t in grid)
