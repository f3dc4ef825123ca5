"""Fréchet distance between sets of features, as in FID (Heusel et al., arXiv 1706.08500)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

_ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "features")


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Statistics:
        """Statistics of `features` [N, D]."""
        exact = features.astype(np.float64)
        return cls(exact.mean(0), np.cov(exact, rowvar=False))


@dataclass(frozen=True)
class Reference:
    """Statistics of the features of real images.

    `spatial` is for sFID. `features` [N, D] of some of the images are for precision and recall.
    Both are optional.
    """

    pooled: Statistics
    spatial: Statistics | None = None
    features: np.ndarray | None = None

    def save(self, path: Path) -> None:
        """Writes an .npz file in the layout of ADM's reference batches, plus `features`."""
        arrays = {"mu": self.pooled.mean, "sigma": self.pooled.covariance}
        if self.spatial is not None:
            arrays["mu_s"] = self.spatial.mean
            arrays["sigma_s"] = self.spatial.covariance.astype(np.float32)
        if self.features is not None:
            arrays["features"] = self.features.astype(np.float16)
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Reads a file from `save`, or ADM's statistics. Raises ValueError for other files."""
        with np.load(path) as file:
            if "mu" not in file:
                raise ValueError(f"{path} must have mu and sigma, it has {', '.join(file)}")
            arrays = {name: file[name] for name in file if name in _ARRAYS}
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
            present = [arrays[name].shape for name in (mean, covariance) if name in arrays]
            if present and (len(present) < 2 or present[1] != present[0] * 2):
                raise ValueError(
                    f"{path} must have {mean} [D] and {covariance} [D, D], it has "
                    f"{', '.join(map(str, present))}"
                )
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise ValueError(f"{path}: {name} must be finite, it has NaN or infinity")
        spatial = Statistics(arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None
        features = arrays["features"].astype(np.float32) if "features" in arrays else None
        return cls(Statistics(arrays["mu"], arrays["sigma"]), spatial, features)


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in units of the features squared."""
    # The product of two covariances has non-negative eigenvalues. The trace of its square root is
    # the sum of their roots.
    roots = np.sqrt(np.linalg.eigvals(one.covariance @ other.covariance).real.clip(min=0)).sum()
    apart = one.mean - other.mean
    return float(apart @ apart + np.trace(one.covariance + other.covariance) - 2 * roots)
