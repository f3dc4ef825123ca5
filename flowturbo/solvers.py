"""Solvers that were fitted to a pipeline (tuning.fit), and the file that holds them.

The file lies beside the pipeline's record: `<repository>/flowturbo/1/pipelines/<name>.solvers.npz`.
It has arrays, and a text in JSON that says what they are and which flow they belong to.
"""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo.errors import RepositoryError, RequestError
from flowturbo.solver.operator import SIDES, Operator
from flowturbo.solver.table import Table

VERSION = 1
_META = "about"
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


@dataclass(frozen=True, eq=False)
class Fit:
    """The solver for so many `evaluations`, and for guidance scales from `low` to `high`.

    `weights` [k, n, n] are those of a Table. `operators` has one matrix [k, features, outputs] per
    move, with windows of `side`, or it is empty. With k = 2 the second is the change by
    guidance: it counts (scale - middle) / half of the range. `refiners` are those of the last
    operators, [units, outputs] each (operator.py). `figures` are for readers: errors on images that
    were not used.
    """

    low: float
    high: float
    times: tuple[float, ...]
    weights: np.ndarray
    operators: tuple[np.ndarray, ...] = ()
    refiners: tuple[np.ndarray, ...] = ()
    side: int = 1
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Requests carry float32: compared as such, a scale named as an end is within.
        for name in ("low", "high"):
            object.__setattr__(self, name, float(np.float32(getattr(self, name))))

    @property
    def evaluations(self) -> int:
        return len(self.times) - 1

    def covers(self, scale: float) -> bool:
        """Whether it was fitted for this guidance scale."""
        return self.low <= float(np.float32(scale)) <= self.high

    @property
    def by_operator(self) -> list[np.ndarray | None]:
        """The refiner of each operator, None for those without."""
        return [None] * (len(self.operators) - len(self.refiners)) + [*self.refiners]

    def terms(self, scale: float) -> np.ndarray:
        """The factors [k] of the coefficients at this scale."""
        return scale_terms(np.array([scale]), self.low, self.high)[0]

    def table(self, scale: float) -> Table:
        """The coefficients at one guidance scale."""
        terms = self.terms(scale)
        operators = tuple(
            Operator(np.tensordot(terms, matrix, 1).astype(np.float32), self.side, k + 1, refiner)
            for k, (matrix, refiner) in enumerate(
                zip(self.operators, self.by_operator, strict=True)
            )
        )
        return Table(self.times, np.tensordot(terms, self.weights, 1), operators)


def scale_terms(scales: np.ndarray, low: float, high: float) -> np.ndarray:
    """The factors [n, k] of a fit's coefficients at guidance scales [n]."""
    if low == high:
        return np.ones((len(scales), 1))
    return np.stack([np.ones(len(scales)), (2 * scales - low - high) / (high - low)], 1)


@dataclass(frozen=True)
class Solvers:
    """The fitted solvers of one pipeline.

    `flow` identifies the flow that they were fitted to (Pipeline.flow), `latent_shape` is (C, h, w)
    and `digest` identifies the coefficients.
    """

    flow: str
    latent_shape: tuple[int, int, int]
    fits: tuple[Fit, ...] = field(compare=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        sha = hashlib.sha256()
        for fit in self.fits:
            sha.update(repr((fit.low, fit.high, fit.times, fit.side)).encode())
            for array in (fit.weights, *fit.operators, *fit.refiners):
                sha.update(np.ascontiguousarray(array, np.float32).tobytes())
        object.__setattr__(self, "digest", sha.hexdigest()[:16])

    @property
    def counts(self) -> list[int]:
        """The numbers of evaluations there are solvers for."""
        return sorted({fit.evaluations for fit in self.fits})

    def ranges(self, evaluations: int) -> str:
        """The guidance scales of the solvers for so many evaluations, for messages."""
        found = sorted({(f.low, f.high) for f in self.fits if f.evaluations == evaluations})
        apart = [  # a range within another says nothing
            (low, high)
            for low, high in found
            if not any(a <= low and high <= b and (a, b) != (low, high) for a, b in found)
        ]
        return ", ".join(f"{a:g}" if a == b else f"{a:g} to {b:g}" for a, b in apart)

    def table(self, evaluations: int, scale: float) -> Table:
        """The table for so many evaluations at this guidance scale."""
        return self.fit_for(evaluations, scale).table(scale)

    def fit_for(self, evaluations: int, scale: float) -> Fit:
        """The fit for so many evaluations whose range of scales is the narrowest.

        A fit for guidance 1 alone is better there. Raises RequestError for a scale outside all
        ranges.
        """
        known = [fit for fit in self.fits if fit.evaluations == evaluations]
        fitting = [fit for fit in known if fit.covers(scale)]
        if not fitting:
            raise RequestError(
                f"L{evaluations} was fitted for guidance scales {self.ranges(evaluations)}, got "
                f"{scale:g}"
            )
        return min(fitting, key=lambda fit: fit.high - fit.low)

    def joined(self, fits: Iterable[Fit]) -> "Solvers":
        """With `fits`, which replace those for the same evaluations and scales."""
        kept = {(fit.evaluations, fit.low, fit.high): fit for fit in (*self.fits, *fits)}
        return Solvers(self.flow, self.latent_shape, tuple(kept[key] for key in sorted(kept)))

    def write(self, path: Path) -> None:
        """Writes the file; a reader never sees half of it."""
        arrays: dict[str, np.ndarray] = {}
        stated = []
        for number, fit in enumerate(self.fits):
            arrays[f"{number}.times"] = np.array(fit.times)
            arrays[f"{number}.weights"] = fit.weights
            for k, matrix in enumerate(fit.operators):
                # The columns of units are apart: earlier files have operators in float32.
                refiner = fit.by_operator[k]
                linear = matrix.shape[2] if refiner is None else refiner.shape[1]
                arrays[f"{number}.operator.{k}"] = _small(matrix[..., :linear])
                arrays[f"{number}.units.{k}"] = _small(matrix[..., linear:])
            for k, refiner in enumerate(fit.refiners):
                arrays[f"{number}.refiner.{k}"] = _small(refiner)
            scales = {"low": fit.low, "high": fit.high}
            matrices = {
                "side": fit.side,
                "operators": len(fit.operators),
                "refiners": len(fit.refiners),
            }
            stated.append({**scales, **matrices, "figures": dict(fit.figures)})
        about = {"version": VERSION, "flow": self.flow, "latent_shape": self.latent_shape}
        text = json.dumps(about | {"fits": stated})
        arrays[_META] = np.frombuffer(text.encode(), dtype=np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f"{path.name}.new")
        with staged.open("wb") as file:
            np.savez_compressed(file, **arrays)
        staged.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Solvers":
        """Reads a file. Raises RepositoryError."""
        try:
            return cls.parse(path.read_bytes())
        except (*_DAMAGED, OSError, KeyError, TypeError, ValueError) as error:
            raise RepositoryError(
                f"{path} is no file of fitted solvers ({type(error).__name__}: {error}): fit them "
                "again with python -m tuning.fit"
            ) from error

    @classmethod
    def parse(cls, content: bytes) -> "Solvers":
        """Reads the bytes of a file. Raises what `read` catches."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            about = json.loads(bytes(arrays[_META]))
            if about["version"] != VERSION:
                raise ValueError(f"version {about['version']}, this release reads {VERSION}")
            channels, height, width = about["latent_shape"]
            fits = tuple(
                Fit(
                    low=float(each["low"]),
                    high=float(each["high"]),
                    times=tuple(arrays[f"{k}.times"].tolist()),
                    weights=arrays[f"{k}.weights"],
                    operators=tuple(_operator(arrays, k, i) for i in range(each["operators"])),
                    refiners=tuple(
                        arrays[f"{k}.refiner.{i}"].astype(np.float32)
                        for i in range(each.get("refiners", 0))
                    ),
                    side=each["side"],
                    figures=each["figures"],
                )
                for k, each in enumerate(about["fits"])
            )
        for fit in fits:
            _check(fit, channels)
        return cls(str(about["flow"]), (channels, height, width), fits)


def _small(array: np.ndarray) -> np.ndarray:
    """The same values in float16 where they are exact there, else in float32."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half, array) else array.astype(np.float32)


def _operator(arrays: Mapping[str, np.ndarray], fit: int, k: int) -> np.ndarray:
    """The matrix of a move; files without refiners have no columns of units."""
    linear, units = arrays[f"{fit}.operator.{k}"], f"{fit}.units.{k}"
    if units not in arrays:
        return linear.astype(np.float32)
    return np.concatenate([linear, arrays[units]], 2).astype(np.float32)


def _check(fit: Fit, channels: int) -> None:
    """Raises ValueError unless shapes and values of a fit are possible."""
    n, terms = fit.evaluations, 1 if fit.low == fit.high else 2
    times = np.asarray(fit.times)
    if n < 1 or times[0] != 0 or times[-1] != 1 or not np.all(np.diff(times) > 0):
        raise ValueError(f"times must rise from 0 to 1, got {times.tolist()}")
    operators, refiners = len(fit.operators), len(fit.refiners)
    if (
        not fit.low <= fit.high
        or fit.side not in SIDES
        or operators not in (0, n)
        or refiners > operators
    ):
        raise ValueError(
            f"scales {fit.low:g} to {fit.high:g}, windows of {fit.side}, {operators} operators and "
            f"{refiners} refiners for {n} evaluations"
        )
    outputs = channels * (4 if fit.side == 4 else 1)
    wanted: list[tuple[int, ...]] = [(terms, n, n)]
    for k, refiner in enumerate(fit.by_operator):
        units = 0 if refiner is None else len(refiner)
        wanted.append((terms, (k + 2) * channels * fit.side**2 + 1, outputs + units))
    wanted += [(len(refiner), outputs) for refiner in fit.refiners]
    arrays = [fit.weights, *fit.operators, *fit.refiners]
    for array, shape in zip(arrays, wanted, strict=True):
        if array.shape != shape or not np.all(np.isfinite(array)):
            raise ValueError(f"an array of shape {array.shape}, wanted are finite {shape}")
