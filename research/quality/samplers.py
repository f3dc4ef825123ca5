"""Baselines for comparison: samplers over a given velocity function.

`velocity(x, t)` is dx/dt at time t, with x [n, C, h, w] float32 and t from noise at 0 to data at 1.
A command line names a baseline as

    unipc:8    UniPC of order 2 with its corrector (arXiv 2302.04867), 8 evaluations
    dpm:8      DPM-Solver++(2M) (arXiv 2211.01095), 8 evaluations
    dopri5     Dormand-Prince 5(4) at SiT's tolerances; `dopri5:1e-2` sets the relative one

Names other than dopri5 may end with the shift of the time grid, like a schedule: unipc:8@2. Solvers
whose steps are coefficients of a step block are letters of a schedule (flowturbo.solver.schedule).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from scipy.integrate import solve_ivp

from flowturbo.errors import RequestError
from flowturbo.solver.grid import time_grid
from flowturbo.solver.sampler import Array
from flowturbo.solver.schedule import read_shift

Velocity = Callable[[Array, float], Array]
Sampler = Callable[[Velocity, Array], Array]  # noise at t = 0 to data at t = 1

SIT_RTOL, SIT_ATOL = 1e-3, 1e-6  # of SiT's own dopri5, as in the paper's Table 1
MAX_EVALUATIONS = 2000  # of dopri5, which needs 100 to 200 in float32 at any useful tolerance
_FIRST_SIGMA = 1 - 1e-6  # at sigma 1 the solvers' log signal-to-noise ratio is infinite
HELP = (
    "a baseline is unipc:STEPS, dpm:STEPS, dopri5 or dopri5:RTOL; unipc and dpm may end with a "
    "shift, such as unipc:8@2"
)


def parse(text: str) -> Sampler:
    """The baseline that `text` names; raises RequestError with the allowed forms."""
    plain, shift = read_shift(text)
    shift = shift or 1.0
    name, _, argument = plain.partition(":")
    try:
        if name == "dopri5" and plain == text:
            return dopri5(float(argument or SIT_RTOL))
        if name in _SCHEDULERS:
            return _scheduled(name, int(argument), shift)
    except ValueError as error:
        raise RequestError(f"baseline {text!r} cannot be read ({error}): {HELP}") from None
    raise RequestError(f"baseline {text!r} cannot be read: {HELP}")


def is_baseline(text: str) -> bool:
    """Whether `text` begins with a baseline's name; the rest may be invalid."""
    name = text.partition("@")[0].partition(":")[0]
    return name == "dopri5" or name in _SCHEDULERS


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


def _unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


def _dpm() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


_SCHEDULERS = {"unipc": _unipc, "dpm": _dpm}


def _scheduled(name: str, steps: int, shift: float) -> Sampler:
    """A diffusers scheduler on the same grid: its sigma is 1 - t and its output is -v."""
    if not 2 <= steps <= 1000:
        raise ValueError(f"steps must be 2 to 1000, got {steps}")

    def sample(velocity: Velocity, noise: Array) -> Array:
        scheduler = _SCHEDULERS[name]()
        scheduler.set_timesteps(steps)
        # Its own grid is off by 0.001 at one end. It reads times only from `sigmas`.
        grid = time_grid(steps, shift)
        scheduler.sigmas = (1 - torch.tensor(grid)).float().clamp(max=_FIRST_SIGMA)
        scheduler.set_begin_index(0)
        x = torch.from_numpy(noise)
        for t, step in zip(grid, scheduler.timesteps, strict=False):
            v = torch.from_numpy(velocity(x.numpy(), t))
            x = scheduler.step(-v, step, x).prev_sample
        return x.numpy()

    return sample
