"""A spatial operator: what a fitted solver adds to its update.

A step's velocities are known at all pixels. So an update may use those around a pixel too, with the
same matrix everywhere. The matrix is fitted by least squares (tuning.fit). It is the linear form of
SpanLift's idea (arXiv 2606.08672), a correction beyond the span of state and velocities.

The last steps may have a refiner beside the matrix: one layer of rectified units that read the same
windows. It takes the place of FlowTurbo's refiner, and costs a few percent of an evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SIDES = (1, 4)  # of the windows: a pixel alone, or 4 x 4 pixels around each square of 2 x 2


@dataclass(frozen=True, eq=False)
class Operator:
    """A matrix [features, outputs] from windows of state and velocities to a part of the update.

    With `side` 1 a window is a pixel. Features are the C channels of the state, then those of each
    velocity, then 1. Outputs are the C channels. With `side` 4 windows of 4 x 4 pixels lie around
    squares of 2 x 2: 16 features and 4 outputs per channel. Beyond the border are zeros.
    `velocities` is the number of velocities, the call's own included. With a `refiner` [units,
    outputs] the matrix has a column more for each unit: its input. The rows of `refiner` are what a
    unit adds to the outputs.
    """

    matrix: np.ndarray
    side: int
    velocities: int
    refiner: np.ndarray | None = None

    def __call__(self, x: np.ndarray, velocities: Sequence[np.ndarray]) -> np.ndarray:
        """The change of `x` [n, C, h, w]; `velocities` [n, C, h, w] with the newest last."""
        joined = np.concatenate([x, *velocities[-self.velocities :]], 1).transpose(0, 2, 3, 1)
        if self.side == 1:
            made = outputs(joined @ self.matrix[:-1] + self.matrix[-1], self.refiner)
            return np.ascontiguousarray(made.transpose(0, 3, 1, 2))
        n, height, width, channels = joined.shape
        padded = np.pad(joined, ((0, 0), (1, 1), (1, 1), (0, 0)))
        by_place = self.matrix[:-1].reshape(channels, self.side, self.side, -1)
        # Place by place, so that the windows, which overlap, are never all in memory.
        squares = np.tile(self.matrix[-1], (n * height * width // 4, 1))
        for row in range(self.side):
            for column in range(self.side):
                seen = padded[:, row : row + height : 2, column : column + width : 2]
                # Only whole rows go through BLAS.
                places = np.ascontiguousarray(seen).reshape(-1, channels)
                squares += places @ np.ascontiguousarray(by_place[:, row, column])
        return from_squares(outputs(squares, self.refiner), x.shape, 2)


def outputs(made: np.ndarray, refiner: np.ndarray | None) -> np.ndarray:
    """The outputs [..., outputs] of what the matrix `made` of windows, with those of the units."""
    if refiner is None:
        return made
    linear, units = np.split(made, [refiner.shape[1]], -1)
    return np.asarray(linear + np.maximum(units, 0) @ refiner)


def features(states: Sequence[np.ndarray], side: int) -> np.ndarray:
    """The windows [n * squares, channels * side * side] of `states`, each [n, C, h, w]."""
    joined = np.concatenate(states, 1)
    if side == 1:
        return np.moveaxis(joined, 1, -1).reshape(-1, joined.shape[1])
    padded = np.pad(joined, ((0, 0), (0, 0), (1, 1), (1, 1)))
    view: Any = np.lib.stride_tricks.sliding_window_view
    rows = view(padded, (side, side), (2, 3))[:, :, ::2, ::2]
    rows = rows.transpose(0, 2, 3, 1, 4, 5)
    return np.ascontiguousarray(rows).reshape(-1, joined.shape[1] * side * side)


def to_squares(state: np.ndarray, square: int) -> np.ndarray:
    """The squares [n * squares, C * square * square] of `state` [n, C, h, w]."""
    n, channels, height, width = state.shape
    parts = state.reshape(n, channels, height // square, square, width // square, square)
    return parts.transpose(0, 2, 4, 1, 3, 5).reshape(-1, channels * square * square)


def from_squares(squares: np.ndarray, shape: tuple[int, ...], square: int) -> np.ndarray:
    """The state of `shape` (n, C, h, w) with these `squares`, as `to_squares` makes them."""
    n, channels, height, width = shape
    parts = squares.reshape(n, height // square, width // square, channels, square, square)
    return parts.transpose(0, 3, 1, 4, 2, 5).reshape(shape)
