"""Successive halving: a few latents for every schedule, more for those that remain."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from tqdm import tqdm

from flowturbo.solver.schedule import Schedule
from tuning.choice import Rated
from tuning.scores import Score

KEPT = 3  # a stage keeps one schedule in three
_SHARES = (5, 2, 1)  # the stages use a fifth, half, and all of the latents

Scorer = Callable[[Schedule, int], Score]  # of a schedule, over the first n seeds


def search(
    cost_ms: Mapping[Schedule, float], score: Scorer, count: int, kept: Collection[Schedule]
) -> list[list[Rated]]:
    """The rated schedules of each stage; the last stage uses `count` seeds.

    A stage keeps the third that is closest to the Pareto front. So schedules of every duration
    remain. Those in `kept` always stay.
    """
    stages: list[list[Rated]] = []
    left = list(cost_ms)
    for share in _SHARES:
        seeds = count // share
        bar = tqdm(left, f"{len(left)} schedules, {seeds} latents")
        stages.append(
            [Rated(schedule, cost_ms[schedule], score(schedule, seeds)) for schedule in bar]
        )
        found = finalists(stages[-1], max(1, len(left) // KEPT), kept)
        left = [each.schedule for each in found]
    return stages


def finalists(rated: Sequence[Rated], count: int, kept: Collection[Schedule]) -> list[Rated]:
    """The `nearest` of `rated`, and those in `kept`."""
    of_kept = [each for each in rated if each.schedule in kept]
    return list(dict.fromkeys([*nearest(rated, count), *of_kept]))


def nearest(rated: Iterable[Rated], count: int) -> list[Rated]:
    """The `count` candidates closest to the Pareto front.

    More if the front has more: it is never cut.
    """
    excess: list[tuple[float, Rated]] = []
    best = float("inf")
    for each in sorted(rated, key=lambda r: (r.ms, r.score.value)):
        best = min(best, each.score.value)
        excess.append((each.score.value / best, each))
    excess.sort(key=lambda pair: pair[0])
    return [each for k, (above, each) in enumerate(excess) if k < count or above == 1.0]
