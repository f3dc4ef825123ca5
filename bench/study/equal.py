"""The fastest of each kind that is as good as a Heun schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.quality.metrics import half_width
from bench.study.figures import family

Study = dict[str, Any]
Found = dict[str, Any]  # one point's figures

HEUN = ("H4", "H8", "H12")
KINDS = (  # of bench.study.figures.family
    "Heun, shifted",
    "FlowTurbo",
    "FlowTurbo, shifted",
    "FlowTurbo, Z for R",
    "FlowTurbo, Z for R, shifted",
    "Adams-Bashforth 2",
    "Adams-Bashforth 2, shifted",
    "UniPC",
    "UniPC, shifted",
    "DPM-Solver++",
)


@dataclass(frozen=True)
class Rival:
    """The fastest of a kind as good as Heun: its share of Heun's time, and how it differs.

    `difference` is its figure less Heun's, `interval` half the 95% interval of that.
    """

    sampler: str
    share: float
    difference: float
    interval: float


Difference = Callable[[Found, Found], tuple[float, float] | None]


def rivals(points: Iterable[Found], heun: Found, apart: Difference) -> dict[str, Rival]:
    """By kind (KINDS), among `points` of the same guidance; kinds with none as good are left out.

    Times are each point's in turns with the same schedule, so that both had the same machine.
    """
    found: dict[str, Rival] = {}
    for each in points:
        (name, _), known = family(each["sampler"]) or ("", ""), apart(each, heun)
        if name not in KINDS or known is None or known[0] > 0:
            continue
        share = each["ratio"]["median"] / heun["ratio"]["median"]
        if name not in found or share < found[name].share:
            found[name] = Rival(each["sampler"], share, *known)
    return found


def frechet(one: Found, other: Found) -> tuple[float, float] | None:
    """Difference of Fréchet distances, and its interval paired by seeds."""
    return _paired(one, other, "frechet_distance", "images")


def exact(one: Found, other: Found) -> tuple[float, float] | None:
    """Difference of the distances to the exact solution, and its interval paired by seeds."""
    return _paired(one, other, "from_exact", "exact_images")


def _paired(one: Found, other: Found, key: str, count: str) -> tuple[float, float] | None:
    """Of the figures `key`, which each has without each block too; None if they do not compare."""
    without = [np.array(each[f"{key}_without_block"]) for each in (one, other)]
    if one[count] != other[count] or not len(without[0]):
        return None
    return one[key] - other[key], half_width(without[0] - without[1])
