"""The VAE: a diffusers `AutoencoderKL` folder."""

import inspect
import math
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from flowturbo.nets.weights import (
    CheckpointError,
    load_exactly,
    read_folder,
    refuse_unknown_fields,
    without_wrappers,
)
from flowturbo.textfile import read_json

CONFIG = "config.json"
_CLASS = "AutoencoderKL"
_IMAGE_CHANNELS = 3
_WHOLE_DECODE = 1024  # pixels on a side, which every decoder can take
# Names of attention layers before diffusers 0.12, and their present names.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"(.*\.mid_block\.attentions\.\d+)\.(query|key|value|proj_attn)\.(.*)")
_BLOCKS = {  # allowed kinds; other kinds can have the same tensors
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
_LDM = ("first_stage_model.", "encoder.down.", "decoder.up.")


def load_vae(folder: str | Path) -> AutoencoderKL:
    """The VAE in `folder` (config.json and weights), float32, exactly as its files say.

    Weights are `diffusion_pytorch_model.safetensors` or `.bin`. They may be in shards with an
    index, or of one variant such as `fp16`. Raises CheckpointError, which names the field or tensor
    that does not fit.
    """
    folder = Path(folder)
    config = _read_config(folder)
    path, tensors = read_folder(folder)
    try:
        vae = AutoencoderKL.from_config(config)
    except Exception as error:  # bad values can raise anything in the constructor
        raise CheckpointError(f"{folder / CONFIG} describes no {_CLASS}: {error}") from error
    _check_config(folder / CONFIG, vae)
    _check_blocks(folder / CONFIG, vae)
    try:
        load_exactly(vae, _todays_names(path, without_wrappers(path, tensors)), path)
    except CheckpointError as error:
        if not any(name.startswith(_LDM) for name in tensors):
            raise
        raise CheckpointError(
            f"{error}. These are the names of an LDM checkpoint: convert it with diffusers "
            "(AutoencoderKL.from_single_file, save_pretrained)"
        ) from error
    frozen: AutoencoderKL = vae.float().eval().requires_grad_(False)
    return frozen


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        inner = folder / "vae"
        hint = f"; give {inner}" if (inner / CONFIG).is_file() else ""
        raise CheckpointError(f"{folder} is not a diffusers {_CLASS} folder: no {CONFIG}{hint}")
    config = read_json(path)
    if (found := config.get("_class_name")) != _CLASS:
        raise CheckpointError(f"{path}: _class_name must be {_CLASS}, got {found!r}")
    known = inspect.signature(AutoencoderKL.__init__).parameters
    refuse_unknown_fields(path, config, known, _CLASS)
    size = config.get("sample_size", 1)
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise CheckpointError(f"{path}: sample_size must be pixels, one or two sides, got {size!r}")
    return {key: of for key, of in config.items() if key.startswith("_") or key in known}


def _check_config(path: Path, vae: AutoencoderKL) -> None:
    """Raises CheckpointError for values that the formulas of `latent_scale` do not cover."""
    config = vae.config
    for name in ("in_channels", "out_channels"):
        if (found := getattr(config, name)) != _IMAGE_CHANNELS:
            raise CheckpointError(f"{path}: {name} must be {_IMAGE_CHANNELS} (RGB), got {found!r}")
    numbers = {name: getattr(config, name) for name in ("scaling_factor", "shift_factor")}
    lists = {name: getattr(config, name) for name in ("latents_mean", "latents_std")}
    if not _is_number(numbers["scaling_factor"]) or numbers["scaling_factor"] <= 0:
        raise CheckpointError(
            f"{path}: scaling_factor must be a number above 0, got {numbers['scaling_factor']!r}"
        )
    if numbers["shift_factor"] is not None and not _is_number(numbers["shift_factor"]):
        raise CheckpointError(
            f"{path}: shift_factor must be a number, got {numbers['shift_factor']!r}"
        )
    given = [name for name, value in lists.items() if value is not None]
    if len(given) == 1:
        raise CheckpointError(
            f"{path} has only {given[0]}: latents_mean and latents_std are needed together"
        )
    for name in given:
        values, count = lists[name], config.latent_channels
        fits = isinstance(values, list | tuple) and len(values) == count
        fits = fits and all(map(_is_number, values))
        if not fits or name == "latents_std" and min(values) <= 0:
            above = " above 0" if name == "latents_std" else ""
            raise CheckpointError(f"{path}: {name} must be {count} numbers{above}, got {values!r}")
    if given and numbers["shift_factor"]:
        raise CheckpointError(
            f"{path} has both latents_mean and shift_factor {numbers['shift_factor']}: only one is "
            "allowed"
        )


def _check_blocks(path: Path, vae: AutoencoderKL) -> None:
    for name, allowed in _BLOCKS.items():
        for kind in vae.config[name]:
            if kind not in allowed:
                raise CheckpointError(
                    f"{path}: {name} must be of {' and '.join(allowed)}, got {kind!r}"
                )


def _is_number(value: Any) -> bool:
    try:
        finite = isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        finite = False
    return finite and not isinstance(value, bool)


def _todays_names(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        old = re.fullmatch(_OLD_NAME, name)
        today = f"{old[1]}.{_OLD_ATTENTION[old[2]]}.{old[3]}" if old else name
        if today in found:
            raise CheckpointError(f"{path} has {today!r} twice, once under its old name")
        found[today] = tensor
    return found


def sample_size(vae: AutoencoderKL) -> int | None:
    """The side in pixels of the VAE's square training images; None if they were not square."""
    stated = vae.config.sample_size
    high, wide = stated if isinstance(stated, list | tuple) else (stated, stated)
    return int(wide) if high == wide else None


def tile_size(vae: Any) -> int:
    """The largest side in latent pixels to decode at once: 1024 pixels, or the VAE's own size."""
    stated = vae.config.sample_size
    largest = max(stated) if isinstance(stated, list | tuple) else stated
    return max(int(largest), _WHOLE_DECODE) // latent_factor(vae)


def latent_factor(vae: Any) -> int:
    """How many image pixels one latent pixel is wide."""
    factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
    return factor


def latent_scale(vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, [1, C, 1, 1] float32, of the VAE's own latents z.

    The flow model's latent is (z - mean) / std, so z is latent * std + mean. Pipelines of diffusers
    compute the same from latents_mean, latents_std, shift_factor and scaling_factor.
    """
    config = vae.config
    count = config.latent_channels
    means = config.latents_mean or [config.shift_factor or 0.0] * count
    stds = [value / config.scaling_factor for value in config.latents_std or [1.0] * count]
    mean, std = (torch.tensor(values, dtype=torch.float32) for values in (means, stds))
    return mean.view(1, count, 1, 1), std.view(1, count, 1, 1)


class _Scaled(nn.Module):
    """A part of a VAE beside the scale of the flow model's latents.

    `scale` is the mean and the standard deviation of latents, if not `latent_scale`. Not the whole
    VAE: its other part may have another precision.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vae: Any, scale: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        mean, std = scale or latent_scale(vae)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)


class Decoder(_Scaled):
    """Latents [B, C, h, w] float32 in the flow model's scale to images [B, H, W, 3] uint8.

    The VAE computes in the type of its parameters. The rounding to levels is in float32.
    """

    def __init__(self, vae: Any, scale: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__(vae, scale)
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

    def forward(self, latent: Tensor) -> Tensor:
        return to_levels(self.pixels(latent))

    def pixels(self, latent: Tensor) -> Tensor:
        """Images [B, 3, H, W] float32; visible levels are in [-1, 1]."""
        z = self.unpacked(latent * self.std + self.mean)
        z = z.to(self.decoder.conv_in.weight.dtype)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        out: Tensor = self.decoder(z).float()
        return out

    def unpacked(self, z: Tensor) -> Tensor:
        """The VAE's own latents; another decoder may have packed ones."""
        return z


class Encoder(_Scaled):
    """Images [B, H, W, 3] uint8 to latents [B, C, h, w] float32 in the flow model's scale.

    A latent is the mean of the VAE's posterior, so the same image always has the same latent.
    """

    def __init__(self, vae: Any, scale: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__(vae, scale)
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, image: Tensor) -> Tensor:
        # TensorRT does nothing with bytes but casting them.
        pixels = image.float().permute(0, 3, 1, 2) / 127.5 - 1
        z = self.encoder(pixels.to(self.encoder.conv_in.weight.dtype))
        if self.quant_conv is not None:
            z = self.quant_conv(z)
        mean, _ = z.float().chunk(2, 1)
        return (self.packed(mean) - self.mean) / self.std

    def packed(self, z: Tensor) -> Tensor:
        """The flow model's channels of the VAE's own latents; another encoder may pack them."""
        return z


def to_levels(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] float32 in [-1, 1] to [B, H, W, 3] uint8."""
    levels = (pixels * 0.5 + 0.5).clamp(0, 1) * 255
    return levels.round().permute(0, 2, 3, 1).to(torch.uint8)
