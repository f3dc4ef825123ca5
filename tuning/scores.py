"""The distance of a schedule's latents to the exact solution, and its confidence interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowturbo.contract import GUIDANCE_SCALE, LATENT, SCHEDULE, SEED
from flowturbo.request import parse_request
from flowturbo.solver.calls import Variant
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.program import compile_program
from flowturbo.solver.sampler import Array
from flowturbo.solver.schedule import Schedule
from research.quality.engine import BATCH, Engine, Exact, distances
from research.quality.evaluate import exact_latents, kept, models_digest
from research.quality.metrics import half_width, mean_without

HEUN_STEPS = 64  # of the replacement for the exact solution, without a checkpoint


@dataclass(frozen=True)
class Score:
    """A figure (lower is better), and its values without each of BLOCKS blocks of seeds."""

    value: float
    without: tuple[float, ...]

    @classmethod
    def of(cls, distances: Array) -> Score:
        """The mean of `distances`, one per seed, [n >= BLOCKS]."""
        return cls(float(distances.mean()), mean_without(distances))

    @property
    def interval(self) -> float:
        """Half the width of the 95% interval over seeds (research.quality.metrics)."""
        return half_width(self.without)

    def surely_above(self, other: Score) -> bool:
        """Whether it is above `other` at 95% confidence, from paired differences per seed."""
        difference = np.subtract(self.without, other.without)
        return self.value - other.value > half_width(difference)


class Distances:
    """Distances of schedules to `solved` [n, C, h, w], the exact latents of seeds 0 to n - 1.

    Each latent is made once, even if its schedule is scored several times.
    """

    def __init__(self, pipeline: Engine, guidance: Guidance, solved: Array) -> None:
        self._pipeline, self._guidance, self._solved = pipeline, guidance, solved
        self._known: dict[Schedule, Array] = {}

    def score(self, schedule: Schedule, count: int) -> Score:
        """The score over the first `count` seeds."""
        known = self._known.get(schedule, np.zeros(0))
        if len(known) < count:
            made = latents(self._pipeline, schedule, self._guidance, range(len(known), count))
            apart = distances(made, self._solved[len(known) : count])
            known = np.concatenate([known, apart])
            self._known[schedule] = known
        return Score.of(known[:count])


def latents(
    pipeline: Engine, schedule: Schedule, guidance: Guidance, seeds: Iterable[int]
) -> Array:
    """Latents [n, C, h, w] of `seeds` and their subjects."""
    every = np.fromiter(seeds, np.int64)
    parts = np.array_split(every, -(-len(every) // BATCH))
    return np.concatenate([prepared(pipeline, schedule, guidance, part)() for part in parts])


def prepared(
    pipeline: Engine, schedule: Schedule, guidance: Guidance, seeds: Array
) -> Callable[[], Array]:
    """What makes the latents of one request, whose program is compiled."""
    tensors = {
        **pipeline.subject.tensors(seeds),
        SEED: seeds,
        SCHEDULE: np.array([str(schedule)], dtype=object),
        GUIDANCE_SCALE: np.array([guidance.scale], dtype=np.float32),
    }
    request = parse_request(tensors, [LATENT], pipeline.pipeline, pipeline.settings)
    # Not program_for: it warns of long refiner steps, whose effect is measured here.
    fitted = pipeline.pipeline.fitted(schedule, guidance.scale)
    program = compile_program(schedule, None, Variant(pipeline.settings.variant), fitted)
    return lambda: pipeline.run(request, program)[LATENT]


def solve(
    pipeline: Engine,
    repository: Path,
    predictor: Path | None,
    guidance: Guidance,
    count: int,
    cache: Path,
) -> tuple[str, Array]:
    """The name of a network, and its exact latents of the first `count` seeds [count, C, h, w].

    The network is the checkpoint `predictor` in float32. Without one it is the deployed predictor
    with HEUN_STEPS Heun steps: more steps gain nothing. Then its rounding does not count as error.
    Latents are cached in `cache`.
    """
    cache.mkdir(parents=True, exist_ok=True)
    name = pipeline.pipeline.name
    name = pipeline.pipeline.name
    if predictor is not None:
        exact = Exact.of_repository(predictor, repository, name)
        found = exact_latents(exact, pipeline.subject, guidance, count, cache)
        return f"{predictor.name} in float32", found
    models = models_digest(repository, name)
    path = cache / f"heun{HEUN_STEPS}_{models}_g{guidance.scale:g}_{count}.npy"
    schedule = Schedule("H" * HEUN_STEPS)
    solved = kept(path, lambda: latents(pipeline, schedule, guidance, range(count)))
    return f"the deployed predictor, Heun, {HEUN_STEPS} steps", solved
