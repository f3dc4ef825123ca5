"""Exact trajectories of a flow: what solvers are fitted to.

The teacher is Adams-Bashforth 3, started by Runge-Kutta 4. The fourth order is unstable under
strong guidance: on glyph scenes at guidance 4 it ends 0.55 away from the exact solution, the third
0.005. The grid is shifted, and the last steps halve: there the flow of images turns sharply. What
this leaves is measured for each fit (`halvings`), and steps are divided where it is too much.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

import numpy as np
from scipy.interpolate import CubicHermiteSpline, CubicSpline

from flowturbo.solver.grid import time_grid
from flowturbo.solver.sampler import Array
from flowturbo.solver.steps import integral_weights
from research.quality.engine import distances

Velocity = Callable[[Array, float], Array]
_coarse = time_grid(24, 2.5)
NODES = np.array([*_coarse[:-1], *(1 - (1 - _coarse[-2]) / 2 ** np.arange(1, 4)), 1.0])
_ORDER = 3


@dataclass(frozen=True)
class Trajectories:
    """`x` and `v` [nodes, n, C, h, w] float16 at NODES, of `seeds` [n] at one guidance `scale`."""

    seeds: Array
    scale: float
    x: Array
    v: Array

    def __len__(self) -> int:
        return len(self.seeds)

    def state(self, t: float) -> Array:
        """The state [n, C, h, w] float32 at time `t`."""
        weights = STATE_AT(t)
        used = np.flatnonzero(weights)
        both = [self.x[k] if k < len(NODES) else self.v[k - len(NODES)] for k in used]
        found = sum(w * of.astype(np.float32) for w, of in zip(weights[used], both, strict=True))
        return np.asarray(found, np.float32)

    def write(self, path: Path) -> None:
        """Keeps them in a file."""
        staged = path.with_name(f"{path.name}.new")
        with staged.open("wb") as file:
            np.savez(file, seeds=self.seeds, scale=self.scale, x=self.x, v=self.v)
        staged.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Trajectories":
        """What `write` kept."""
        with np.load(path, allow_pickle=False) as kept:
            return cls(kept["seeds"], float(kept["scale"]), kept["x"], kept["v"])


def _state_spline() -> CubicHermiteSpline:
    """The state at a time, as weights of the nodes' states and then velocities."""
    count = len(NODES)
    return CubicHermiteSpline(
        NODES, np.eye(count, 2 * count), np.eye(count, 2 * count, count), axis=0
    )


STATE_AT = _state_spline()
VELOCITY_AT = CubicSpline(NODES, np.eye(len(NODES), 2 * len(NODES), len(NODES)), axis=0)


def integrate(velocity: Velocity, noise: Array, parts: int = 1) -> tuple[Array, Array]:
    """States and velocities [nodes, n, C, h, w] float16 at NODES, from `noise` [n, C, h, w].

    Each step between nodes is divided into `parts`. Raises ValueError if they are not finite.
    """
    times = _divided(NODES, parts)
    x, states, velocities = noise, [noise], [velocity(noise, 0.0)]
    for k, (t, end) in enumerate(zip(times[:-1], times[1:], strict=True)):
        if k < _ORDER - 1:
            x = _runge_kutta(velocity, x, velocities[-1], t, end)
        else:
            nodes = times[k - _ORDER + 1 : k + 1][::-1].tolist()
            weights = integral_weights(nodes, t, end)
            newest = velocities[: -_ORDER - 1 : -1]
            x = x + sum(w * v for w, v in zip(weights, newest, strict=True))
        x = x.astype(np.float32)
        states.append(x)
        velocities.append(velocity(x, float(end)))
    with np.errstate(over="ignore"):  # checked below
        at_nodes = [np.stack(of[::parts]).astype(np.float16) for of in (states, velocities)]
    if not all(np.isfinite(each).all() for each in at_nodes):
        raise ValueError(
            "a trajectory is not finite: the networks left the range of their precision"
        )
    return at_nodes[0], at_nodes[1]


def halvings(velocity: Velocity, noise: Array) -> Iterator[float]:
    """How far the ends move when all steps are halved, and halved again: mean RMS over images.

    The first figure tells how exact trajectories with 1 part are, the next one with 2, then 4. It
    is infinite if trajectories are not finite.
    """
    ends = (_ends(velocity, noise, 2**k) for k in count())
    for coarse, finer in pairwise(ends):
        if coarse is None or finer is None:
            yield np.inf
        else:
            yield float(distances(coarse, finer).mean())


def _ends(velocity: Velocity, noise: Array, parts: int) -> Array | None:
    """The last states, or None if they are not finite."""
    try:
        return integrate(velocity, noise, parts)[0][-1].astype(np.float32)
    except ValueError:
        return None


def _divided(times: Array, parts: int) -> Array:
    """`times` with each gap divided into `parts`."""
    wanted = np.arange(parts * (len(times) - 1) + 1) / parts
    return np.interp(wanted, np.arange(len(times)), times)


def _runge_kutta(velocity: Velocity, x: Array, first: Array, t: float, end: float) -> Array:
    h = end - t
    second = velocity(x + h / 2 * first, t + h / 2)
    third = velocity(x + h / 2 * second, t + h / 2)
    fourth = velocity(x + h * third, end)
    return x + h / 6 * (first + 2 * second + 2 * third + fourth)


def gram(batches: Sequence[Trajectories]) -> Array:
    """The inner products [2 nodes, 2 nodes] of the nodes' states and velocities, mean per value."""
    total, values = np.zeros((2 * len(NODES),) * 2), 0
    for batch in batches:
        flat = np.concatenate([batch.x, batch.v]).reshape(2 * len(NODES), -1).astype(np.float32)
        total += flat @ flat.T
        values += flat.shape[1]
    return total / values
