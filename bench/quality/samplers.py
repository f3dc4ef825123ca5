"""What FlowTurbo is compared with: samplers over an injected velocity function.

`velocity(x, t)` is dx/dt at time t, with x [n, C, h, w] float32 and t from noise at 0 to data at 1.
They are written on a command line as

    H1P5T3     Heun and pseudo-corrector steps, then the velocity extrapolated along the line
               through the last two evaluated (TaylorSeer, arXiv 2503.06923, of order 1, on the
               network's output)
    H1P5Z3     the same with the last evaluated velocity kept as it is
    unipc:8    UniPC of order 2 with its corrector (arXiv 2302.04867), 8 evaluations
    dpm:8      DPM-Solver++(2M) (arXiv 2211.01095), 8 evaluations
    dopri5     Dormand-Prince 5(4) at SiT's tolerances; `dopri5:1e-5` sets the relative one

T and Z steps evaluate no network at all: they stand where a schedule has R. All but dopri5 may end
with the shift of their time grid, as a schedule may: H1P5T3@2, unipc:8@2.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from scipy.integrate import solve_ivp

from flowturbo.errors import RequestError
from flowturbo.program import time_grid
from flowturbo.sampler import Array
from flowturbo.schedule import read_shift

Velocity = Callable[[Array, float], Array]
Sampler = Callable[[Velocity, Array], Array]  # noise at t = 0 to data at t = 1
Known = tuple[
    tuple[float, Array], ...
]  # the last evaluated velocities, (time, velocity), two at most

_NOTHING: Known = ()
SIT_RTOL, SIT_ATOL = 1e-3, 1e-6  # of SiT's own dopri5, as in the paper's Table 1
_RUN = re.compile(r"([HPTZ])([0-9]{0,3})")
_FIRST_SIGMA = 1 - 1e-6  # at sigma 1 the solvers' log signal-to-noise ratio is infinite
_HELP = (
    "a baseline is unipc:STEPS, dpm:STEPS, dopri5, dopri5:RTOL, or H and P, then T or Z, as "
    "H1P5T3; all but dopri5 may end with a shift, as unipc:8@2"
)


def parse(text: str) -> Sampler:
    """The baseline written `text`; raises RequestError with what is allowed."""
    plain, shift = read_shift(text)
    name, _, argument = plain.partition(":")
    try:
        if name == "dopri5" and plain == text:
            return dopri5(float(argument or SIT_RTOL))
        if name in _SCHEDULERS:
            return _scheduled(name, int(argument), shift)
    except ValueError as error:
        raise RequestError(f"baseline {text!r} cannot be read ({error}): {_HELP}") from None
    if not plain or re.sub(_RUN, "", plain):
        raise RequestError(f"baseline {text!r} cannot be read: {_HELP}")
    steps = "".join(letter * int(count or 1) for letter, count in _RUN.findall(plain))
    if steps[:1] not in ("H", "P"):
        raise RequestError(f"baseline {text!r} has no velocity to go on with: {_HELP}")
    return _stepwise(steps, shift)


class Counted:
    """A velocity that counts how often it is evaluated."""

    def __init__(self, velocity: Velocity) -> None:
        self._velocity = velocity
        self.evaluations = 0

    def __call__(self, x: Array, t: float) -> Array:
        """The velocity at `t`."""
        self.evaluations += 1
        return self._velocity(x, t)


def dopri5(rtol: float = SIT_RTOL, atol: float = SIT_ATOL) -> Sampler:
    """Adaptive steps; the images of a batch share them, and the error is its root mean square.

    Raises ValueError for a tolerance that is not above 0.
    """
    if not rtol > 0 or not atol > 0:
        raise ValueError(f"tolerances must be above 0, got {rtol:g} and {atol:g}")

    def sample(velocity: Velocity, noise: Array) -> Array:
        def flat(t: float, x: Array) -> Array:
            return velocity(x.reshape(noise.shape).astype(noise.dtype), t).ravel()

        found = solve_ivp(flat, (0.0, 1.0), noise.ravel(), "RK45", rtol=rtol, atol=atol)
        if not found.success:
            raise ArithmeticError(f"dopri5 at rtol {rtol:g}: {found.message}")
        return found.y[:, -1].reshape(noise.shape).astype(noise.dtype)

    return sample


def _stepwise(steps: str, shift: float) -> Sampler:
    def sample(velocity: Velocity, noise: Array) -> Array:
        grid = time_grid(len(steps), shift)
        x, known = noise, _NOTHING
        for letter, start, end in zip(steps, grid, grid[1:], strict=False):
            x, known = _STEPS[letter](velocity, x, known, start, end)
        return x

    return sample


def _heun(
    velocity: Velocity, x: Array, known: Known, start: float, end: float
) -> tuple[Array, Known]:
    """FlowTurbo, Eq. 3."""
    return _pseudo_corrector(velocity, x, ((start, velocity(x, start)),), start, end)


def _pseudo_corrector(
    velocity: Velocity, x: Array, known: Known, start: float, end: float
) -> tuple[Array, Known]:
    """FlowTurbo, Eq. 9: Heun with the velocity kept from the step before."""
    last = known[-1] if known else (start, velocity(x, start))
    h, v = end - start, last[1]
    v_next = velocity(x + h * v, end)
    return x + h / 2 * (v + v_next), (last, (end, v_next))


def _taylor(
    velocity: Velocity, x: Array, known: Known, start: float, end: float
) -> tuple[Array, Known]:
    """v(t) ~ v + (t - t_v) (v - v_prev) / (t_v - t_prev), integrated exactly over the step."""
    (t_prev, v_prev), (t_v, v) = known
    ahead = (start + end) / 2 - t_v
    return x + (end - start) * (v + ahead / (t_v - t_prev) * (v - v_prev)), known


def _reuse(
    velocity: Velocity, x: Array, known: Known, start: float, end: float
) -> tuple[Array, Known]:
    """v(t) ~ v."""
    return x + (end - start) * known[-1][1], known


_STEPS = {"H": _heun, "P": _pseudo_corrector, "T": _taylor, "Z": _reuse}


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
        # Its own grid ends, or starts, a thousandth off; times are read from here alone.
        sigmas = 1 - torch.tensor(time_grid(steps, shift))
        scheduler.sigmas = sigmas.float().clamp(max=_FIRST_SIGMA)
        scheduler.set_begin_index(0)
        x = torch.from_numpy(noise)
        for sigma, step in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
            v = torch.from_numpy(velocity(x.numpy(), 1 - sigma))
            x = scheduler.step(-v, step, x).prev_sample
        return x.numpy()

    return sample
