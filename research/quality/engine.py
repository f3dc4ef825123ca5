"""Runs the exported models of a repository with any sampler."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.source import source_digests
from flowturbo import LocalPipeline
from flowturbo.conditions.prompt import PROMPT
from flowturbo.contract import SEED, Role
from flowturbo.errors import RepositoryError, RequestError
from flowturbo.generate import awaited, decode, image_block, in_chunks
from flowturbo.latents import noise
from flowturbo.local import open_role
from flowturbo.nets.checkpoint import load_predictor
from flowturbo.nets.families.family import FolderOptions
from flowturbo.nets.sit import GUIDED_CHANNELS
from flowturbo.nets.weights import CheckpointError, sha256
from flowturbo.pipeline import Pipeline, read_pipeline
from flowturbo.rows import Tensors, to_images, to_rows
from flowturbo.runtimes import model_file
from flowturbo.solver.calls import Network, PredictorCall, Variant
from flowturbo.solver.guidance import Guidance, guide
from flowturbo.solver.program import outline
from flowturbo.solver.sampler import Array, run_sync
from flowturbo.solver.schedule import Schedule
from research.quality import samplers
from research.quality.samplers import Counted, Velocity
from research.quality.subjects import Subject, subject_of

Make = Callable[[Array], Array]  # seeds [n] to images [n, H, W, 3] uint8

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
    """Runs a pipeline in this process, with schedules and with baselines.

    The images show `subject`; None is that of the pipeline. The service's limit of images per
    request does not apply: BATCH images are made at once.
    """

    def __init__(
        self,
        model_repository: str | Path,
        pipeline: str | None = None,
        subject: Subject | None = None,
        *,
        solvers: bool = True,
    ) -> None:
        super().__init__(model_repository, pipeline, solvers=solvers)
        self.subject = subject or subject_of(self.pipeline)
        most = max(BATCH, self.settings.max_images)
        self.settings = replace(self.settings, max_images=most)

    def make(self, spec: SamplingSpec, seeds: Array) -> Made:
        """Images of `seeds` [n] and their subjects; needs a decoder."""
        schedule = spec.schedule
        if schedule is None:
            return self._baseline(spec, seeds)
        result = self.generate(
            seed=seeds,
            schedule=spec.sampler,
            guidance_scale=spec.guidance_scale,
            guidance_interval=spec.interval,
            variant=spec.variant,
            **self.subject.asked(seeds),
        )
        assert result.image is not None
        return Made(result.latent, result.image, *schedule_evaluations(schedule))

    def velocity(self, seeds: Array, guidance: Guidance) -> Velocity:
        """The guided velocity of the subjects of `seeds` [n], by calls that do not move `x`."""
        asked = {**self.subject.tensors(seeds), SEED: seeds}
        condition, most = self.pipeline.condition, self.settings.max_images
        value = condition.parse(asked, most, guided=guidance.enabled)
        block = run_sync(image_block(awaited(self._chunked), self.pipeline, value, guidance))

        async def evaluate(x: Array, t: float) -> Array:
            rows = to_rows(x, guidance)
            _, found = await block(PredictorCall(0, t, t, t), rows, np.zeros_like(rows))
            return to_images(found, guidance)

        return lambda x, t: run_sync(evaluate(x, t))

    def _chunked(self, role: Role, tensors: Tensors) -> tuple[Array, ...]:
        return run_sync(in_chunks(awaited(self._infer), self.pipeline.max_rows)(role, tensors))

    def _baseline(self, spec: SamplingSpec, seeds: Array) -> Made:
        counted = Counted(self.velocity(seeds, spec.guidance))
        latent = samplers.parse(spec.sampler)(counted, noise(seeds, self.pipeline.latent_shape))
        return Made(latent, self.decoded(latent), counted.evaluations, 0)

    def compute_in(self, repository: Path, role: Role, precision: str) -> None:
        """From now on the model of `role` computes in this precision."""
        self._models[role] = open_role(repository, self.pipeline, role, precision=precision)

    def decoded(self, latent: Array) -> Array:
        """The images [n, H, W, 3] uint8 of `latent` [n, C, h, w]."""
        return run_sync(decode(awaited(self._chunked), latent))


def schedule_evaluations(schedule: Schedule) -> tuple[int, int]:
    """How often `schedule` evaluates the predictor and the refiner."""
    program = outline(schedule)
    return program.evaluations(Network.PREDICTOR), program.evaluations(Network.REFINER)


class Exact(ABC):
    """The exact flow: a predictor in float32 in PyTorch, integrated to EXACT_TOLERANCE.

    `digest` identifies the flow, `latent_shape` is (C, h, w).
    """

    digest: str
    latent_shape: tuple[int, int, int]

    @abstractmethod
    def velocity(self, subject: Subject, seeds: Array, guidance: Guidance) -> Velocity:
        """The guided velocity of the subjects of `seeds` [n]."""

    def latent(self, subject: Subject, seeds: Array, guidance: Guidance) -> Array:
        """Latents [n, C, h, w] float32 of the subjects of `seeds` [n]."""
        solve = samplers.dopri5(EXACT_TOLERANCE, EXACT_TOLERANCE)
        return solve(self.velocity(subject, seeds, guidance), noise(seeds, self.latent_shape))

    @staticmethod
    def of_repository(checkpoint: Path, repository: Path, name: str | None = None) -> Exact:
        """`checkpoint`, read and guided as in the export of pipeline `name` in `repository`.

        It is a SiT checkpoint, or a diffusers folder. Raises CheckpointError if the pipeline was
        exported from another one.
        """
        made_from = read_pipeline(repository, name).fingerprint
        options = made_from["options"]
        if checkpoint.is_dir():
            return ExactText(checkpoint, made_from)
        if sha256(checkpoint) != made_from["sha256"][Role.PREDICTOR]:
            raise CheckpointError(
                f"{checkpoint} is not the file that {repository} was exported from: give the "
                "file that the export had as --predictor"
            )
        return ExactClasses(
            checkpoint,
            guided_channels=options["guidance_channels"],
            weights=options["weights"],
            num_heads=options["num_heads"],
            num_classes=options["num_classes"],
            reverse_time=options["reverse_time"],
        )


class ExactClasses(Exact):
    """The flow of a SiT. Guidance acts on the first `guided_channels`.

    `weights` and `num_heads` are as in the export. Raises CheckpointError.
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

    def velocity(self, subject: Subject, seeds: Array, guidance: Guidance) -> Velocity:
        """As in the base class."""
        channels = self._guided_channels
        labels = subject.labels(seeds)
        assert labels is not None, "a SiT has classes"
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


class ExactText(Exact):
    """The flow of the diffusers folder `path`, read as in the export that `made_from` records.

    Raises CheckpointError for another folder.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any]) -> None:
        from export.folder_source import FolderSource
        from flowturbo.nets.families.loading import load_family

        options = {f.name: made_from["options"].get(f.name) for f in fields(FolderOptions)}
        folder = FolderOptions(**options | {"path": path, "refiner": None, "network_file": None})
        digests = source_digests(FolderSource(folder))
        if any(made_from["sha256"].get(role) != digest for role, digest in digests.items()):
            raise CheckpointError(f"{path} is not the folder that the pipeline was exported from")
        family = load_family(folder)
        self.digest = digests[Role.PREDICTOR][:12]
        self.latent_shape = family.latent_shape(family.size)
        self._family = family

    @torch.inference_mode()
    def velocity(self, subject: Subject, seeds: Array, guidance: Guidance) -> Velocity:
        """As in the base class."""
        prompts = subject.asked(seeds)[PROMPT]
        network, own = self._family.network, self._family.encode(prompts)
        nothing = self._family.encode([""])
        null = [each.expand(len(prompts), *each.shape[1:]) for each in nothing]

        @torch.inference_mode()
        def evaluate(x: Array, t: float) -> Array:
            rows, times = torch.from_numpy(x), torch.full((len(x),), t)
            v: torch.Tensor = network(rows, times, *own)
            if guidance.applies_at(t):
                v = guide(v, network(rows, times, *null), guidance.scale)
            return v.numpy()

        return evaluate


class ExactExported(Exact):
    """The flow of the predictor's exported file, computed in float32: faster than PyTorch.

    The export has checked that the file computes what the checkpoint does, within 1e-4. Raises
    ValueError for a file whose weights have less than float32.
    """

    def __init__(self, repository: Path, name: str | None = None) -> None:
        self._engine = engine = Engine(repository, name, solvers=False)
        made = engine.pipeline.predictor
        path = repository / engine.pipeline.model(Role.PREDICTOR) / "1" / model_file(made.runtime)
        if made.runtime == "torch" or not _is_float32(path):
            raise ValueError(
                f"{path} is not a float32 file of ONNX, so it has no exact flow: give --predictor"
            )
        engine.compute_in(repository, Role.PREDICTOR, "fp32")
        self.digest = f"file_{engine.pipeline.flow}"
        self.latent_shape = engine.pipeline.latent_shape

    def velocity(self, subject: Subject, seeds: Array, guidance: Guidance) -> Velocity:
        """As in the base class."""
        self._engine.subject = subject
        return self._engine.velocity(seeds, guidance)


def add_exact_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `exact_of`."""
    add = parser.add_argument
    add("--repository", type=Path, default=Path("model_repository"))
    add("--pipeline", default="glyphs")
    add(
        "--predictor",
        type=Path,
        help="checkpoint or folder (default: the exported file in float32)",
    )


def exact_of(repository: Path, name: str | None, checkpoint: Path | None) -> Exact:
    """The flow of `checkpoint`, or of the exported file."""
    if checkpoint:
        return Exact.of_repository(checkpoint, repository, name)
    return ExactExported(repository, name)


def _is_float32(path: Path) -> bool:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    halves = onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16
    return not any(each.data_type in halves for each in graph.initializer)


def distances(one: Array, other: Array) -> Array:
    """RMS difference of each latent of `one` from that of `other`, [n].

    Reports give their mean, not an RMS over all images. Some noises lie where the flow branches:
    any solver's error sends them to another branch. These few would dominate an RMS.
    """
    apart = np.square(one.astype(np.float64) - other)
    return np.sqrt(apart.mean(tuple(range(1, apart.ndim))))
