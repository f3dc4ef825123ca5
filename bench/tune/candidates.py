"""Schedules worth a look, and what each takes, from the measured times of the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.capacity.block_times import BlockTimes, measure
from flowturbo import contract
from flowturbo.generate import models_called
from flowturbo.guidance import Guidance
from flowturbo.program import Network, compile_program
from flowturbo.repository import Pipeline
from flowturbo.schedule import Schedule

MOST_EVALUATIONS = 32  # of the predictor: the paper's longest schedule has 25
_HEUN, _PSEUDO, _REFINER = range(1, 9), range(10), range(7)


@dataclass(frozen=True)
class Cost:
    """What one request that is alone takes.

    `block_ms` is one execution of each model at the request's rows, `overhead_ms` each call's.
    """

    block_ms: dict[str, float]
    overhead_ms: float

    @classmethod
    def of(cls, times: BlockTimes, images: int, guidance: Guidance) -> Cost:
        """Of `images` images, which are one batch; raises ValueError for more than is measured."""
        rows = images * (2 if guidance.used else 1)
        of_rows = {model: images if model == contract.DECODER else rows for model in times.times_ms}
        block_ms = {model: times.table(model, n)[n] for model, n in of_rows.items()}
        return cls(block_ms, times.overhead_ms)

    def ms(self, schedule: Schedule) -> float:
        """Milliseconds of a request, all its images together."""
        models = models_called(compile_program(schedule))
        models += [contract.DECODER] * (contract.DECODER in self.block_ms)
        return sum(self.block_ms[model] + self.overhead_ms for model in models)


def measured(repository: Path, images: int, guidance: Guidance) -> BlockTimes:
    """What Cost needs of `repository`, measured here; raises ValueError for too many images."""
    rows, most = images * (2 if guidance.used else 1), Pipeline.load(repository).max_rows
    if not 1 <= rows <= most:
        raise ValueError(f"--images {images} is {rows} rows, a batch has 1 to {most}")
    return BlockTimes(measure(repository, sizes=(images, rows)))


def candidates(*, has_refiner: bool) -> list[Schedule]:
    """H a P b R c in the paper's order, and H, P and A alone, up to MOST_EVALUATIONS."""
    texts = [
        f"H{a}P{b}R{c}" for a in _HEUN for b in _PSEUDO for c in (_REFINER if has_refiner else (0,))
    ]
    texts += [f"{letter}{n}" for letter in "HPA" for n in range(2, MOST_EVALUATIONS + 1)]
    schedules = dict.fromkeys(map(Schedule.parse, texts))
    return [s for s in schedules if evaluations(s) <= MOST_EVALUATIONS]


def evaluations(schedule: Schedule) -> int:
    """Of the predictor."""
    return compile_program(schedule).evaluations(Network.PREDICTOR)
