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
    ("Adams-Bashforth 2", r"A\d+"),
    ("Adams-Bashforth 2, shifted", r"A\d+@.*"),
    ("UniPC, DPM-Solver++", r"(unipc|dpm):\d+"),
    ("UniPC, shifted", r"unipc:\d+@.*"),
)


@dataclass(frozen=True)
class Rival:
    """The fastest of a kind as good as Heun: its share of Heun's time, and how it differs.

    `difference` is its figure less Heun's, `interval` half the 95% interval of that, None where the
    figure has none.
    """

    sampler: str
    share: float
    difference: float
    interval: float | None


Difference = Callable[[Found, Found], tuple[float, float | None] | None]


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
    """Difference of Fréchet distances, and its interval paired by seeds; None if it has none."""
    without = [np.array(each["frechet_without_block"]) for each in (one, other)]
    if one["images"] != other["images"] or not len(without[0]):
        return None
    apart = one["frechet_distance"] - other["frechet_distance"]
    return apart, half_width(without[0] - without[1])


def exact(one: Found, other: Found) -> tuple[float, None]:
    """Difference of the distances to the exact solution."""
    return one["exact_rms"] - other["exact_rms"], None
