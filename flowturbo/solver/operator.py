"""A spatial operator: what a fitted solver adds to its update.

A step's velocities are known at all pixels. So an update may use those around a pixel too, with the
same matrix everywhere. The matrix is fitted by least squares (tuning.fit). It is the linear form of
SpanLift's idea (arXiv 2606.08672), a correction beyond the span of state and velocities.

The last steps may have a refiner beside the matrix: one layer of rectified units that read the same
windows. It takes the place of FlowTurbo's refiner, and costs a few percent of an evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
        read = [x, *velocities[-self.velocities :]]
        if self.side == 1:
            pixels = np.concatenate(read, 1).transpose(0, 2, 3, 1)
            made = outputs(pixels @ self.matrix[:-1] + self.matrix[-1], self.refiner)
            return np.ascontiguousarray(made.transpose(0, 3, 1, 2))
        padded = _padded_squares(read)
        n, rows, columns, size = padded.shape
        # A window of 4 x 4 is four squares of the padded image. One after the other, so that the
        # windows, which overlap, are never all in memory.
        found: Any = None
        for row in range(2):
            for column in range(2):
                seen = padded[:, row : row + rows - 1, column : column + columns - 1]
                # Only whole rows go through BLAS.
                part = np.ascontiguousarray(seen).reshape(-1, size) @ self._by_square[row, column]
                found = part if found is None else np.add(found, part, out=found)
        found += self.matrix[-1]
        return from_squares(outputs(found, self.refiner), x.shape, 2)

    @cached_property
    def _by_square(self) -> np.ndarray:
        """The matrix for windows of 4 x 4, for each square, [2, 2, 4 * channels, outputs]."""
        parts = self.matrix[:-1].reshape(-1, 2, 2, 2, 2, self.matrix.shape[1])
        by_square = parts.transpose(1, 3, 2, 4, 0, 5)
        return np.ascontiguousarray(by_square).reshape(2, 2, -1, self.matrix.shape[1])


def _padded_squares(states: Sequence[np.ndarray]) -> np.ndarray:
    """Squares of 2 x 2 pixels of all `states` [n, C, h, w] with a border of zeros.

    Their shape is [n, h / 2 + 1, w / 2 + 1, 4 * channels]. With the channels last this takes
    at most half of the time of `to_squares`.
    """
    n, channels, height, width = states[0].shape
    shape = n, height + 2, width + 2, len(states) * channels
    padded = np.zeros(shape, states[0].dtype)
    for k, state in enumerate(states):
        part = padded[:, 1:-1, 1:-1, k * channels : (k + 1) * channels]
        part[...] = state.transpose(0, 2, 3, 1)
    squares = padded.reshape(n, height // 2 + 1, 2, width // 2 + 1, 2, -1)
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(n, height // 2 + 1, width // 2 + 1, -1)


def outputs(made: np.ndarray, refiner: np.ndarray | None) -> np.ndarray:
    """The outputs [..., outputs] of what the matrix `made` of windows, with those of the units."""
    if refiner is None or not len(refiner):
        return made
    linear, units = made[..., : refiner.shape[1]], made[..., refiner.shape[1] :]
    added: np.ndarray = np.maximum(units, 0) @ refiner
    return np.add(added, linear, out=added)


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
