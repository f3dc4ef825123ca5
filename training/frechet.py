"""Fréchet distance between sets of features, as in FID (Heusel et al., arXiv 1706.08500)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Statistics":
        """Statistics of `features` [N, D]."""
        exact = features.astype(np.float64)
        return cls(exact.mean(0), np.cov(exact, rowvar=False))

    def save(self, path: Path) -> None:
        """Writes an .npz file."""
        np.savez(path, mean=self.mean, covariance=self.covariance)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Reads what `save` wrote."""
        with np.load(path) as file:
            return cls(file["mean"], file["covariance"])


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in units of the features squared."""
    # The product of two covariances has the eigenvalues of a positive matrix; its square root's
    # trace is the sum of their roots.
    roots = np.sqrt(np.linalg.eigvals(one.covariance @ other.covariance).real.clip(min=0)).sum()
    apart = one.mean - other.mean
    return float(apart @ apart + np.trace(one.covariance + other.covariance) - 2 * roots)
