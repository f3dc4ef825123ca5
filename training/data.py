"""Where training reads latents: memory, a folder of shards, or images that are encoded as read."""

import bisect
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from flowturbo.nets.sit import SiTConfig
from training.images import DataError, Pictures
from training.loop import device, digest_of, mine

INDEX = "index.json"  # written when all shards are there
SETTINGS = "settings.json"  # what the shards depend on, from the start


@dataclass(frozen=True)
class Latents:
    """Rows of data: `mean` and `std` [B, C, h, w] float32 of the latents, in the flow model's
    scale, and class ids `label` [B] int64. A `std` of None is zero.
    """

    mean: Tensor
    label: Tensor
    std: Tensor | None = None

    def sample(self, noise: Tensor) -> Tensor:
        """Latents [B, C, h, w], from standard normal `noise` of that shape."""
        return self.mean if self.std is None else self.mean + self.std * noise

    def to(self, device: torch.device) -> "Latents":
        """All of it on `device`."""
        std = None if self.std is None else self.std.to(device)
        return Latents(self.mean.to(device), self.label.to(device), std)

    def __getitem__(self, rows: slice | Tensor) -> "Latents":
        std = None if self.std is None else self.std[rows]
        return Latents(self.mean[rows], self.label[rows], std)

    @classmethod
    def cat(cls, parts: "Sequence[Latents]") -> "Latents":
        """The rows of all `parts`, which all have a `std` or none."""
        std = [part.std for part in parts if part.std is not None]
        return cls(
            torch.cat([part.mean for part in parts]),
            torch.cat([part.label for part in parts]),
            torch.cat(std) if std else None,
        )

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a shard holds, the latents as `dtype`."""
        named = {"mean": self.mean.to(dtype), "label": self.label}
        return named if self.std is None else {**named, "std": self.std.to(dtype)}


class Source(Protocol):
    """Latents of shape (C, h, w), any rows of which can be read."""

    shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def read(self, rows: Tensor) -> Latents:
        """The latents at `rows` [B] int64, on the CPU."""


class InMemory:
    """Latents that are all here."""

    def __init__(self, data: Latents) -> None:
        self.data = data
        _, channels, height, width = data.mean.shape
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.data.label)

    def read(self, rows: Tensor) -> Latents:
        return self.data[rows]


class Shards:
    """A folder that `python -m training.latents` wrote: shards of latents, mapped into memory.

    `skipped` counts what `skip_bad` left out. Raises DataError for a folder that does not fit
    `model` (any, when None): latents of another shape, labels beyond its classes, a broken shard.
    """

    def __init__(
        self, folder: Path, model: SiTConfig | None = None, *, skip_bad: bool = False
    ) -> None:
        index = _read_index(folder)
        channels, height, width = index["latent_shape"]
        self.shape: tuple[int, int, int] = (channels, height, width)
        self.scaling_factor = float(index["scaling_factor"])
        self.class_names: tuple[str, ...] = tuple(index["class_names"])
        if model:
            check_shape(folder / INDEX, self.shape, model)
        stated = (folder / name for name in (INDEX, SETTINGS))
        text = b"".join(path.read_bytes() for path in stated if path.exists())
        self.digest = hashlib.sha256(text).hexdigest()
        self.skipped = 0
        self._files, self._starts, self._labels, rows = [], [], [], []
        start = 0
        for entry in index["shards"]:
            path = folder / entry["file"]
            try:
                file, label = _open_shard(path, self.shape, entry["count"])
                good = _known(path, label, model, skip_bad=skip_bad)
            except DataError:
                if not skip_bad:
                    raise
                self.skipped += entry["count"]
                continue
            self.skipped += len(label) - len(good)
            self._files.append(file)
            self._starts.append(start)
            rows.append(start + good)
            self._labels.append(label)
            start += len(label)
        if not any(len(found) for found in rows):
            raise DataError(f"{folder} has no usable latents, at least 1 is needed")
        self._rows = torch.cat(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: Tensor) -> Latents:
        return Latents.cat([self._read(int(row)) for row in self._rows[rows]])

    def labels(self) -> Tensor:
        """Class ids [N] of all rows."""
        return torch.cat(self._labels)[self._rows]

    def _read(self, row: int) -> Latents:
        shard = bisect.bisect_right(self._starts, row) - 1
        at, file = row - self._starts[shard], self._files[shard]
        held = {
            name: file.get_slice(name)[at : at + 1].float()
            for name in ("mean", "std")
            if name in file.keys()  # noqa: SIM118
        }
        return Latents(label=self._labels[shard][at : at + 1], **held)


def is_sharded(folder: Path) -> bool:
    """Whether `folder` is, or was to become, one of latents."""
    return any((folder / name).exists() for name in (INDEX, SETTINGS))


def _read_index(folder: Path) -> dict:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(
            f"{folder} has no {INDEX}: python -m training.latents writes it when all is encoded"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    missing = {"latent_shape", "scaling_factor", "class_names", "shards"} - index.keys()
    if missing:
        raise DataError(f"{path} has no {sorted(missing)[0]!r}")
    return dict(index)


def _open_shard(path: Path, shape: tuple[int, int, int], count: int) -> tuple[Any, Tensor]:
    """The open file and its labels; raises DataError."""
    try:
        file = safe_open(path, framework="pt")
        stated = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        label = file.get_tensor("label") if "label" in stated else torch.empty(0)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}") from error
    tensors = {"mean": (count, *shape), "label": (count,)}
    if "std" in stated:
        tensors["std"] = tensors["mean"]
    if stated != tensors or label.dtype != torch.int64:
        raise DataError(
            f"{path} must have the tensors {tensors}, labels in int64; got {stated}, {label.dtype}"
        )
    return file, label


def _known(path: Path, label: Tensor, model: SiTConfig | None, *, skip_bad: bool) -> Tensor:
    """Rows whose label the model knows; raises DataError for others, unless they are skipped."""
    if model is None:
        return torch.arange(len(label))
    good = (label >= 0) & (label < model.num_classes)
    if not good.all() and not skip_bad:
        raise DataError(
            f"{path}: labels must be 0 to {model.num_classes - 1}, the predictor's classes; "
            f"got {int(label[~good][0])}"
        )
    return good.nonzero()[:, 0]


def check_shape(path: Path, shape: tuple[int, ...], model: SiTConfig) -> None:
    """Raises DataError unless `shape` is that of the model's latents."""
    expected = (model.latent_channels, model.latent_size, model.latent_size)
    if tuple(shape) != expected:
        raise DataError(f"{path}: latents must be {expected} for this predictor, got {shape}")


class EncodedImages:
    """Images that `vae` encodes each time they are read.

    All are decoded once at the start, to find the bad ones; several processes share that work.
    Raises DataError, or with `skip_bad` counts what is bad in `skipped`.
    """

    def __init__(
        self, pictures: Pictures, vae: AutoencoderKL, model: SiTConfig, *, skip_bad: bool = False
    ) -> None:
        self._pictures, self._vae = pictures, vae.to(device())
        self.shape = (model.latent_channels, model.latent_size, model.latent_size)
        beyond = [row for row, p in enumerate(pictures.pictures) if p.label >= model.num_classes]
        if beyond and not skip_bad:
            picture = pictures.pictures[beyond[0]]
            raise DataError(
                f"{picture.path.parent}: class folder {picture.label + 1} of "
                f"{len(pictures.class_names)}, the predictor has {model.num_classes} classes"
            )
        bad = sorted({*beyond, *_bad_rows(pictures, skip_bad=skip_bad)})
        self._rows = np.delete(np.arange(len(pictures)), bad)
        self.class_names = pictures.class_names
        text = "\n".join([*pictures.identity(), vae_digest(vae)])
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.skipped = len(bad)
        if not len(self._rows):
            raise DataError("none of the images is usable, at least 1 is needed")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: Tensor) -> Latents:
        images, labels = [], []
        for image, label in self._pictures.read(self._rows[rows.numpy()]):
            if isinstance(image, DataError):
                raise image  # it was readable at the start
            images.append(image)
            labels.append(label)
        mean, std = encode(self._vae, np.stack(images))
        return Latents(mean.cpu(), torch.tensor(labels), std.cpu())


def _bad_rows(pictures: Pictures, *, skip_bad: bool) -> Sequence[int]:
    """Rows that cannot be decoded, found by all processes together."""
    rows = mine(torch.arange(len(pictures))).tolist()
    checked = zip(rows, tqdm(pictures.read(rows), "check", len(rows)), strict=True)
    bad = [(row, str(image)) for row, (image, _) in checked if isinstance(image, DataError)]
    bad = sorted(gather_object(bad))
    if bad and not skip_bad:
        raise DataError(f"{bad[0][1]} ({len(bad)} such images; --skip-bad leaves them out)")
    return [row for row, _ in bad]


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, C, h, w] of the latents of `images` [B, H, W, 3] uint8.

    Both float32, on the VAE's device and in the flow model's scale: (z - shift) * scaling factor.
    """
    scale, shift = float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0)
    # Also where training's products are bfloat16: latents are encoded once, or as if they were.
    with torch.autocast(vae.device.type, enabled=False):
        posterior = vae.encode(to_unit(images).to(vae.device)).latent_dist
    return (posterior.mean - shift) * scale, posterior.std * scale


def to_unit(images: np.ndarray) -> Tensor:
    """[B, H, W, 3] uint8 to [B, 3, H, W] float32 in [-1, 1], on this process's device."""
    pixels = torch.from_numpy(np.array(images)).to(
        device()
    )  # a copy: what is mapped cannot be written
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def vae_digest(vae: AutoencoderKL) -> str:
    """Of everything the latents depend on."""
    return digest_of(vae, f"{vae.config.scaling_factor} {vae.config.shift_factor}")
