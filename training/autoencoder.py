"""A small diffusers AutoencoderKL: 64 x 64 RGB to latents of 16 x 16."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training.data import encode, to_unit
from training.loop import fit
from training.plan import TrainingConfig

KL_WEIGHT = 5e-4  # for the mean over latent values: near unit scale, without blur
BLOCKS = (16, 32, 64)


def build(channels: int) -> AutoencoderKL:
    """An untrained VAE with latents of so many `channels`."""
    stages = len(BLOCKS)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=BLOCKS,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )


def train(
    images: np.ndarray,
    channels: int,
    plan: TrainingConfig,
    folder: Path,
    identity: Mapping[str, str],
) -> AutoencoderKL:
    """Fits the VAE to `images` [N, 64, 64, 3] uint8 and sets its scaling factor.

    `identity` identifies the images.
    """
    torch.manual_seed(plan.seed)

    def loss_of(model: AutoencoderKL, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (plan.batch,), generator=generator).numpy()
        target = to_unit(images[np.sort(rows)])
        posterior = model.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(target.device)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - target
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * kl

    vae = fit("vae", build(channels), loss_of, plan, folder, identity=identity)
    assert isinstance(vae, AutoencoderKL)
    # Flow matching expects data of about unit scale.
    sample = images[:4096]
    batches = range(0, len(sample), 256)
    means = [encode(vae, sample[start : start + 256])[0] for start in batches]
    factor = vae.config.scaling_factor / float(torch.cat(means).std())
    vae.register_to_config(scaling_factor=round(factor, 5))
    return vae
