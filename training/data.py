"""Sources of latents for training: memory, or images encoded on the fly. See also shards.py."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from flowturbo.nets.sit import SiTConfig
from flowturbo.nets.vae import latent_scale
from training.images import DataError, Pictures
from training.loop import device, digest_of, local_rows

# Fields of a VAE's configuration: the scale of its latents, and properties of the encoder that the
# tensors do not show.
SCALE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
_UNSEEN = ("act_fn", "norm_num_groups", "down_block_types")


@dataclass(frozen=True)
class Latents:
    """Rows of data: the distribution of each latent, and its class id.

    `mean` and `std` [B, C, h, w] are float32 in the flow model's scale. A `std` of None means zero.
    `label` [B] is int64.
    """

    mean: Tensor
    label: Tensor
    std: Tensor | None = None

    def sample(self, noise: Tensor) -> Tensor:
        """Latents [B, C, h, w], from standard normal `noise` of the same shape."""
        return self.mean if self.std is None else self.mean + self.std * noise

    def to(self, device: torch.device) -> "Latents":
        """These latents on `device`."""
        std = None if self.std is None else self.std.to(device)
        return Latents(self.mean.to(device), self.label.to(device), std)

    def __getitem__(self, rows: slice | Tensor) -> "Latents":
        std = None if self.std is None else self.std[rows]
        return Latents(self.mean[rows], self.label[rows], std)

    @classmethod
    def cat(cls, parts: "Sequence[Latents]") -> "Latents":
        """The rows of all `parts`. Either all parts have a `std`, or none has."""
        std = [part.std for part in parts if part.std is not None]
        return cls(
            torch.cat([part.mean for part in parts]),
            torch.cat([part.label for part in parts]),
            torch.cat(std) if std else None,
        )

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a shard, with the latents as `dtype`."""
        named = {"mean": self.mean.to(dtype), "label": self.label}
        return named if self.std is None else {**named, "std": self.std.to(dtype)}


def finite(*latents: Tensor) -> Tensor:
    """Which rows of all `latents` [B, C, h, w] have only finite numbers, [B] bool."""
    # The largest magnitude suffices, and is five times faster than isfinite() on all numbers.
    largest = [each.flatten(1).abs().amax(1) for each in latents]
    return torch.stack(largest).isfinite().all(0)


class LatentSource(Protocol):
    """Latents of shape (C, h, w) with random access to rows."""

    shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def read(self, rows: Tensor) -> Latents:
        """The latents at `rows` [B] int64, on the CPU."""


class InMemory:
    """Latents that are all in memory."""

    def __init__(self, data: Latents) -> None:
        self.data = data
        _, channels, height, width = data.mean.shape
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self.data.label)

    def read(self, rows: Tensor) -> Latents:
        return self.data[rows]


class EncodedImages:
    """Images that `vae` encodes each time they are read.

    At the start all images are decoded once, to find bad ones. All processes share that work.
    Raises DataError for bad images; with `skip_bad` it counts them in `skipped` instead.
    """

    def __init__(
        self, pictures: Pictures, vae: AutoencoderKL, model: SiTConfig, *, skip_bad: bool = False
    ) -> None:
        self._pictures, self._vae = pictures, vae.to(device())
        self.shape = model.latent_shape
        beyond = [row for row, p in enumerate(pictures.pictures) if p.label >= model.num_classes]
        if beyond and not skip_bad:
            picture = pictures.pictures[beyond[0]]
            raise DataError(
                f"{picture.path.parent}: class folder {picture.label + 1} of "
                f"{len(pictures.class_names)}, the predictor has {model.num_classes} classes"
            )
        bad = _bad_rows(pictures, skip_bad=skip_bad)
        self._rows = np.delete(np.arange(len(pictures)), sorted({*beyond, *bad}))
        self.class_names = pictures.class_names
        how = json.dumps(pictures.settings, sort_keys=True)
        rows = map(str, self._rows)
        self.digest = text_digest(*pictures.identity(), how, vae_digest(vae), *rows)
        unknown = (f"{pictures.name(row)} is of a class that the predictor lacks" for row in beyond)
        unusable = [*unknown, *(reason for row, reason in bad.items() if row not in beyond)]
        self.left_out = list(dict.fromkeys(unusable))  # an image and its mirrored copy: once
        self.skipped, self.unused = len(self.left_out), pictures.unused
        if not len(self._rows):
            raise DataError("none of the images is usable, at least 1 is needed")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: Tensor) -> Latents:
        images, labels = [], []
        for image, label in self._pictures.read(self._rows[rows.numpy()]):
            if isinstance(image, DataError):
                raise image  # although it was readable at the start
            images.append(image)
            labels.append(label)
        mean, std = encode(self._vae, np.stack(images))
        return Latents(mean.cpu(), torch.tensor(labels), std.cpu())


def _bad_rows(pictures: Pictures, *, skip_bad: bool) -> dict[int, str]:
    """Rows that cannot be decoded, with the reasons. All processes share the search."""
    rows = local_rows(torch.arange(len(pictures))).tolist()
    checked = zip(rows, tqdm(pictures.read(rows), "check", len(rows)), strict=True)
    bad = [(row, str(image)) for row, (image, _) in checked if isinstance(image, DataError)]
    bad = sorted(gather_object(bad))
    if bad and not skip_bad:
        raise DataError(f"{bad[0][1]} ({len(bad)} such images; --skip-bad leaves them out)")
    return dict(bad)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, C, h, w] of the latents of `images` [B, H, W, 3] uint8.

    Both are float32, on the VAE's device and in the flow model's scale (`latent_scale`).
    """
    mean, std = (values.to(vae.device) for values in latent_scale(vae))
    # In float32 even under bfloat16 autocast: the same latents as from training.latents.
    with torch.autocast(vae.device.type, enabled=False):
        posterior = vae.encode(to_unit(images).to(vae.device)).latent_dist
    return (posterior.mean - mean) / std, posterior.std / std


def to_unit(images: np.ndarray) -> Tensor:
    """[B, H, W, 3] uint8 to [B, 3, H, W] float32 in [-1, 1], on this process's device."""
    # A copy, because memory-mapped arrays are read-only.
    pixels = torch.from_numpy(np.array(images)).to(device())
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def text_digest(*lines: str) -> str:
    """Digest of lines of text, which may contain file names that are not Unicode."""
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def vae_digest(vae: AutoencoderKL) -> str:
    """Digest of everything that the latents depend on.

    The tensors show the encoder's shape. Other fields are listed by name, so that fields of a newer
    diffusers do not change the digest.
    """
    config = {name: vae.config[name] for name in (*SCALE, *_UNSEEN)}
    return digest_of(vae.state_dict(), json.dumps(config, sort_keys=True))
