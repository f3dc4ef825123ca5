"""Rectified flow with Stable Diffusion 1.5's U-Net: InstaFlow's 2-RF (arXiv 2309.06380).

Its folders are those of `StableDiffusionPipeline`: nothing in them says that the U-Net predicts the
velocity data - noise. The network's time is 1000 (1 - t), on a uniform grid.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from flowturbo.nets.families.family import (
    CONTEXT,
    Family,
    FolderOptions,
    UntrainedRefiner,
    Wanted,
    built,
    check_no_inpainting,
    type_of,
    zero,
)
from flowturbo.nets.families.folder import DiffusersFolder, load_network
from flowturbo.nets.vae import Decoder, Encoder, latent_factor, tile_size
from flowturbo.nets.weights import CheckpointError


class Network(nn.Module):
    """The U-Net."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        kind = type_of(self)
        made: Tensor = self.unet(
            x.to(kind), 1000 * (1 - t), encoder_hidden_states=context.to(kind), return_dict=False
        )[0]
        return made


class TextEncoder(nn.Module):
    """CLIP's last hidden state, after its final norm."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, *ids: Tensor) -> tuple[Tensor]:
        return (self.clip(ids[0]).last_hidden_state,)


class RectifiedFlow(Family):
    """A StableDiffusionPipeline whose U-Net predicts a velocity."""

    title: ClassVar[str] = "rectified-flow"

    def reference(self, wanted: Wanted) -> tuple[np.ndarray, tuple[float, ...]]:
        """InstaFlow's loop over diffusers' U-Net: diffusers has no pipeline for it."""
        tokenizer, clip, unet = (self.parts[name] for name in ("tokenizer", "clip", "unet"))

        def encoded(texts: list[str]) -> Tensor:
            ids = tokenizer(
                texts,
                padding="max_length",
                max_length=clip.config.max_position_embeddings,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            state: Tensor = clip(ids).last_hidden_state
            return state

        x = torch.from_numpy(wanted.noise)
        times = np.linspace(0, 1, wanted.steps + 1)
        with torch.inference_mode():
            context, null = encoded(list(wanted.prompts)), encoded([""] * len(x))
            for t, after in zip(times, times[1:], strict=False):
                v, u = (
                    unet(x, 1000 * (1 - t), encoder_hidden_states=of).sample
                    for of in (context, null)
                )
                x = x + (after - t) * (u + wanted.guidance_scale * (v - u))
        return x.numpy(), tuple(times.tolist())

    def untrained_refiner(self) -> UntrainedRefiner:
        """As in the base class: for 2-RF the paper's refiner by its size, 43.5M parameters.

        Its outer half has half the width of the predictor's first stage, its inner half that width,
        and each stage has one layer.
        """
        teacher = self.parts["unet"]
        config = teacher.config
        stages = len(config.block_out_channels)
        width = config.block_out_channels[0]
        widths = [width // 2] * (stages // 2) + [width] * (stages - stages // 2)
        made = built(
            type(teacher),
            config,
            in_channels=2 * config.in_channels,
            block_out_channels=widths,
            layers_per_block=1,
        )
        zero(made.conv_out)
        return UntrainedRefiner(made, Network(made))


def load(folder: DiffusersFolder, options: FolderOptions) -> RectifiedFlow:
    """Reads a Stable Diffusion 1.5 folder with a rectified flow. Raises CheckpointError."""
    if not options.rectified_flow:
        raise CheckpointError(
            f"{folder.path} is a StableDiffusionPipeline, which usually predicts noise, not a "
            "velocity. If its U-Net is a rectified flow such as InstaFlow's 2-RF, give "
            "--rectified-flow"
        )
    unet = folder.network("unet", UNet2DConditionModel)
    config = unet.config
    check_no_inpainting(config, folder.path / "unet")
    refiner = None
    if options.refiner:
        refiner = load_network(options.refiner, UNet2DConditionModel)
        found, wanted = refiner.config, (2 * config.in_channels, config.cross_attention_dim)
        if (found.in_channels, found.cross_attention_dim) != wanted or (
            found.out_channels != config.out_channels
        ):
            raise CheckpointError(
                f"{options.refiner}: a refiner has in_channels {wanted[0]}, out_channels "
                f"{config.out_channels} and cross_attention_dim {wanted[1]}, got "
                f"{found.in_channels}, {found.out_channels} and {found.cross_attention_dim}"
            )
        refiner = Network(refiner)
    vae = folder.vae(config.in_channels)
    clip = folder.text_encoder("text_encoder", CLIPTextModel)
    length = clip.config.max_position_embeddings
    tokenizer, tokenizing = folder.tokenizer("tokenizer", length)
    factor = latent_factor(vae)
    return RectifiedFlow(
        network=Network(unet),
        refiner=refiner,
        text_encoder=TextEncoder(clip),
        decoder=Decoder(vae),
        encoder=Encoder(vae),
        tokenizers=(tokenizing,),
        conditioning=((CONTEXT, (length, clip.config.hidden_size)),),
        latent_channels=config.in_channels,
        factor=factor,
        multiple=factor * 2 ** (len(config.block_out_channels) - 1),
        patch=1,
        size=(config.sample_size * factor,) * 2,
        largest_decode=tile_size(vae),
        text_length=length,
        guidance_scale=7.5,  # of diffusers' pipeline
        distilled=options.distilled,
        ignored=folder.unused(),
        parts={"tokenizer": tokenizer, "clip": clip, "unet": unet},
    )
