"""Baselines for comparison: samplers over a given velocity function.

`velocity(x, t)` is dx/dt at time t, with x [n, C, h, w] float32 and t from noise at 0 to data at 1.
A command line names a baseline as

    dopri5     Dormand-Prince 5(4) at SiT's tolerances; `dopri5:1e-2` sets the relative one

Solvers with fixed steps are letters of a schedule (flowturbo.solver.schedule).
"""

from __future__ import annotations

from collections.abc import Callable

from scipy.integrate import solve_ivp

from flowturbo.errors import RequestError
from flowturbo.solver.sampler import Array

Velocity = Callable[[Array, float], Array]
Sampler = Callable[[Velocity, Array], Array]  # noise at t = 0 to data at t = 1

SIT_RTOL, SIT_ATOL = 1e-3, 1e-6  # of SiT's own dopri5, as in the paper's Table 1
MAX_EVALUATIONS = 2000  # of dopri5, which needs 100 to 200 in float32 at any useful tolerance
HELP = "a baseline is dopri5 or dopri5:RTOL"


def parse(text: str) -> Sampler:
    """The baseline that `text` names; raises RequestError with the allowed forms."""
    name, _, argument = text.partition(":")
    if name != "dopri5":
        raise RequestError(f"baseline {text!r} cannot be read: {HELP}")
    try:
        return dopri5(float(argument or SIT_RTOL))
    except ValueError as error:
        raise RequestError(f"baseline {text!r} cannot be read ({error}): {HELP}") from None


def is_baseline(text: str) -> bool:
    """Whether `text` begins with a baseline's name; the rest may be invalid."""
    return text.partition(":")[0] == "dopri5"


class Counted:
    """A velocity that counts its evaluations."""

    def __init__(self, velocity: Velocity) -> None:
        self._velocity = velocity
        self.evaluations = 0

    def __call__(self, x: Array, t: float) -> Array:
        """The velocity at `t`."""
        self.evaluations += 1
        return self._velocity(x, t)


def dopri5(rtol: float = SIT_RTOL, atol: float = SIT_ATOL) -> Sampler:
    """Adaptive steps, shared by the images of a batch; the error is the RMS over the batch.

    In low precision it takes the rounding of the networks for error and shortens its steps in vain.
    Raises ValueError for a tolerance that is not above 0. The sampler raises RequestError if it
    needs more than MAX_EVALUATIONS.
    """
    if not rtol > 0 or not atol > 0:
        raise ValueError(f"tolerances must be above 0, got {rtol:g} and {atol:g}")

    def sample(velocity: Velocity, noise: Array) -> Array:
        counted = Counted(velocity)

        def flat(t: float, x: Array) -> Array:
            if counted.evaluations == MAX_EVALUATIONS:
                raise RequestError(
                    f"dopri5 at rtol {rtol:g} is at t = {t:.3f} after {MAX_EVALUATIONS} "
                    "evaluations, the maximum: use a larger rtol, such as dopri5:1e-2 for bf16"
                )
            return counted(x.reshape(noise.shape).astype(noise.dtype), t).ravel()

        found = solve_ivp(flat, (0.0, 1.0), noise.ravel(), "RK45", rtol=rtol, atol=atol)
        if not found.success:
            raise RequestError(f"dopri5 at rtol {rtol:g}: {found.message}")
        return found.y[:, -1].reshape(noise.shape).astype(noise.dtype)

    return sample
