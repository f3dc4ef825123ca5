"""Runs the exported models of a repository with any sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from flowturbo import LocalPipeline
from flowturbo.contract import Role
from flowturbo.errors import RepositoryError, RequestError
from flowturbo.generate import awaited, decode, image_block, in_chunks
from flowturbo.latents import noise
from flowturbo.nets.checkpoint import load_predictor
from flowturbo.nets.sit import GUIDED_CHANNELS
from flowturbo.nets.weights import CheckpointError, sha256
from flowturbo.pipeline import Pipeline, read_pipeline
from flowturbo.rows import Infer, Tensors, to_images, to_rows
from flowturbo.solver.calls import Network, PredictorCall, Variant
from flowturbo.solver.guidance import Guidance, guide
from flowturbo.solver.program import compile_program
from flowturbo.solver.sampler import Array, run_sync
from flowturbo.solver.schedule import Schedule
from research.quality import samplers
from research.quality.samplers import Counted, Velocity

Make = Callable[[Array, Array], Array]  # labels [n] and seeds [n] to images [n, H, W, 3] uint8

BATCH = 25  # images made at once; the models allow 32 guided images
EXACT_TOLERANCE = 1e-4  # per step: latents are accurate to 0.001, a tenth of the solvers' distances


@dataclass(frozen=True)
class SamplingSpec:
    """How images are made: `sampler` is a schedule (H1P5R3) or a baseline (samplers.py).

    `interval` is the guidance interval, `variant` the form of refiner steps. Raises RequestError
    for values that cannot be read.
    """

    sampler: str
    guidance_scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    variant: str = Variant.REFERENCE.value

    def __post_init__(self) -> None:
        if self.schedule is None:
            samplers.parse(self.sampler)
        Guidance(self.guidance_scale, self.interval)
        if self.variant not in [*Variant]:
            allowed = ", ".join(Variant)
            raise RequestError(f"variant must be one of {allowed}, got {self.variant!r}")

    @property
    def schedule(self) -> Schedule | None:
        """The schedule, None for a baseline."""
        return None if samplers.is_baseline(self.sampler) else Schedule.parse(self.sampler)

    @property
    def guidance(self) -> Guidance:
        return Guidance(self.guidance_scale, self.interval)

    def __str__(self) -> str:
        """The whole spec as part of a file name."""
        text = f"{self.sampler.replace(':', '-')}_g{self.guidance_scale:g}"
        if self.interval != (0.0, 1.0):
            text += f"_from{self.interval[0]:g}to{self.interval[1]:g}"
        return text + f"_{self.variant}" * (self.variant != Variant.REFERENCE)


def find_sampler(text: str, pipeline: Pipeline) -> str:
    """The sampler that `text` names: a baseline, a schedule, or the schedule of a preset.

    Raises RequestError if `text` cannot be read, or needs a refiner that `pipeline` lacks.
    """
    if samplers.is_baseline(text):
        samplers.parse(text)
        return text
    try:
        return str(pipeline.find_schedule(text))
    except RequestError as error:
        raise RequestError(f"{error}; {samplers.HELP}") from None


def check_decoder(repository: Path, pipeline: Pipeline) -> None:
    """Raises RepositoryError if `pipeline`, of `repository`, makes latents only."""
    if not pipeline.has(Role.DECODER):
        raise RepositoryError(f"{repository} makes latents only: export it with --vae")


@dataclass(frozen=True)
class Made:
    """`latent` [n, C, h, w], `image` [n, H, W, 3] uint8, and the evaluations per network."""

    latent: Array
    image: Array
    predictor: int
    refiner: int


class Engine(LocalPipeline):
    """Runs a repository in this process, with schedules and with baselines.

    The service's limit of images per request does not apply: BATCH images are made at once.
    """

    def __init__(self, model_repository: str | Path) -> None:
        super().__init__(model_repository)
        most = max(BATCH, self.settings.max_images)
        self.settings = replace(self.settings, max_images=most)

    def make(self, spec: SamplingSpec, labels: Array, seeds: Array) -> Made:
        """Images of the classes `labels` [n] from `seeds` [n]; needs a decoder."""
        schedule = spec.schedule
        if schedule is None:
            return self._baseline(spec, labels, seeds)
        result = self.generate(
            labels,
            seeds,
            spec.sampler,
            spec.guidance_scale,
            guidance_interval=spec.interval,
            variant=spec.variant,
        )
        assert result.image is not None
        return Made(result.latent, result.image, *schedule_evaluations(schedule))

    def _baseline(self, spec: SamplingSpec, labels: Array, seeds: Array) -> Made:
        chunked = in_chunks(awaited(self._infer), self.pipeline.max_rows)

        def infer(role: Role, tensors: Tensors) -> tuple[Array, ...]:
            return run_sync(chunked(role, tensors))

        counted = Counted(velocity(infer, self.pipeline, labels, spec.guidance))
        latent = samplers.parse(spec.sampler)(counted, noise(seeds, self.pipeline.latent_shape))
        image = run_sync(decode(chunked, latent))
        return Made(latent, image, counted.evaluations, 0)


def schedule_evaluations(schedule: Schedule) -> tuple[int, int]:
    """How often `schedule` evaluates the predictor and the refiner."""
    program = compile_program(schedule)
    return program.evaluations(Network.PREDICTOR), program.evaluations(Network.REFINER)


def velocity(infer: Infer, pipeline: Pipeline, labels: Array, guidance: Guidance) -> Velocity:
    """The guided velocity of images of the classes `labels` [n], by calls that do not move `x`."""

    block = run_sync(image_block(awaited(infer), pipeline, labels, guidance))

    async def evaluate(x: Array, t: float) -> Array:
        rows = to_rows(x, guidance)
        _, found = await block(PredictorCall(0, t, t, t), rows, np.zeros_like(rows))
        return to_images(found, guidance)

    return lambda x, t: run_sync(evaluate(x, t))


class Exact:
    """The exact flow: the predictor of a checkpoint in float32, integrated to EXACT_TOLERANCE.

    Guidance acts on the first `guided_channels`. `weights` and `num_heads` are as in the export.
    `digest` identifies the flow. Raises CheckpointError.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        guided_channels: int = GUIDED_CHANNELS,
        weights: str | None = None,
        num_heads: int | None = None,
        num_classes: int | None = None,
        reverse_time: bool = False,
    ) -> None:
        self.digest = sha256(checkpoint)[:12]
        if weights:
            self.digest += f"_{weights}"
        if num_heads:
            self.digest += f"_{num_heads}heads"
        if guided_channels != GUIDED_CHANNELS:
            self.digest += f"_{guided_channels}guided"
        if num_classes:
            self.digest += f"_{num_classes}classes"
        if reverse_time:
            self.digest += "_reversed"
        self._guided_channels = guided_channels
        self._network = load_predictor(
            checkpoint, weights, num_heads, num_classes=num_classes, reverse_time=reverse_time
        )
        config = self._network.config
        self.num_classes = config.num_classes
        self.latent_shape = config.latent_shape

    @classmethod
    def of_repository(cls, checkpoint: Path, repository: Path) -> Exact:
        """`checkpoint`, read and guided as in the export of `repository`.

        Raises CheckpointError if the repository was exported from another file.
        """
        made_from = read_pipeline(repository).fingerprint
        options = made_from["options"]
        if sha256(checkpoint) != made_from["sha256"][Role.PREDICTOR]:
            raise CheckpointError(
                f"{checkpoint} is not the file that {repository} was exported from: give the "
                "file that the export had as --predictor"
            )
        return cls(
            checkpoint,
            guided_channels=options["guidance_channels"],
            weights=options["weights"],
            num_heads=options["num_heads"],
            num_classes=options["num_classes"],
            reverse_time=options["reverse_time"],
        )

    def velocity(self, labels: Array, guidance: Guidance) -> Velocity:
        """The guided velocity of images of the classes `labels` [n]."""
        channels = self._guided_channels
        label = torch.from_numpy(labels)
        null = torch.full_like(label, self.num_classes)

        @torch.inference_mode()
        def evaluate(x: Array, t: float) -> Array:
            rows, times = torch.from_numpy(x), torch.full((len(x),), t)
            v: torch.Tensor = self._network(rows, times, label)
            if guidance.applies_at(t):
                u = self._network(rows, times, null)
                guided = guide(v, u, guidance.scale)
                v = torch.cat([guided[:, :channels], v[:, channels:]], 1)
            return v.numpy()

        return evaluate

    def latent(self, labels: Array, seeds: Array, guidance: Guidance) -> Array:
        """Latents [n, C, h, w] float32 of the classes `labels` [n] from `seeds` [n]."""
        solve = samplers.dopri5(EXACT_TOLERANCE, EXACT_TOLERANCE)
        return solve(self.velocity(labels, guidance), noise(seeds, self.latent_shape))


def distances(one: Array, other: Array) -> Array:
    """RMS difference of each latent of `one` from that of `other`, [n].

    Reports give their mean, not an RMS over all images. Some noises lie where the flow branches:
    any solver's error sends them to another branch. These few would dominate an RMS.
    """
    apart = np.square(one.astype(np.float64) - other)
    return np.sqrt(apart.mean(tuple(range(1, apart.ndim))))
