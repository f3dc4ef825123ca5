"""Chooses the front and the presets from rated schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowturbo.solver.schedule import Schedule
from tuning.scores import Score

DEFINITIONS = {
    "fast": "the fastest whose figure is no higher than the paper's, else `best`",
    "balanced": "between the two, the farthest below the line through them on logarithmic axes",
    "best": "the fastest within the cap that is not surely worse than another",
}


@dataclass(frozen=True)
class Rated:
    """A schedule, its milliseconds per request, and its figure of merit."""

    schedule: Schedule
    ms: float
    score: Score

    def stated(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "schedule": str(self.schedule),
            "ms": round(self.ms, 3),
            "metric": self.score.value,
            "interval": self.score.interval,
        }


@dataclass(frozen=True)
class Choice:
    """The front from the fastest to the best, its presets, and the choice for the target.

    `otherwise` has what stands in for a preset that is a solver of whole schedules.
    """

    front: Sequence[Rated]
    presets: Mapping[str, Rated]
    paper: Rated
    recommended: Rated | None
    otherwise: Mapping[str, Rated]

    def stated(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "presets": {name: self._stated(name) for name in self.presets},
            "definitions": DEFINITIONS,
            "recommended": self.recommended and self.recommended.stated(),
            "paper": self.paper.stated(),
            "front": [each.stated() for each in self.front],
        }

    def _stated(self, name: str) -> dict[str, Any]:
        stated, other = self.presets[name].stated(), self.otherwise.get(name)
        return stated | {"otherwise": str(other.schedule)} if other else stated


def choose(
    tried: Sequence[Rated],
    paper: Schedule,
    cap_ms: float,
    quality: float | None,
    dropped: Sequence[Rated] = (),
) -> Choice:
    """Chooses from `tried`, which must include `paper` and a schedule within `cap_ms`.

    Recommends the best schedule within the cap, or the fastest that reaches `quality`. Those that
    were `dropped` before can still stand in for presets that belong to one time grid.
    """
    within = [[each for each in of if each.ms <= cap_ms] for of in (tried, dropped)]
    of_front = front(within[0])
    of_paper = next(each for each in tried if each.schedule == paper)
    best = best_of(of_front)
    chosen = presets(of_front, of_paper.score.value)
    return Choice(
        of_front,
        chosen,
        of_paper,
        best if quality is None else fastest_as_good(of_front, quality),
        _otherwise(chosen, within, of_paper.score.value),
    )


def _otherwise(
    chosen: Mapping[str, Rated], kinds: Sequence[Sequence[Rated]], of_paper: float
) -> dict[str, Rated]:
    """What serves requests that a chosen solver of whole schedules cannot.

    It is the preset that would be chosen without such solvers, from the first of `kinds` that has
    others.
    """
    for rated in kinds:
        if others := front(each for each in rated if not each.schedule.alone):
            instead = presets(others, of_paper)
            return {name: instead[name] for name, each in chosen.items() if each.schedule.alone}
    return {}


def front(rated: Iterable[Rated]) -> list[Rated]:
    """The Pareto front of time and figure, from the fastest to the best."""
    found: list[Rated] = []
    for each in sorted(rated, key=lambda r: (r.ms, r.score.value)):
        if not found or each.score.value < found[-1].score.value:
            found.append(each)
    return found


def best_of(of_front: Sequence[Rated]) -> Rated:
    """The preset `best` of DEFINITIONS."""
    return next(
        each
        for each in of_front
        if not any(each.score.surely_above(other.score) for other in of_front)
    )


def fastest_as_good(of_front: Sequence[Rated], figure: float) -> Rated | None:
    """The fastest whose figure is at most `figure`; None if there is none."""
    return next((each for each in of_front if each.score.value <= figure), None)


def presets(of_front: Sequence[Rated], of_paper: float) -> dict[str, Rated]:
    """The presets of DEFINITIONS; `of_paper` is the figure of the paper's fast schedule."""
    best = best_of(of_front)
    fast = fastest_as_good(of_front, of_paper) or best
    fast = min(fast, best, key=lambda each: each.ms)
    between = of_front[of_front.index(fast) : of_front.index(best) + 1]
    return {"fast": fast, "balanced": knee(between), "best": best}


def knee(of_front: Sequence[Rated]) -> Rated:
    """The one farthest below the line from the first to the last, on logarithmic axes.

    It is neither of the two, if there are others.
    """
    points = [(math.log(each.ms), math.log(each.score.value)) for each in of_front]
    (x0, y0), (x1, y1) = points[0], points[-1]
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
    below = [y0 + slope * (x - x0) - y for x, y in points]
    inner = below[1:-1] or below[:1]
    return of_front[below.index(max(inner))]
