"""The glyphs VAE: a small diffusers AutoencoderKL, 64 x 64 RGB to 4 x 16 x 16 latents."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from training.loop import Plan, device, fit

KL_WEIGHT = 5e-4  # of the mean over latent values: keeps latents near unit scale, blurs nothing
BLOCKS = (16, 32, 64)


def to_unit(images: np.ndarray) -> Tensor:
    """[B, H, W, 3] uint8 to [B, 3, H, W] float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device())
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def build() -> AutoencoderKL:
    """An untrained VAE."""
    stages = len(BLOCKS)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=BLOCKS,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )


def train(images: np.ndarray, plan: Plan, folder: Path) -> AutoencoderKL:
    """Fits the VAE to `images` [N, 64, 64, 3] uint8; sets its scaling factor."""
    torch.manual_seed(plan.seed)

    def loss_of(model: AutoencoderKL, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (plan.batch,), generator=generator).numpy()
        target = to_unit(images[np.sort(rows)])
        with torch.autocast(target.device.type, torch.bfloat16):
            posterior = model.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(target.device)
            decoded = model.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - target
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * kl

    vae = fit("vae", build(), loss_of, plan, folder)
    assert isinstance(vae, AutoencoderKL)
    # Flow matching expects data of about unit scale.
    factor = 1 / float(encode(vae, images[:4096], scaled=False).std())
    vae.register_to_config(scaling_factor=round(factor, 5))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, *, scaled: bool = True) -> Tensor:
    """Posterior means [N, 4, 16, 16] float32 on the CPU, in the flow model's scale if `scaled`."""
    scale = vae.config.scaling_factor if scaled else 1.0
    batches = range(0, len(images), 256)
    means = [
        vae.encode(to_unit(images[start : start + 256])).latent_dist.mean.cpu() * scale
        for start in tqdm(batches, "encode", disable=len(batches) < 20)
    ]
    return torch.cat(means)
