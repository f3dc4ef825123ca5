"""FLUX.2 klein: folders of `Flux2KleinPipeline`.

The state is what the transformer reads: latents of the VAE in 2 x 2 patches, normalized by the
VAE's batch norm. The network's time is 1 - t and its output is noise - data.
"""

from typing import Any, ClassVar, cast

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from flowturbo.nets import vae
from flowturbo.nets.families.family import (
    CONTEXT,
    Family,
    FolderOptions,
    UntrainedRefiner,
    Wanted,
    built,
    check_same_text,
    copy_weights,
    run,
    text_length,
    type_of,
    without,
    zero,
)
from flowturbo.nets.families.folder import DiffusersFolder, load_network
from flowturbo.nets.families.qwen import Qwen
from flowturbo.nets.weights import CheckpointError
from flowturbo.solver.grid import GridRule

_TEXT_LENGTH = 512  # diffusers' default
_PATCH = 2  # of the state, in the VAE's latents
_LATENTS = 128  # latents on a side by default, as in diffusers' pipeline


class Network(nn.Module):
    """The transformer without its projection of the text. Positions follow from the shapes."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer: Any = without(transformer, "context_embedder")

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        kind = type_of(self)
        rows, _, height, width = x.shape
        y = torch.arange(height, device=x.device)[:, None].expand(height, width).reshape(-1)
        z = torch.arange(width, device=x.device)[None].expand(height, width).reshape(-1)
        words = torch.arange(context.shape[1], device=x.device)
        none, no = torch.zeros_like(y), torch.zeros_like(words)
        made: Tensor = self.transformer(
            hidden_states=x.flatten(2).transpose(1, 2).to(kind),
            encoder_hidden_states=context.to(kind),
            timestep=1 - t,
            img_ids=torch.stack([none, y, z, none], 1),
            txt_ids=torch.stack([no, no, no, words], 1),
            guidance=None,
            return_dict=False,
        )[0]
        return -made.transpose(1, 2).reshape(rows, -1, height, width)


class TextEncoder(nn.Module):
    """Three layers of Qwen3, and the transformer's projection of the text."""

    def __init__(self, qwen: Qwen, transformer: Any) -> None:
        super().__init__()
        self.qwen = qwen
        self.embed = transformer.context_embedder

    def forward(self, *tokens: Tensor) -> tuple[Tensor]:
        return (self.embed(self.qwen(*tokens)),)


class Decoder(vae.Decoder):
    """From the state, in patches and normalized by the VAE's batch norm, to pixels."""

    def unpacked(self, z: Tensor) -> Tensor:
        rows, channels, height, width = z.shape
        z = z.reshape(rows, channels // _PATCH**2, _PATCH, _PATCH, height, width)
        return z.permute(0, 1, 4, 2, 5, 3).reshape(rows, -1, height * _PATCH, width * _PATCH)


class Encoder(vae.Encoder):
    """From pixels to the state, in patches and normalized by the VAE's batch norm."""

    def packed(self, z: Tensor) -> Tensor:
        rows, channels, height, width = z.shape
        z = z.reshape(rows, channels, height // _PATCH, _PATCH, width // _PATCH, _PATCH)
        return z.permute(0, 1, 3, 5, 2, 4).reshape(
            rows, channels * _PATCH**2, height // _PATCH, width // _PATCH
        )


def _scale(kl: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of packed latents, [1, C, 1, 1]: those of the batch norm."""
    std = (kl.bn.running_var + kl.config.batch_norm_eps).sqrt()
    return kl.bn.running_mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


class Flux2(Family):
    """A Flux2KleinPipeline."""

    title: ClassVar[str] = "flux2-klein"

    def reference(self, wanted: Wanted) -> tuple[np.ndarray, tuple[float, ...]]:
        """As in the base class. The pipeline answers latents of the VAE: they are normalized."""
        pipe = Flux2KleinPipeline(**self.parts, is_distilled=self.distilled)
        encoder, decoder = cast(TextEncoder, self.text_encoder), cast(Decoder, self.decoder)
        z, times = run(pipe, wanted, text_encoder_out_layers=encoder.qwen.chosen)
        x = (pipe._patchify_latents(z) - decoder.mean) / decoder.std
        return x.numpy(), times

    def untrained_refiner(self) -> UntrainedRefiner:
        """As in the base class: one single-stream block, which starts as the predictor's last."""
        teacher = self.parts["transformer"]
        config, last = teacher.config, teacher.config.num_single_layers - 1
        channels = config.in_channels
        made = built(
            type(teacher),
            config,
            in_channels=2 * channels,
            out_channels=channels,
            num_layers=0,
            num_single_layers=1,
        )
        blocks = "single_transformer_blocks"
        copy_weights(made, teacher, {f"{blocks}.0.": f"{blocks}.{last}."})
        with torch.no_grad():  # it reads the state as the predictor does, and no velocity yet
            made.x_embedder.weight.zero_()
            made.x_embedder.weight[:, :channels] = teacher.x_embedder.weight
        zero(made.proj_out)
        return UntrainedRefiner(made, Network(made))


def load(folder: DiffusersFolder, options: FolderOptions) -> Flux2:
    """Reads a FLUX.2 klein folder. Raises CheckpointError."""
    transformer = folder.network("transformer", Flux2Transformer2DModel)
    config = transformer.config
    if config.guidance_embeds:
        raise CheckpointError(
            f"{folder.path}/transformer: guidance_embeds is true: only FLUX.2 klein is supported"
        )
    refiner = None
    if options.refiner:
        refiner = load_network(options.refiner, Flux2Transformer2DModel)
        out = refiner.config.out_channels or refiner.config.in_channels
        if (refiner.config.in_channels, out) != (2 * config.in_channels, config.in_channels):
            raise CheckpointError(
                f"{options.refiner}: a refiner has in_channels {2 * config.in_channels} and "
                f"out_channels {config.in_channels}, got {refiner.config.in_channels} and {out}"
            )
        check_same_text(refiner, transformer, ["context_embedder"], options)
        refiner = Network(refiner)
    kl = folder.network("vae", AutoencoderKLFlux2)
    if kl.config.latent_channels * _PATCH**2 != config.in_channels:
        raise CheckpointError(
            f"{folder.path}: the VAE has {kl.config.latent_channels} latent channels, the "
            f"transformer {config.in_channels}, not {_PATCH**2} times as many"
        )
    model = folder.text_encoder("text_encoder", Qwen3ForCausalLM)
    length = text_length(options, _TEXT_LENGTH, 1, _TEXT_LENGTH)
    tokenizer, tokenizing = folder.tokenizer("tokenizer", length, mask=True, enable_thinking=False)
    # 9, 18 and 27 of Qwen3-4B's 36 layers.
    count = config.joint_attention_dim // model.config.hidden_size
    depth = model.config.num_hidden_layers
    if count * model.config.hidden_size != config.joint_attention_dim or depth <= count:
        raise CheckpointError(
            f"{folder.path}: joint_attention_dim {config.joint_attention_dim} is no whole number "
            f"of hidden states of {model.config.hidden_size}"
        )
    layers = tuple(depth * k // (count + 1) for k in range(1, count + 1))
    qwen = Qwen(model, layers)
    factor, scale = vae.latent_factor(kl) * _PATCH, _scale(kl)
    scheduler, grid = folder.scheduler()
    distilled = options.distilled or bool(folder.index.get("is_distilled"))
    inner = config.num_attention_heads * config.attention_head_dim
    return Flux2(
        network=Network(transformer),
        refiner=refiner,
        text_encoder=TextEncoder(qwen, transformer),
        decoder=Decoder(kl, scale),
        encoder=Encoder(kl, scale),
        tokenizers=(tokenizing,),
        conditioning=((CONTEXT, (length, inner)),),
        latent_channels=config.in_channels,
        factor=factor,
        multiple=factor,
        patch=1,
        size=(_LATENTS * vae.latent_factor(kl),) * 2,
        largest_decode=vae.tile_size(kl) // _PATCH,
        text_length=length,
        guidance_scale=4.0,  # of diffusers' pipeline
        grid=grid if grid.is_fixed else GridRule(flux2=True),
        distilled=distilled,
        ignored=folder.unused(),
        parts={
            "transformer": transformer,
            "vae": kl,
            "scheduler": scheduler,
            "text_encoder": model,
            "tokenizer": tokenizer,
        },
    )
