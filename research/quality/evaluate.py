"""Generates the images of one spec and measures their quality."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flowturbo_client import FlowTurboClient
from tqdm import tqdm

from flowturbo.conditions.class_label import LABEL
from flowturbo.conditions.prompt import PROMPT
from flowturbo.contract import LABEL_ROLES, Role, model_name
from flowturbo.pipeline import read_pipeline
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.sampler import Array
from research.quality.engine import (
    BATCH,
    EXACT_TOLERANCE,
    Engine,
    Exact,
    Make,
    SamplingSpec,
    distances,
    schedule_evaluations,
)
from research.quality.images import ImageFolder, beside
from research.quality.judges import (
    Classifier,
    Inception,
    Judge,
    SceneJudge,
    check_reference,
    load_reference,
)
from research.quality.metrics import Figures, figures
from research.quality.subjects import Classes, Subject
from training.frechet import Reference
from training.glyphs.pictures import CLASS_NAMES
from training.judging import Features

# Later export options at values that change nothing. Without them older digests stay valid.
_UNSET = [("num_classes", None), ("reverse_time", False)]
SERVED_BATCH, IN_FLIGHT = 8, 8  # images per request, requests at a time
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Evaluator:
    """The judge of images, and its statistics of real images."""

    judge: Judge
    reference: Reference

    @classmethod
    def open(
        cls, weights: Path, inception: Path | None, reference: Path | None, *subjects: Subject
    ) -> Evaluator:
        """The judge and the features in `weights`, unless the other two are given.

        `subjects` are those of the models. Raises ValueError if `inception` is given without
        `reference`. Raises it if `inception` is missing and a model has other classes than the
        glyphs. Raises it if the reference has other features than the judge.
        """
        if inception is not None and reference is None:
            raise ValueError(f"{inception} needs its own reference: give --reference")
        counts = [each.count for each in subjects if isinstance(each, Classes)]
        other = set(counts) - {len(CLASS_NAMES)}
        if inception is None and other:
            raise ValueError(
                f"the glyphs' classifier knows {len(CLASS_NAMES)} classes, the model has "
                f"{max(other)}: give --inception and --reference"
            )
        if 0 < len(counts) < len(subjects):
            raise ValueError("pipelines with classes and with prompts have different judges")
        judge: Judge
        if inception is not None:
            judge = Inception(inception)
        else:
            judge = SceneJudge(weights) if subjects and not counts else Classifier(weights)
        path = reference or weights / "features.npz"
        known = load_reference(path, judge)
        check_reference(path, known, judge)
        return cls(judge, known)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that identify the reference."""
        return hashlib.sha256(self.reference.pooled.mean.tobytes()).hexdigest()[:12]

    def figures(self, folder: ImageFolder, count: int) -> Figures:
        """The figures of the first `count` images of `folder`."""
        seen = Features.join(self.judge(images) for images in folder.batches(count))
        right = None
        if self.judge.knows_subjects:
            right = folder.subject.right(seen.probability, np.arange(count))
        return figures(seen, self.reference, right, classes=self.judge.has_classes)


def models_digest(repository: Path, name: str | None = None) -> str:
    """Twelve hexadecimal digits for the networks of `repository` and how they are computed.

    Another export of the same networks has the same digits, even if its ONNX files differ, such as
    in paths. So has one with other `fixed_rows`, which differs in rounding alone.
    """
    pipeline, stated = read_pipeline(repository, name, solvers=False), []
    made_from = pipeline.fingerprint
    options = {name: of for name, of in made_from["options"].items() if (name, of) not in _UNSET}
    # Keys as before pipelines had names, so that stored figures stay valid.
    digests = {model_name("", Role(role))[1:]: of for role, of in made_from["sha256"].items()}
    # Without the text encoder's role for classes, so that stored figures stay valid. The encoder of
    # images has no part in them.
    digests.pop(model_name("", Role.ENCODER)[1:], None)
    texts = [Role.TEXT_ENCODER] * pipeline.has(Role.TEXT_ENCODER)
    for role in (*LABEL_ROLES, *texts):
        record = pipeline.models.get(role)
        keys = ("engine", "runtime", "precision")
        stated.append([getattr(record, key) if record else None for key in keys])
        stated.append([digests, options] if record else [None, None])
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:12]


_DIGESTS = ("models", "solvers")  # of what makes the images; only learned schedules have solvers


def described(
    spec: SamplingSpec, repository: Path, source: str, name: str | None = None
) -> dict[str, Any]:
    """What an image folder records about how its images were made."""
    said = {"spec": str(spec), "models": models_digest(repository, name), "source": source}
    if spec.schedule and spec.schedule.learned:
        solvers = read_pipeline(repository, name).solvers
        said["solvers"] = solvers.digest if solvers else "none"
    return said


def digests(said: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the networks and solvers that make the images, from what `described` states."""
    return {key: said[key] for key in _DIGESTS if key in said}


def measured_with(known: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
    """Whether `known` figures are of the networks and solvers that `described` states."""
    return digests(known) == digests(said)


class Local:
    """Makes images in this process.

    `evaluations` are those of predictor and refiner per image. For dopri5 they are those of the
    last batch. For a baseline they are None before the first batch.
    """

    def __init__(self, engine: Engine, spec: SamplingSpec) -> None:
        self._engine, self._spec = engine, spec
        schedule = spec.schedule
        self.evaluations = schedule_evaluations(schedule) if schedule else None

    def __call__(self, seeds: Array) -> Array:
        """Images [n, H, W, 3] uint8 of `seeds` [n]."""
        made = self._engine.make(self._spec, seeds)
        self.evaluations = made.predictor, made.refiner
        return made.image


def served(
    client: FlowTurboClient, spec: SamplingSpec, subject: Subject, pipeline: str | None = None
) -> Make:
    """Makes images with a server, which runs schedules only, in the variant of its settings."""

    def make(seeds: Array) -> Array:
        asked = subject.asked(seeds)
        answer = client.generate(
            None if (labels := asked.get(LABEL)) is None else labels.tolist(),
            seeds.tolist(),
            spec.sampler,
            spec.guidance_scale,
            prompts=asked.get(PROMPT),
            pipeline=pipeline,
            guidance_interval=spec.interval,
            timeout_s=_TIMEOUT_S,
        )
        assert answer.images is not None  # requested by default
        return answer.images

    return make


def exact_latents(
    exact: Exact, subject: Subject, guidance: Guidance, count: int, folder: Path
) -> Array:
    """Exact latents [count, C, h, w] of the first `count` seeds, cached in `folder`."""
    low, high = guidance.interval
    name = f"exact_{exact.digest}_within{EXACT_TOLERANCE:g}_g{guidance.scale:g}_{low:g}_{high:g}"
    path = folder / f"{name}{subject.suffix}_{count}.npy"

    def solve() -> Array:
        parts = np.array_split(np.arange(count), -(-count // BATCH))
        shown = tqdm(parts, f"exact solutions, {guidance.scale:g}", leave=False)
        return np.concatenate([exact.latent(subject, seeds, guidance) for seeds in shown])

    return kept(path, solve)


def kept(path: Path, make: Callable[[], Array]) -> Array:
    """The array in the file `path` (.npy), made and written if it is absent."""
    if not path.exists():
        partial = beside(path)
        with partial.open("wb") as file:
            np.save(file, make())
        partial.rename(path)
    try:
        array: Array = np.load(path)
    except (EOFError, ValueError) as error:
        raise ValueError(f"{path} is not an array, remove it: {error}") from error
    return array


def exact_distance(engine: Engine, spec: SamplingSpec, solved: Array) -> float:
    """Mean distance of `spec`'s latents from `solved`, over seeds 0 to len(solved) - 1."""
    made = []
    for start in range(0, len(solved), BATCH):
        seeds = np.arange(start, min(start + BATCH, len(solved)))
        made.append(engine.make(spec, seeds).latent)
    return float(distances(np.concatenate(made), solved).mean())
