"""Reads and checks checkpoints, and makes the modules to export."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from diffusers import AutoencoderKL

from export.onnx_graph import ExportTarget
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import Role
from flowturbo.nets.blocks import DecoderBlock, PredictorBlock, RefinerBlock
from flowturbo.nets.checkpoint import load_predictor, load_refiner
from flowturbo.nets.folded import FoldedSiT
from flowturbo.nets.sit import ByLabel, SiTConfig
from flowturbo.nets.vae import Decoder, Encoder, latent_factor, load_vae
from flowturbo.nets.weights import CheckpointError, sha256

_PLACES = ("predictor", "refiner", "vae")


@dataclass(frozen=True)
class Loaded:
    """The modules of a source, in float32, and what the pipeline's record says besides.

    `fields` are fields of `Pipeline`. `guidance_scale` and `schedule` are defaults of requests.
    `files` are written beside the text encoder. `family` is None for SiT.
    """

    targets: tuple[ExportTarget, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    guidance_scale: float | None = None
    schedule: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    family: Any = None


class Source(Protocol):
    """Where networks come from."""

    @property
    def has_refiner(self) -> bool:
        """Whether there is a refiner."""
        ...

    def reading(self) -> dict[str, Any]:
        """The options for reading the files: all that is not a path."""
        ...

    def files(self) -> dict[Role, Path]:
        """The checkpoint file or folder of each role."""
        ...

    def load(self, class_names: Sequence[str], *, half: bool, scratch: Path) -> Loaded:
        """Reads and checks all files. Raises CheckpointError.

        With `half`, conditioning tensors are float16. Small files go into `scratch`.
        """
        ...


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a pipeline, and how to read them (see `python -m export --help`)."""

    predictor: Path
    refiner: Path | None
    vae: Path | None
    weights: str | None
    refiner_weights: str | None
    num_heads: int | None
    refiner_num_heads: int | None
    num_classes: int | None
    reverse_time: bool
    guidance_channels: int

    def reading(self) -> dict[str, Any]:
        """The options for reading the checkpoints: all fields except the paths."""
        return {key: value for key, value in asdict(self).items() if key not in _PLACES}

    @property
    def has_refiner(self) -> bool:
        """Whether there is a refiner."""
        return self.refiner is not None

    def load(
        self, class_names: Sequence[str], *, half: bool = False, scratch: object = None
    ) -> Loaded:
        """Reads and checks all files. Raises CheckpointError."""
        return Loaded(tuple(modules(self, class_names)))

    def files(self) -> dict[Role, Path]:
        """The checkpoint file or folder of each role."""
        given = {
            Role.PREDICTOR: self.predictor,
            Role.REFINER: self.refiner,
            Role.DECODER: self.vae,
            Role.ENCODER: self.vae,
        }
        return {role: path for role, path in given.items() if path}


def source_digests(source: Source) -> dict[str, str]:
    """The digest of the checkpoint of each role."""
    return {role.value: sha256(path) for role, path in source.files().items()}


def modules(source: Checkpoints, class_names: Sequence[str] = ()) -> Iterator[ExportTarget]:
    """The modules to export, in float32. Each one is checked against the predictor."""
    predictor = load_predictor(
        source.predictor,
        source.weights,
        source.num_heads,
        num_classes=source.num_classes,
        reverse_time=source.reverse_time,
    )
    config = predictor.config
    shape = config.latent_shape
    channels = source.guidance_channels
    if channels > config.latent_channels:
        raise CheckpointError(
            f"--guidance-channels must be 1 to {config.latent_channels}, got {channels}"
        )
    # Fail fast: read all checkpoints before the first export.
    condition = ClassLabel(config.num_classes, tuple(class_names), config.null_class)
    predict = PredictorBlock(ByLabel(FoldedSiT(predictor)), channels)
    found = [ExportTarget(Role.PREDICTOR, predict, shape, condition)]
    if source.refiner:
        refiner = load_refiner(
            source.refiner, config, source.refiner_weights, source.refiner_num_heads
        )
        refine = RefinerBlock(ByLabel(FoldedSiT(refiner)), channels)
        found.append(ExportTarget(Role.REFINER, refine, shape, condition))
    if source.vae:
        vae = _vae(source.vae, config)
        found.append(ExportTarget(Role.DECODER, DecoderBlock(Decoder(vae)), shape, condition))
        factor = latent_factor(vae)
        found.append(ExportTarget(Role.ENCODER, Encoder(vae), shape, condition, factor=factor))
    yield from found


def _vae(folder: Path, config: SiTConfig) -> AutoencoderKL:
    vae = load_vae(folder)
    channels = vae.config.latent_channels
    if channels != config.latent_channels:
        raise CheckpointError(
            f"the VAE has {channels} latent channels, the predictor has {config.latent_channels}"
        )
    return vae
