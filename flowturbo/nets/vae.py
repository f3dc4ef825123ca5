"""The VAE: a diffusers `AutoencoderKL` folder."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from flowturbo.nets.checkpoint import CheckpointError


def load_vae(folder: str | Path) -> AutoencoderKL:
    """The VAE in `folder` (config.json and weights), float32; raises CheckpointError."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a diffusers AutoencoderKL folder: no config.json")
    try:
        vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{folder} does not load as an AutoencoderKL: {error}") from error
    frozen: AutoencoderKL = vae.float().eval().requires_grad_(False)
    return frozen


def latent_factor(vae: AutoencoderKL) -> int:
    """How many pixels wide a latent's pixel is."""
    factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
    return factor


class Decoder(nn.Module):
    """Latents [B, C, h, w] float32 in the flow model's scale to images [B, H, W, 3] uint8.

    The VAE computes in the type of its parameters, the rounding to levels in float32.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(vae.config.shift_factor or 0.0)

    def forward(self, latent: Tensor) -> Tensor:
        z = (latent / self.scale + self.shift).to(self.vae.decoder.conv_in.weight.dtype)
        if self.vae.post_quant_conv is not None:
            z = self.vae.post_quant_conv(z)
        pixels = (self.vae.decoder(z).float() * 0.5 + 0.5).clamp(0, 1) * 255
        return pixels.round().permute(0, 2, 3, 1).to(torch.uint8)
