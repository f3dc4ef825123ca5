"""The fastest of each kind that is as good as a Heun schedule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from research.quality.metrics import half_width
from research.study.figures import family, time_share

Found = dict[str, Any]  # one point's figures

HEUN = ("H4", "H8", "H12")
FRECHET, EXACT = "frechet_distance", "from_exact"
_COUNTS = {FRECHET: "images", EXACT: "exact_images"}
AS_GOOD = 0.01  # a figure so much above Heun's, as a share of it, counts as no higher


@dataclass(frozen=True)
class Rival:
    """The fastest of a kind as good as Heun: its share of Heun's time, and how it differs.

    `difference` is its figure less Heun's, `interval` half the 95% interval of that.
    """

    sampler: str
    share: float
    difference: float
    interval: float


def rivals(points: Iterable[Found], heun: Found, figure: str) -> dict[str, Rival]:
    """By family, among `points` of the same guidance; those with none as good are left out.

    `figure` is FRECHET or EXACT. Times are each point's in turns with the same schedule, so that
    both had the same machine.
    """
    found: dict[str, Rival] = {}
    for each in points:
        kind, apart = family(each["sampler"]), difference(each, heun, figure)
        if each is heun or kind is None or apart is None or apart[0] > AS_GOOD * heun[figure]:
            continue
        name, share = kind[0], time_share(each) / time_share(heun)
        if name not in found or share < found[name].share:
            found[name] = Rival(each["sampler"], share, *apart)
    return found


def difference(one: Found, other: Found, figure: str) -> tuple[float, float] | None:
    """`one`'s figure less `other`'s, and half its 95% interval, paired by seeds.

    None where they are not of the same seeds.
    """
    count = _COUNTS[figure]
    without = [np.array(each[f"{figure}_without_block"]) for each in (one, other)]
    if one[count] != other[count] or not len(without[0]):
        return None
    return one[figure] - other[figure], half_width(without[0] - without[1])
