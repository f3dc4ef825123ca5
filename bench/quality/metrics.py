"""Figures of merit of generated images, from what a network sees in them.

Fréchet distances fall with the number of images N, about as 1/N: compare them at equal N only. The
interval given is that of the jackknife over disjoint blocks of seeds, which leaves a block out at a
time and so keeps N, and the bias with it, all but unchanged: it says how far the figure would move
with other seeds, not how far it is from that of infinitely many images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from training.classifier import Seen
from training.frechet import Reference, Statistics, frechet_distance

BLOCKS = 10
_T_95 = 2.262  # Student's t of BLOCKS - 1 degrees of freedom, two-sided 95%
_SPLIT = 5000  # images over which ADM's evaluator takes one Inception Score
_NEIGHBOUR = 3  # Kynkäänniemi et al., arXiv 1904.06991
_ROWS = 1000  # of a distance matrix at a time


@dataclass(frozen=True)
class Figures:
    """Of one set of images; None is what the reference or the judge cannot say.

    `recognised` is the share in which the judge reads the class asked for.
    `frechet_distance_without_block` has the Fréchet distance without each of BLOCKS blocks of
    seeds, and `frechet_interval` is half the width of the 95% interval from it.
    """

    images: int
    recognised: float | None
    frechet_distance: float
    frechet_interval: float | None
    frechet_distance_without_block: tuple[float, ...]
    spatial_frechet_distance: float | None
    inception_score: float
    knn_precision: float | None
    knn_recall: float | None


def figures(seen: Seen, reference: Reference, labels: np.ndarray | None) -> Figures:
    """All figures of the images seen; `labels` [N] are the classes asked for, None if unknown."""
    recognised = precision = recall = spatial = None
    if labels is not None:
        recognised = float((seen.probability.argmax(1) == labels).mean())
    if reference.features is not None:
        precision, recall = precision_recall(reference.features, seen.pooled)
    if reference.spatial is not None:
        spatial = frechet_distance(Statistics.of(seen.spatial), reference.spatial)
    without = leave_one_out(seen.pooled, reference.pooled)
    return Figures(
        len(seen.pooled),
        recognised,
        frechet_distance(Statistics.of(seen.pooled), reference.pooled),
        half_width(without) if without else None,
        without,
        spatial,
        inception_score(seen.probability),
        precision,
        recall,
    )


def leave_one_out(features: np.ndarray, real: Statistics) -> tuple[float, ...]:
    """Fréchet distance of `features` [N, D] without each of BLOCKS runs of rows; () if N is less.

    Rows are in the order of their seeds and classes take turns, so blocks are alike in classes.
    """
    if len(features) < 2 * BLOCKS:
        return ()
    return tuple(
        frechet_distance(Statistics.of(np.delete(features, block, axis=0)), real)
        for block in np.array_split(np.arange(len(features)), BLOCKS)
    )


def mean_without(values: np.ndarray) -> tuple[float, ...]:
    """The mean of `values` [N] without each of BLOCKS runs of them; () if N is less."""
    if len(values) < BLOCKS:
        return ()
    blocks = np.array_split(np.arange(len(values)), BLOCKS)
    return tuple(float(np.delete(values, block).mean()) for block in blocks)


def half_width(without: tuple[float, ...] | np.ndarray) -> float:
    """Half the 95% interval of a figure, from its BLOCKS values without a block each."""
    spread = np.asarray(without) - np.mean(without)
    return float(_T_95 * np.sqrt((BLOCKS - 1) / BLOCKS * (spread**2).sum()))


def inception_score(probability: np.ndarray) -> float:
    """exp of the mean divergence of `probability` [N, K] from its mean (arXiv 1606.03498).

    The mean over runs of 5,000 images, as ADM's evaluator gives it.
    """
    p = probability.astype(np.float64).clip(1e-16)
    parts = [p[start : start + _SPLIT] for start in range(0, len(p), _SPLIT)]
    scores = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in parts]
    return float(np.mean(scores))


def precision_recall(real: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """The share of `found` [N, D] near `real` [M, D], and of `real` near `found`.

    Near is within the distance of some image of the other set to its third nearest neighbour there.
    """
    one, other = (torch.from_numpy(rows.astype(np.float32)) for rows in (real, found))
    return _covered(other, by=one), _covered(one, by=other)


def _covered(points: torch.Tensor, by: torch.Tensor) -> float:
    # The nearest of all is the point itself.
    parts = [torch.cdist(rows, by) for rows in by.split(_ROWS)]
    radii = torch.cat([part.kthvalue(min(_NEIGHBOUR + 1, len(by))).values for part in parts])
    inside = [(torch.cdist(rows, by) <= radii).any(1) for rows in points.split(_ROWS)]
    return float(torch.cat(inside).float().mean())
