"""What a model family is to the export."""

import copy
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from flowturbo.conditions.tokens import OpenTokenizer, TokenizerRecord, encoder_tensors
from flowturbo.nets.weights import CheckpointError
from flowturbo.solver.grid import GridRule

CONTEXT, POOLED, CONTEXT_LENGTH = "context", "pooled", "context_length"
REFINER_NOTES = "flowturbo.json"  # in a refiner's folder: what it was trained on


@dataclass(frozen=True)
class FolderOptions:
    """How to read a diffusers folder (see `python -m export --help`).

    `text_length` None is the length of the family. `refiner` is a folder with a network of the
    predictor's class. `network_file` is a single-file checkpoint in place of the predictor's
    weights.
    """

    path: Path
    refiner: Path | None = None
    network_file: Path | None = None
    without_t5: bool = False
    text_length: int | None = None
    distilled: bool = False
    rectified_flow: bool = False


@dataclass(frozen=True)
class Tokenizing:
    """A tokenizer's record without its file name, and the content of that file."""

    record: TokenizerRecord
    text: str


@dataclass(frozen=True)
class Family(ABC):
    """A model of one family, read from a folder, in float32.

    `network` maps (x [B, C, h, w], t [B], conditioning) to the velocity, with noise at t = 0.
    `text_encoder` maps token ids (and masks) to the tensors of `conditioning`: name and dimensions
    of a row. `decoder` has `pixels`, and `encoder` maps images to latents. `factor` is how many
    pixels a latent pixel is wide; sizes are multiples of `multiple`, at most `largest` on a side
    (0: any). `text_length` is what diffusers calls max_sequence_length. `ignored` are the parts of
    the folder that are not needed.
    """

    network: nn.Module
    refiner: nn.Module | None
    text_encoder: nn.Module
    decoder: nn.Module
    encoder: nn.Module
    tokenizers: tuple[Tokenizing, ...]
    conditioning: tuple[tuple[str, tuple[int, ...]], ...]
    latent_channels: int
    factor: int
    multiple: int
    patch: int
    size: tuple[int, int]
    largest_decode: int
    text_length: int
    guidance_scale: float
    largest: int = 0
    grid: GridRule = GridRule()
    distilled: bool = False
    ignored: tuple[str, ...] = ()
    parts: Mapping[str, Any] = field(default_factory=dict)

    title: ClassVar[str]

    @abstractmethod
    def reference(self, wanted: "Wanted") -> tuple[np.ndarray, tuple[float, ...]]:
        """Latents that diffusers' own pipeline makes, and the times of its grid in our convention.

        The latents are in the scale of x.
        """

    @abstractmethod
    def untrained_refiner(self) -> "UntrainedRefiner":
        """A small network of the predictor's class to train as its refiner. Its output is zero.

        It is a reconstruction: FlowTurbo's public code has no refiner for text to image.
        """

    @cached_property
    def _open(self) -> list[OpenTokenizer]:
        """The tokenizers, as the service opens them."""
        with tempfile.TemporaryDirectory() as scratch:
            found = []
            for number, each in enumerate(self.tokenizers):
                name = f"tokenizer_{number}.json"
                (Path(scratch) / name).write_text(each.text)
                found.append(OpenTokenizer(replace(each.record, file=name), Path(scratch)))
            return found

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[torch.Tensor, ...]:
        """The conditioning of `texts`, [n, ...] each, on the text encoder's device."""
        tokens = [[each.encode(text) for each in self._open] for text in texts]
        device = next(self.text_encoder.parameters()).device
        ids = encoder_tensors(self._open, tokens).values()
        made: tuple[torch.Tensor, ...] = self.text_encoder(
            *(torch.from_numpy(each).to(device) for each in ids)
        )
        return made

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) for an image (H, W) of pixels. Raises CheckpointError."""
        if any(side < self.multiple or side % self.multiple for side in size):
            raise CheckpointError(
                f"--size must be multiples of {self.multiple} for this model, got "
                f"{size[1]}x{size[0]}"
            )
        if self.largest and max(size) > self.largest:
            raise CheckpointError(
                f"--size must be at most {self.largest} on a side for this model, got "
                f"{size[1]}x{size[0]}"
            )
        return self.latent_channels, size[0] // self.factor, size[1] // self.factor


@dataclass(frozen=True)
class UntrainedRefiner:
    """`saved` is what `save_pretrained` writes; `network` is its form for the step block.

    Both share their weights. Weights that only read the text are the predictor's and stay so.
    """

    saved: Any
    network: nn.Module


@dataclass(frozen=True)
class Wanted:
    """A run of diffusers' pipeline: `noise` [n, C, h, w] float32, Euler `steps` of its own grid."""

    prompts: Sequence[str]
    noise: np.ndarray
    steps: int
    guidance_scale: float
    size: tuple[int, int]
    text_length: int


def text_length(options: FolderOptions, usual: int, least: int, most: int) -> int:
    """The --text-length, `usual` without one. Raises CheckpointError if it is out of range."""
    length = usual if options.text_length is None else options.text_length
    if not least <= length <= most:
        raise CheckpointError(f"--text-length must be {least} to {most} here, got {length}")
    return length


def check_no_inpainting(config: Any, path: Path) -> None:
    """Raises CheckpointError for a network that reads more channels than it answers."""
    if config.in_channels != config.out_channels:
        raise CheckpointError(
            f"{path}: in_channels {config.in_channels} and out_channels {config.out_channels} "
            "differ: models for inpainting are not supported"
        )


def check_same_text(
    refiner: nn.Module, predictor: nn.Module, parts: Sequence[str], options: FolderOptions
) -> None:
    """Raises CheckpointError unless both have the same layers for text: they run once for both."""
    for name in parts:
        if not _same_weights(refiner.get_submodule(name), predictor.get_submodule(name)):
            raise CheckpointError(
                f"{options.refiner}: {name} differs from the predictor's: both read the same text"
            )


def built(cls: Any, config: Mapping[str, Any], **changed: Any) -> Any:
    """A network of diffusers' class `cls` with random weights, in float32."""
    return cls.from_config({**config, **changed}).float()


@torch.no_grad()
def copy_weights(made: nn.Module, teacher: nn.Module, renamed: Mapping[str, str]) -> None:
    """Copies the weights of the same name and shape from `teacher` to `made`.

    `renamed` has prefixes of names: those of `made`, and those of `teacher` to take instead.
    """
    source = teacher.state_dict()
    for name, value in made.state_dict().items():
        start = next((prefix for prefix in renamed if name.startswith(prefix)), "")
        found = source.get(renamed.get(start, "") + name.removeprefix(start))
        if found is not None and found.shape == value.shape:
            value.copy_(found)


@torch.no_grad()
def zero(module: Any) -> None:
    """Sets a layer's weight and bias to zero."""
    module.weight.zero_()
    if module.bias is not None:
        module.bias.zero_()


def run(pipe: Any, wanted: Wanted, **more: Any) -> tuple[torch.Tensor, tuple[float, ...]]:
    """The latents of a pipeline of diffusers, and the times of its grid in our convention."""
    pipe.set_progress_bar_config(disable=True)
    asked = {
        "num_inference_steps": wanted.steps,
        "guidance_scale": wanted.guidance_scale,
        "latents": torch.from_numpy(wanted.noise),
        "height": wanted.size[0],
        "width": wanted.size[1],
        "max_sequence_length": wanted.text_length,
        "output_type": "latent",
    }
    with torch.inference_mode():
        latents: torch.Tensor = pipe(prompt=list(wanted.prompts), **(asked | more)).images
    return latents, tuple(float(1 - s) for s in pipe.scheduler.sigmas.double())


def without(module: nn.Module, *paths: str) -> nn.Module:
    """A copy of `module` with the same weights, in which the submodules at `paths` do nothing."""
    for path in paths:
        module = _replaced(module, path.split("."))
    return module


def _replaced(module: nn.Module, path: list[str]) -> nn.Module:
    made = copy.copy(module)
    made._modules = dict(module._modules)
    first, *rest = path
    made._modules[first] = _replaced(getattr(module, first), rest) if rest else nn.Identity()
    return made


def type_of(module: nn.Module) -> torch.dtype:
    """The type that most of the parameters of `module` have: that of its first matrix."""
    return next(parameter.dtype for parameter in module.parameters() if parameter.ndim > 1)


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether both have the same tensors with the same values."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        value.shape == second[key].shape and torch.equal(value, second[key])
        for key, value in first.items()
    )


def shared_grid(scheduler: Mapping[str, Any], path: Path) -> GridRule:
    """The grid of a FlowMatchEulerDiscreteScheduler's configuration. Raises CheckpointError."""
    if (found := scheduler.get("_class_name")) != "FlowMatchEulerDiscreteScheduler":
        raise CheckpointError(
            f"{path}: _class_name must be FlowMatchEulerDiscreteScheduler, got {found!r}"
        )
    refused = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")
    for name in (*refused, "shift_terminal", "stochastic_sampling"):
        if scheduler.get(name):
            raise CheckpointError(f"{path}: {name} is {scheduler[name]!r}, which is not supported")
    if not scheduler.get("use_dynamic_shifting"):
        return GridRule(shift=float(scheduler.get("shift", 1.0)))
    if (kind := scheduler.get("time_shift_type", "exponential")) != "exponential":
        raise CheckpointError(f"{path}: time_shift_type must be exponential, got {kind!r}")
    points = [
        float(scheduler.get(name, usual))
        for name, usual in (
            ("base_image_seq_len", 256),
            ("base_shift", 0.5),
            ("max_image_seq_len", 4096),
            ("max_shift", 1.15),
        )
    ]
    return GridRule(linear=(points[0], points[1], points[2], points[3]))
