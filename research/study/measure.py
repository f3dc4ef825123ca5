"""Measures one point: time relative to H8, distance to the exact solution, image quality."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.observe import spread
from flowturbo.latents import noise
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.sampler import Array
from research.quality.engine import BATCH, Engine, Exact, Made, SamplingSpec, distances
from research.quality.evaluate import Evaluator, Local, described, digests, exact_latents
from research.quality.images import ImageFolder
from research.quality.metrics import half_width, mean_without
from research.quality.subjects import Subject
from research.study.points import MAIN, Point

BASELINE = "H8"
STABILITY_STEPS = 32

Figures = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Measures points with the engines of all repositories.

    It times `rounds` batches of BATCH images and compares them with the exact solution. The folder
    `work` keeps images and exact solutions.
    """

    engines: Mapping[str, Engine]
    repositories: Mapping[str, Path]
    exact: Exact
    eyes: Evaluator
    work: Path
    rounds: int

    def point(self, point: Point) -> Figures:
        """Measures all figures of `point`, as JSON values."""
        spec, engine = point.spec, self.engines[point.repository]
        said = described(spec, self.repositories[point.repository], "process", engine.pipeline.name)
        networks = digests(said)
        name = "_".join([point.repository, str(spec), *networks.values()])
        folder = ImageFolder(self.work / "images" / name, said, engine.subject)
        figures = self._beside_baseline(engine, point, folder)
        folder.fill(point.images, Local(engine, spec))
        stated = {"repository": point.repository, **networks, **asdict(spec)}
        return stated | figures | asdict(self.eyes.figures(folder, point.images))

    def seconds_an_evaluation(self) -> float:
        """Estimates the time per predictor evaluation of one row, decoder included."""
        engine, seeds = self.engines[MAIN], np.arange(BATCH)
        spec = SamplingSpec(BASELINE, 1.0)
        engine.make(spec, seeds)  # the first call is slower
        seconds, made = _timed(engine, spec, seeds)
        return seconds / BATCH / made.predictor

    def _beside_baseline(self, engine: Engine, point: Point, folder: ImageFolder) -> Figures:
        """Times `point` and the baseline at the same guidance scale in turns, in changing order."""
        spec, images = point.spec, point.images
        baseline, main = SamplingSpec(BASELINE, spec.guidance_scale), self.engines[MAIN]
        times: list[tuple[float, float]] = []
        latents: list[Array] = []
        seeds = np.arange(min(BATCH, images))
        engine.make(spec, seeds)  # a runtime's first call is slower
        for k in range(min(self.rounds, -(-images // BATCH))):
            seeds = np.arange(k * BATCH, min((k + 1) * BATCH, images))
            turns = [(engine, spec), (main, baseline)]
            done = [_timed(*turn, seeds) for turn in (turns if k % 2 else turns[::-1])]
            (own_s, made), (other_s, _) = done if k % 2 else done[::-1]
            times.append((1e3 * own_s / len(seeds), 1e3 * other_s / len(seeds)))
            latents.append(made.latent)
            folder.write(seeds, made.image)
        latent = np.concatenate(latents)
        solved = exact_latents(self.exact, main.subject, spec.guidance, len(latent), self.work)
        apart = distances(latent, solved)
        return {
            "predictor": made.predictor,
            "refiner": made.refiner,
            **summary(times),
            "from_exact": float(apart.mean()),
            "from_exact_without_block": (without := mean_without(apart)),
            "from_exact_interval": half_width(without) if without else None,
            "exact_images": len(latent),
        }


def _timed(engine: Engine, spec: SamplingSpec, seeds: Array) -> tuple[float, Made]:
    started_s = time.perf_counter()
    made = engine.make(spec, seeds)
    return time.perf_counter() - started_s, made


def summary(times: list[tuple[float, float]]) -> Figures:
    """Summarises rounds: each has the ms per image of a point and of the baseline."""
    own, baseline = zip(*times, strict=True)
    ratios = [one / other for one, other in times]
    return {
        "ms_per_image": statistics.median(own),
        "baseline_ms_per_image": statistics.median(baseline),
        "ratio": spread(ratios),
        "rounds": len(times),
    }


def stability(exact: Exact, subject: Subject, guidance: Guidance, images: int) -> Figures:
    """|v(t + h) - v(t)| / |v(t)| along the flow, h = 1 / STABILITY_STEPS, over `images` images.

    v is the guided velocity; the norm is over the latent of one image. The solver is
    Adams-Bashforth 2 after one Heun step, because it evaluates v at the points of the grid only.
    """
    seeds, h = np.arange(images), np.float32(1 / STABILITY_STEPS)
    velocity = exact.velocity(subject, seeds, guidance)
    x = noise(seeds, exact.latent_shape)
    v = velocity(x, 0.0)
    before = 2 * v - velocity(x + h * v, float(h))  # the first step becomes Heun's
    rows = []
    for k in range(1, STABILITY_STEPS):
        x = x + h * (1.5 * v - 0.5 * before)
        before, v = v, velocity(x, k / STABILITY_STEPS)
        rows.append(_norm(v - before) / _norm(before))
    low, middle, high = np.percentile(rows, [10, 50, 90], axis=1).tolist()
    t = [k / STABILITY_STEPS for k in range(STABILITY_STEPS - 1)]
    return {"t": t, "median": middle, "low": low, "high": high, "images": images}


def _norm(rows: Array) -> Array:
    return np.sqrt(np.square(rows.astype(np.float64)).sum((1, 2, 3)))
