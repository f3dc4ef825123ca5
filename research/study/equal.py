"""Families of samplers, and the fastest sampler of each that is as good as a Heun schedule."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from research.quality.engine import SamplingSpec
from research.quality.metrics import half_width
from research.study.measure import BASELINE
from research.study.points import MAIN, Point

Found = dict[str, Any]  # the figures of one point

HEUN = ("H4", "H8", "H12")
FRECHET, EXACT = "frechet_distance", "from_exact"
_COUNTS = {FRECHET: "images", EXACT: "exact_images"}
AS_GOOD = 0.01  # a sampler is as good as Heun if its figure is at most this share above Heun's

# Families by the form of a sampler's name. The first match counts.
_FAMILIES = (
    ("UniPC, shifted", r"U\d+@.*"),
    ("UniPC", r"U\d+"),
    ("DPM-Solver++, shifted", r"D\d+@.*"),
    ("DPM-Solver++", r"D\d+"),
    ("Heun", r"H\d+"),
    ("Heun, shifted", r"H\d+@.*"),
    ("Euler", r"E\d+"),
    ("Adams-Bashforth 2", r"A\d+"),
    ("Adams-Bashforth 2, shifted", r"A\d+@.*"),
    ("learned", r"L\d+"),
    ("NeuralSolver", r"N\d+"),
    ("UniPC of order 3, shifted", r"V\d+@.*"),
    ("DPM-Solver++(3M), shifted", r"G\d+@.*"),
    ("pseudo corrector", r"(H1)?P\d+"),
    ("FlowTurbo", r"H\d+(P\d+)?R\d+"),
    ("FlowTurbo, shifted", r"H\d+(P\d+)?R\d+@.*"),
    ("FlowTurbo with T for R", r"H\d+(P\d+)?T\d+"),
    ("FlowTurbo with T for R, shifted", r"H\d+(P\d+)?T\d+@.*"),
    ("FlowTurbo with Z for R", r"H\d+(P\d+)?Z\d+"),
    ("FlowTurbo with Z for R, shifted", r"H\d+(P\d+)?Z\d+@.*"),
)
FAMILIES = tuple(name for name, _ in _FAMILIES)


@dataclass(frozen=True)
class Rival:
    """The fastest sampler of a family that is as good as a Heun schedule.

    `share` is its time relative to Heun's. `difference` is its figure minus Heun's; `interval` is
    half the 95% interval of that difference.
    """

    sampler: str
    share: float
    difference: float
    interval: float


def family(sampler: str) -> str | None:
    """The name of `sampler`'s family, None for a schedule of another form."""
    return next((name for name, form in _FAMILIES if re.fullmatch(form, sampler)), None)


def time_share(found: Found) -> float:
    """Time per image relative to H8.

    Every point is timed in turns with H8, because the speed of the machine drifts.
    """
    # The measured ratio of H8 to itself is pure noise.
    share: float = 1.0 if found["sampler"] == BASELINE else found["ratio"]["median"]
    return share


def baseline(study: Mapping[str, Any], found: Found) -> Found | None:
    """H8's figures at `found`'s guidance scale and number of images; None if not measured."""
    spec = SamplingSpec(BASELINE, found["guidance_scale"])
    known: Found | None = study["points"].get(str(Point(spec, found["images"], MAIN)))
    return known


def rivals(points: Iterable[Found], heun: Found, figure: str) -> dict[str, Rival]:
    """The rival of each family among `points`, which have Heun's guidance.

    A family without a sampler as good as Heun is left out. `figure` is FRECHET or EXACT.
    """
    found: dict[str, Rival] = {}
    for each in points:
        name, apart = family(each["sampler"]), difference(each, heun, figure)
        if each is heun or name is None or apart is None or apart[0] > AS_GOOD * heun[figure]:
            continue
        share = time_share(each) / time_share(heun)
        if name not in found or share < found[name].share:
            found[name] = Rival(each["sampler"], share, *apart)
    return found


def difference(one: Found, other: Found, figure: str) -> tuple[float, float] | None:
    """`one`'s figure minus `other`'s, and half the 95% interval of it, paired by seeds.

    None if the two have different seeds.
    """
    count = _COUNTS[figure]
    without = [np.array(each[f"{figure}_without_block"]) for each in (one, other)]
    if one[count] != other[count] or not len(without[0]):
        return None
    return one[figure] - other[figure], half_width(without[0] - without[1])
