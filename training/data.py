"""Where training reads latents: memory, images encoded as they are read, or training.shards."""

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

# What a VAE's configuration says of the scale of its latents, and of its encoder without a trace in
# the tensors.
SCALE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
_UNSEEN = ("act_fn", "norm_num_groups", "down_block_types")


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


def finite(*latents: Tensor) -> Tensor:
    """Which rows, [B] bool, of all `latents` [B, C, h, w] hold finite numbers alone."""
    # The largest tells, and is found five times faster than what is finite and what is not.
    largest = [each.flatten(1).abs().amax(1) for each in latents]
    return torch.stack(largest).isfinite().all(0)


class LatentSource(Protocol):
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
        bad = _bad_rows(pictures, skip_bad=skip_bad)
        self._rows = np.delete(np.arange(len(pictures)), sorted({*beyond, *bad}))
        self.class_names = pictures.class_names
        how = json.dumps(pictures.settings, sort_keys=True)
        rows = map(str, self._rows)
        self.digest = text_digest(*pictures.identity(), how, vae_digest(vae), *rows)
        unknown = (f"{pictures.name(row)} is of a class that the predictor lacks" for row in beyond)
        unusable = [*unknown, *(reason for row, reason in bad.items() if row not in beyond)]
        self.left_out = list(dict.fromkeys(unusable))  # a mirrored copy has its image's fault
        self.skipped, self.unused = len(self.left_out), pictures.unused
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


def _bad_rows(pictures: Pictures, *, skip_bad: bool) -> dict[int, str]:
    """Rows that cannot be decoded, and why, found by all processes together."""
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

    Both float32, on the VAE's device and in the flow model's scale (`latent_scale`).
    """
    mean, std = (values.to(vae.device) for values in latent_scale(vae))
    # Also where training's products are bfloat16: latents are encoded once, or as if they were.
    with torch.autocast(vae.device.type, enabled=False):
        posterior = vae.encode(to_unit(images).to(vae.device)).latent_dist
    return (posterior.mean - mean) / std, posterior.std / std


def to_unit(images: np.ndarray) -> Tensor:
    """[B, H, W, 3] uint8 to [B, 3, H, W] float32 in [-1, 1], on this process's device."""
    pixels = torch.from_numpy(np.array(images)).to(
        device()
    )  # a copy: what is mapped cannot be written
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def text_digest(*lines: str) -> str:
    """Of lines of text, also of file names that are not Unicode."""
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def vae_digest(vae: AutoencoderKL) -> str:
    """Of everything the latents depend on.

    The tensors tell the encoder's shape; the rest is named, so that a field that other versions of
    diffusers add is no difference.
    """
    config = {name: vae.config[name] for name in (*SCALE, *_UNSEEN)}
    return digest_of(vae.state_dict(), json.dumps(config, sort_keys=True))
