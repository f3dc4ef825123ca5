"""DPM-Solver++ and UniPC as tables. Both extrapolate the predicted data, in the log-SNR.

Let alpha = t and sigma = 1 - t. At a state x with velocity v the data are predicted as
D = x + sigma v. The log signal-to-noise ratio is lambda = log(alpha / sigma). Both methods move

    x_next = sigma_next / sigma x + sum of weights times D

with weights that sum to 1 - sigma_next / sigma. So every state is the noise plus a sum of
velocities, and the methods are tables of coefficients. They are computed here on such sums.
"""

from collections.abc import Sequence
from math import expm1, log

import numpy as np

from flowturbo.solver.table import Table, of_states

_FIRST_ALPHA = 1e-6  # in place of 0, where lambda is infinite
_FEW = 15  # with fewer steps DPM-Solver++ lowers its order before the last move too
_SUMS = np.ndarray  # [n]: a sum of velocities by its coefficients


class _Path:
    """The grid in terms of alpha, sigma and lambda; the data predictions so far."""

    def __init__(self, times: Sequence[float]) -> None:
        self.steps = len(times) - 1
        self.alpha = [times[0] or min(_FIRST_ALPHA, times[1] / 2), *times[1:]]
        self.sigma = [1 - alpha for alpha in self.alpha]
        self.log_snr = [
            log(a) - log(s) if s > 0 else float("inf")
            for a, s in zip(self.alpha, self.sigma, strict=True)
        ]
        self.data: list[_SUMS] = []

    def predict(self, k: int, state: _SUMS) -> None:
        """Adds the data prediction of evaluation `k`, made at `state`."""
        self.data.append(state + self.sigma[k] * np.eye(self.steps)[k])

    def order(self, k: int, highest: int, lowered: bool = True) -> int:
        """Of the move from time `k`: lower where too few predictions are known, and at the end.

        The last move is of order 1, because lambda is infinite there. With `lowered` the one before
        is at most of order 2.
        """
        remaining = self.steps - k
        return min(highest, k + 1, remaining if lowered or remaining == 1 else highest)

    def distances(self, k: int, order: int) -> list[float]:
        """From lambda at `k` to that at the evaluations before it, in parts of the step's."""
        h = self.log_snr[k + 1] - self.log_snr[k]
        return [(self.log_snr[k - j] - self.log_snr[k]) / h for j in range(1, order)]


def dpm_solver(times: Sequence[float], highest: int) -> Table:
    """DPM-Solver++ of order 2 or 3, multistep (arXiv 2211.01095): 2M (midpoint form) and 3M.

    The orders of the last moves are those of diffusers.
    """
    path = _Path(times)
    states = [np.zeros(path.steps)]
    for k in range(path.steps):
        path.predict(k, states[-1])
        order = path.order(k, highest, lowered=path.steps < _FEW)
        back, data = path.distances(k, order), path.data
        h = path.log_snr[k + 1] - path.log_snr[k]
        grown = -expm1(-h)  # 1 - e^-h
        moved = path.sigma[k + 1] / path.sigma[k] * states[-1]
        alpha = path.alpha[k + 1]
        moved = moved + alpha * grown * data[-1]
        if order > 1:
            slope = (data[-1] - data[-2]) / -back[0]
        if order == 2:
            moved = moved + alpha * grown / 2 * slope
        if order == 3:
            r0, r1 = -back[0], back[0] - back[1]
            older = (data[-2] - data[-3]) / r1
            curve = (slope - older) / (r0 + r1)
            slope = slope + r0 * curve
            moved = moved + alpha * (1 - grown / h) * slope
            moved = moved - alpha * ((h - grown) / h**2 - 0.5) * curve
        states.append(moved)
    return of_states(times, states)


def unipc(times: Sequence[float], highest: int) -> Table:
    """UniPC of order 2 or 3 with its corrector, B2(h), predicting data (arXiv 2302.04867).

    Each evaluation corrects the state that it was made at, and then predicts the next one.
    """
    path = _Path(times)
    corrected, predicted = np.zeros(path.steps), np.zeros(path.steps)
    states = [predicted]
    for k in range(path.steps):
        path.predict(k, predicted)
        if k:
            order = path.order(k - 1, highest)
            corrected = _unified(path, k - 1, corrected, order, path.data[k])
        predicted = _unified(path, k, corrected, path.order(k, highest))
        states.append(predicted)
    return of_states(times, states)


def _unified(path: _Path, k: int, state: _SUMS, order: int, ahead: _SUMS | None = None) -> _SUMS:
    """UniPC's move of `state` from time `k`; with the prediction `ahead` at its end it corrects."""
    h = path.log_snr[k + 1] - path.log_snr[k]
    nodes = path.distances(k, order)
    changes = [(path.data[k - j] - path.data[k]) / node for j, node in enumerate(nodes, start=1)]
    if ahead is not None:
        nodes, changes = [*nodes, 1.0], [*changes, ahead - path.data[k]]
    grown = -expm1(-h)
    moved = path.sigma[k + 1] / path.sigma[k] * state + path.alpha[k + 1] * grown * path.data[k]
    for weight, change in zip(_unified_weights(h, nodes), changes, strict=True):
        moved = moved + path.alpha[k + 1] * grown * weight * change
    return moved


def _unified_weights(h: float, nodes: Sequence[float]) -> np.ndarray:
    """Eq. 9 and 12 of UniPC with B(h) = e^-h - 1; one node alone has the weight 1/2."""
    if len(nodes) < 2:
        return np.full(len(nodes), 0.5)
    powers = np.arange(len(nodes))
    phi, factorial, right = expm1(-h) / -h - 1, 1.0, []
    for power in powers:
        right.append(phi * factorial / expm1(-h))
        factorial *= power + 2
        phi = phi / -h - 1 / factorial
    weights: np.ndarray = np.linalg.solve(np.asarray(nodes)[None] ** powers[:, None], right)
    return weights
