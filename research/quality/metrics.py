"""Figures of merit of generated images, from a network's features of them.

Fréchet distances fall with the number of images N, about as 1/N: compare them at equal N only. The
intervals are from the jackknife over disjoint blocks of seeds. It leaves out one block at a time,
so N and the bias hardly change. An interval says how far the figure would move with other seeds. It
does not say how far the figure is from its limit for infinitely many images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from research.quality.subjects import ALL
from training.frechet import Reference, Statistics, frechet_distance
from training.judging import Features

Figure = Callable[[np.ndarray], float]  # of rows [N, ...], one per image
Without = tuple[float, ...]  # a figure without each of BLOCKS blocks of seeds; () for fewer images

BLOCKS = 10
_T_95 = 2.262  # Student's t of BLOCKS - 1 degrees of freedom, two-sided 95%
_SPLIT = 5000  # images per Inception Score in ADM's evaluator
_NEIGHBOUR = 3  # Kynkäänniemi et al., arXiv 1904.06991
_ROWS = 1000  # of a distance matrix in memory at a time
_Interval = tuple[float | None, float | None]  # a figure, and half the width of its interval


@dataclass(frozen=True)
class Figures:
    """The figures of one set of images; None if the reference or the judge cannot give them.

    `recognised` is the share of images in which the judge reads all that was asked for; `right` has
    such shares of its parts.
    `frechet_distance_without_block` has the Fréchet distance without each of BLOCKS blocks of
    seeds. Each interval is half the width of a 95% interval from such values. Recall has no
    interval: each left-out block would need a new neighbour search over all other images.
    """

    images: int
    recognised: float | None
    recognised_interval: float | None
    frechet_distance: float
    frechet_interval: float | None
    frechet_distance_without_block: Without
    spatial_frechet_distance: float | None
    spatial_frechet_interval: float | None
    inception_score: float | None
    inception_score_interval: float | None
    knn_precision: float | None
    knn_precision_interval: float | None
    knn_recall: float | None
    right: Mapping[str, _Interval]


def figures(
    seen: Features,
    reference: Reference,
    right: Mapping[str, np.ndarray] | None,
    *,
    classes: bool = True,
) -> Figures:
    """All figures of `seen`.

    `right` says what the judge reads rightly, [N] bool each (Subject.right); None if unknown.
    Without `classes` the judge's outputs are no class probabilities.
    """
    nothing: _Interval = (None, None)
    shares: dict[str, _Interval] = {
        name: _jackknifed(rows, _mean) for name, rows in (right or {}).items()
    }
    recognised = shares.pop(ALL, nothing)
    score, spatial, precision, recall = nothing, nothing, nothing, None
    if classes:
        score = _jackknifed(seen.probability, inception_score)
    if reference.spatial is not None:
        spatial = _jackknifed(seen.spatial, distance_to(reference.spatial))
    if reference.features is not None:
        precision = _jackknifed(near(seen.pooled, reference.features), _mean)
        recall = _mean(near(reference.features, seen.pooled))
    distance = distance_to(reference.pooled)
    without = without_block(seen.pooled, distance)
    return Figures(
        len(seen.pooled),
        *recognised,
        distance(seen.pooled),
        _interval(without),
        without,
        *spatial,
        *score,
        *precision,
        recall,
        shares,
    )


def distance_to(real: Statistics) -> Figure:
    """The Fréchet distance of features [N, D] to `real`."""
    return lambda features: frechet_distance(Statistics.of(features), real)


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _jackknifed(rows: np.ndarray, figure: Figure) -> tuple[float, float | None]:
    """`figure` of `rows` [N, ...], and its interval."""
    return figure(rows), _interval(without_block(rows, figure))


def _interval(without: Without) -> float | None:
    return half_width(without) if without else None


def without_block(rows: np.ndarray, figure: Figure) -> Without:
    """`figure` of `rows` [N, ...] without each of BLOCKS blocks of them; () if N < BLOCKS.

    A block has consecutive rows. Rows are in the order of their seeds and classes take turns, so
    blocks have similar classes.
    """
    if len(rows) < BLOCKS:
        return ()
    blocks = np.array_split(np.arange(len(rows)), BLOCKS)
    return tuple(figure(np.delete(rows, block, axis=0)) for block in blocks)


def mean_without(values: np.ndarray) -> Without:
    """The mean of `values` [N] without each of BLOCKS blocks of them; () if N < BLOCKS."""
    return without_block(values, _mean)


def half_width(without: Without | np.ndarray) -> float:
    """Half the width of a figure's 95% interval, from its values without each block."""
    spread = np.asarray(without) - np.mean(without)
    return float(_T_95 * np.sqrt((BLOCKS - 1) / BLOCKS * (spread**2).sum()))


def inception_score(probability: np.ndarray) -> float:
    """exp of the mean divergence of `probability` [N, K] from its mean (arXiv 1606.03498).

    Averaged over groups of 5,000 images, as in ADM's evaluator.
    """
    p = probability.astype(np.float64).clip(1e-16)
    parts = [p[start : start + _SPLIT] for start in range(0, len(p), _SPLIT)]
    scores = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in parts]
    return float(np.mean(scores))


def near(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of `points` [N, D] are near `others` [M, D], bool [N].

    Each of the others has a radius: the distance to its third nearest neighbour among them. A point
    is near if it lies within one of the radii. Precision is the share of generated images near real
    ones. Recall is the share of real images near generated ones.
    """
    ours, theirs = (torch.from_numpy(rows.astype(np.float32)) for rows in (points, others))
    nearest = min(_NEIGHBOUR + 1, len(theirs))  # the nearest one is the point itself
    # In parts: the M x M distances of 50,000 images need 10 GB.
    radii = torch.cat(
        [torch.cdist(rows, theirs).kthvalue(nearest).values for rows in theirs.split(_ROWS)]
    )
    inside = [(torch.cdist(rows, theirs) <= radii).any(1) for rows in ours.split(_ROWS)]
    return torch.cat(inside).numpy()
