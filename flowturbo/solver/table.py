"""A solver as data: any linear multistep method, and fitted ones, is a table of coefficients."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowturbo.solver.calls import PredictorCall
from flowturbo.solver.operator import Operator

NEGLIGIBLE = 1e-9  # of a coefficient; without smaller ones fewer velocities are kept


@dataclass(frozen=True, eq=False)
class Table:
    """`weights` [n, n]: in row i those of the velocities 0 to i in the move from time i to i + 1.

    `times` are n + 1. The velocity i is evaluated at the state of time i. `operators` may have one
    for each move, or be empty.
    """

    times: tuple[float, ...]
    weights: np.ndarray
    operators: tuple[Operator | None, ...] = ()

    def calls(self) -> tuple[PredictorCall, ...]:
        """The block calls, one per evaluation."""
        found = []
        for k, (start, end) in enumerate(zip(self.times[:-1], self.times[1:], strict=True)):
            row = np.where(
                np.abs(self.weights[k, : k + 1]) < NEGLIGIBLE, 0, self.weights[k, : k + 1]
            )
            *moves, w_next = row.tolist()
            first = next((j for j, weight in enumerate(moves) if weight), len(moves))
            operator = self.operators[k] if self.operators else None
            at = self.times[k - 1] if k else None
            found.append(
                PredictorCall(k, start, start, end, (), tuple(moves[first:]), w_next, at, operator)
            )
        return tuple(found)


def of_states(times: Sequence[float], states: Sequence[np.ndarray]) -> Table:
    """The table of a method whose `states`, one per time, are sums of velocities [n] plus noise."""
    return Table(tuple(times), np.diff(np.stack(states), axis=0))
