"""Candidate schedules, and the time of each from the measured times of the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.capacity.block_times import BlockTimes, measure
from flowturbo.contract import Role
from flowturbo.generate import roles_called
from flowturbo.pipeline import Pipeline
from flowturbo.settings import Settings
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.program import outline
from flowturbo.solver.schedule import Schedule
from research.quality.engine import schedule_evaluations

MAX_EVALUATIONS = 32  # of the predictor: the paper's longest schedule has 25
_HEUN, _PSEUDO = (1, 2, 3, 5, 8), (0, 1, 2, 3, 5, 7, 9)
_KEPT, _REFINED = ("", "Z1", "Z2"), ("R1", "R2", "R3", "R5")
_SHIFTS = (1.0, 2.0, 3.0)  # of the time grid


@dataclass(frozen=True)
class Cost:
    """The time of a single request.

    `block_ms` is one execution of each model at the request's rows; `overhead_ms` is per call.
    """

    block_ms: dict[str, float]
    overhead_ms: float

    @classmethod
    def of(cls, times: BlockTimes, images: int, guidance: Guidance) -> Cost:
        """For `images` images in one batch; raises ValueError for more rows than measured."""
        rows = images * guidance.rows
        of_rows = {model: images if model == Role.DECODER else rows for model in times.times_ms}
        block_ms = {model: times.table(model, n)[n] for model, n in of_rows.items()}
        return cls(block_ms, times.overhead_ms)

    def ms(self, schedule: Schedule) -> float:
        """Milliseconds per request, all its images together."""
        models = roles_called(outline(schedule))
        models += [Role.DECODER] * (Role.DECODER in self.block_ms)
        return sum(self.block_ms[model] + self.overhead_ms for model in models)


def check_images(images: int, guidance: Guidance, pipeline: Pipeline, settings: Settings) -> None:
    """Raises ValueError unless `images` fit in one request and one batch."""
    most = min(settings.max_images, pipeline.max_rows // guidance.rows)
    if not 1 <= images <= most:
        raise ValueError(f"--images must be 1 to {most} here, got {images}")


def measured(repository: Path, name: str, images: int, guidance: Guidance) -> BlockTimes:
    """The block times of pipeline `name` that Cost needs, measured here."""
    return BlockTimes(measure(repository, sizes=(images, images * guidance.rows), name=name))


def candidates(*, has_refiner: bool, learned: Sequence[int] = ()) -> list[Schedule]:
    """All candidates up to MAX_EVALUATIONS, each on every grid of _SHIFTS.

    They have the paper's order, HaPbRc. A may replace H and P; Z may replace R. H, P and A also
    stand alone, and so do B, C, D, G, U and V. `learned` has the numbers of evaluations of the
    fitted solvers.
    """
    heads = [f"H{a}P{b}" for a in _HEUN for b in _PSEUDO] + [f"A{n}" for n in range(4, 13)]
    texts = [head + tail for head in heads for tail in (*_KEPT, *_REFINED * has_refiner)]
    texts += [f"{letter}{n}" for letter in "HPA" for n in range(2, MAX_EVALUATIONS + 1)]
    # With three evaluations those of the next order are the same.
    texts += [f"{letter}{n}" for letter in "BDU" for n in range(3, 13)]
    texts += [f"{letter}{n}" for letter in "CGV" for n in range(4, 13)]
    plain = dict.fromkeys(map(Schedule.parse, texts))
    short = [s for s in plain if schedule_evaluations(s)[0] <= MAX_EVALUATIONS]
    # Without a shift it is the grid of the pipeline: uniform for SiT.
    shifts = [None if shift == 1 else shift for shift in _SHIFTS]
    found = [replace(schedule, shift=shift) for schedule in short for shift in shifts]
    return [*found, *(Schedule.parse(f"L{count}") for count in learned)]
