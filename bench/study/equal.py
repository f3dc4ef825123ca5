"""The fastest of each kind that is as good as a Heun schedule."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.quality.metrics import half_width

Study = dict[str, Any]
Found = dict[str, Any]  # one point's figures

HEUN = ("H4", "H8", "H12")
KINDS = (
    ("Heun, shifted", r"H\d+@.*"),
    ("FlowTurbo", r"H\d+(P\d+)?R\d+"),
    ("FlowTurbo, shifted", r"H\d+(P\d+)?R\d+@.*"),
    ("FlowTurbo, Z for R", r"H\d+(P\d+)?Z\d+"),
    ("FlowTurbo, Z for R, shifted", r"H\d+(P\d+)?Z\d+@.*"),
    ("Adams-Bashforth 2", r"A\d+"),
    ("Adams-Bashforth 2, shifted", r"A\d+@.*"),
    ("UniPC, DPM-Solver++", r"(unipc|dpm):\d+"),
    ("UniPC, shifted", r"unipc:\d+@.*"),
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
    for name, form in KINDS:
        for each in points:
            known = apart(each, heun)
            if not re.fullmatch(form, each["sampler"]) or known is None or known[0] > 0:
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
