"""Continues an image smoothly into a hole: pull-push (Gortler et al., 1996), then relaxation."""

import numpy as np

Array = np.ndarray
_RELAXATIONS = 8  # per level: they remove the squares near the border


def continued(values: Array, known: Array) -> Array:
    """`values` [H, W, k] where `known` [H, W] bool, and smooth values elsewhere, float32.

    Averages of known values fill ever larger squares, and the finest square with a known value
    counts most. At each level unknown values then approach the mean of their neighbours. Linear
    time. Without any known value it is 0.
    """
    weights = known.astype(np.float32)[..., None]
    return _pulled(values.astype(np.float32) * weights, weights)


def _pulled(sums: Array, weights: Array) -> Array:
    """From weighted sums [h, w, k] and their weights [h, w, 1] in 0..1 to values."""
    found = sums / np.maximum(weights, 1e-9)
    height, width = weights.shape[:2]
    if (weights == 1).all() or height == width == 1:
        return found
    larger, weight = _quarters(sums), _quarters(weights)
    scale = np.minimum(1, 1 / np.maximum(weight, 1e-9))
    rest = _doubled(_pulled(larger * scale, weight * scale), height, width)
    return _relaxed(weights * found + (1 - weights) * rest, weights > 0)


def _relaxed(values: Array, known: Array) -> Array:
    """`values` [h, w, k]; those not `known` [h, w, 1] approach the mean of their neighbours."""
    (top, bottom), (left, right) = (_extent(~known[..., 0], axis) for axis in (1, 0))
    if top == bottom:
        return values
    around = np.pad(values, ((1, 1), (1, 1), (0, 0)))
    around = around[top : bottom + 2, left : right + 2]  # only here something changes
    inner, fixed = around[1:-1, 1:-1], known[top:bottom, left:right]
    height, width = values.shape[:2]
    for _ in range(_RELAXATIONS):
        _continue_edges(around, top == 0, bottom == height, left == 0, right == width)
        mean = around[:-2, 1:-1] + around[2:, 1:-1]
        mean += around[1:-1, :-2]
        mean += around[1:-1, 2:]
        mean *= 0.25
        np.copyto(inner, mean, where=~fixed)
    values = values.copy()
    values[top:bottom, left:right] = inner
    return values


def _extent(chosen: Array, axis: int) -> tuple[int, int]:
    """Where `chosen` [h, w] bool begins and ends along the other axis than `axis`."""
    (found,) = np.nonzero(chosen.any(axis))
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)


def _continue_edges(around: Array, top: bool, bottom: bool, left: bool, right: bool) -> None:
    """The outermost values of `around` become those beside them, where the image ends."""
    if top:
        around[0] = around[1]
    if bottom:
        around[-1] = around[-2]
    if left:
        around[:, 0] = around[:, 1]
    if right:
        around[:, -1] = around[:, -2]


def _quarters(values: Array) -> Array:
    """Sums over squares of two by two."""
    height, width = values.shape[:2]
    even = np.pad(values, ((0, height % 2), (0, width % 2), (0, 0)))
    return even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]


def _doubled(values: Array, height: int, width: int) -> Array:
    """Twice as large, [height, width, k], by linear interpolation."""
    for axis, size in ((0, height), (1, width)):
        place = (np.arange(size, dtype=np.float32) + 0.5) / 2 - 0.5
        before = np.floor(place).astype(np.int64)
        share = (place - before).reshape([-1 if k == axis else 1 for k in range(3)])
        last = values.shape[axis] - 1
        low, high = (values.take(np.clip(before + k, 0, last), axis) for k in (0, 1))
        values = low * (1 - share) + high * share
    return values
