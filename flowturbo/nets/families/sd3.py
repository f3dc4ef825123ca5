"""SD3 and SD3.5: folders of `StableDiffusion3Pipeline`.

The network's time is 1000 (1 - t) and its output is noise - data, so the velocity is its negative.
"""

from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from flowturbo.nets.blocks import InFloat32
from flowturbo.nets.families.family import (
    CONTEXT,
    POOLED,
    Family,
    FolderOptions,
    UntrainedRefiner,
    Wanted,
    built,
    check_no_inpainting,
    check_same_text,
    copy_weights,
    run,
    text_length,
    type_of,
    without,
    zero,
)
from flowturbo.nets.families.folder import DiffusersFolder, load_network
from flowturbo.nets.vae import Decoder, Encoder, latent_factor, tile_size
from flowturbo.nets.weights import CheckpointError

_TEXT_PARTS = ("context_embedder", "time_text_embed.text_embedder")
_T5_LENGTH, _T5_LONGEST = 256, 512  # diffusers' default and limit
_SENSITIVE = {38: (35,)}  # blocks in float32, by depth: SD3.5-large (NVIDIA's TensorRT demo)


class Network(nn.Module):
    """The transformer without the layers that read the text alone."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer: Any = without(transformer, *_TEXT_PARTS)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        kind = type_of(self)
        made: Tensor = self.transformer(
            hidden_states=x.to(kind),
            encoder_hidden_states=context.to(kind),
            pooled_projections=pooled.to(kind),
            timestep=1000 * (1 - t),
            return_dict=False,
        )[0]
        return -made


class TextEncoder(nn.Module):
    """Both CLIPs, T5 if it is there, and the transformer's layers for text."""

    def __init__(self, clips: list[Any], t5: Any, transformer: Any, t5_length: int) -> None:
        super().__init__()
        self.clips = nn.ModuleList(clips)
        self.t5 = t5
        self.embed, self.embed_pooled = (transformer.get_submodule(name) for name in _TEXT_PARTS)
        self.width = transformer.config.joint_attention_dim
        self.t5_length = t5_length

    def forward(self, *ids: Tensor) -> tuple[Tensor, Tensor]:
        made = [
            clip(each, output_hidden_states=True)
            for clip, each in zip(self.clips, ids, strict=False)
        ]
        states = torch.cat([each.hidden_states[-2] for each in made], -1)
        states = F.pad(states, (0, self.width - states.shape[-1]))
        # T5's padding is attended, and rows of zeros stand in for an absent T5: as in diffusers.
        zeros = states.new_zeros((states.shape[0], self.t5_length, self.width))
        rest = zeros if self.t5 is None else self.t5(ids[2])[0].to(states.dtype)
        pooled = torch.cat([each.text_embeds for each in made], -1)
        return self.embed(torch.cat([states, rest], 1)), self.embed_pooled(pooled)


class SD3(Family):
    """A StableDiffusion3Pipeline."""

    title: ClassVar[str] = "sd3"

    def reference(self, wanted: Wanted) -> tuple[np.ndarray, tuple[float, ...]]:
        """As in the base class."""
        latents, times = run(StableDiffusion3Pipeline(**self.parts), wanted)
        return latents.numpy(), times

    def untrained_refiner(self) -> UntrainedRefiner:
        """As in the base class: one block, which starts as the predictor's last one."""
        teacher = self.parts["transformer"]
        config, last = teacher.config, teacher.config.num_layers - 1
        changed = {"in_channels": 2 * config.in_channels, "out_channels": config.in_channels}
        dual = (0,) if last in config.dual_attention_layers else ()
        made = built(type(teacher), config, **changed, num_layers=1, dual_attention_layers=dual)
        copy_weights(made, teacher, {"transformer_blocks.0.": f"transformer_blocks.{last}."})
        with torch.no_grad():  # it reads the state as the predictor does, and no velocity yet
            made.pos_embed.proj.weight.zero_()
            made.pos_embed.proj.weight[:, : config.in_channels] = teacher.pos_embed.proj.weight
        zero(made.proj_out)
        return UntrainedRefiner(made, Network(made))


def load(folder: DiffusersFolder, options: FolderOptions) -> SD3:
    """Reads an SD3 folder. Raises CheckpointError."""
    transformer = folder.network("transformer", SD3Transformer2DModel)
    config = transformer.config
    refiner = None
    if options.refiner:
        refiner = load_network(options.refiner, SD3Transformer2DModel)
        _check_refiner(refiner, transformer, options)
        refiner = Network(refiner)
    check_no_inpainting(config, folder.path / "transformer")
    for block in _SENSITIVE.get(config.num_layers, ()):
        transformer.transformer_blocks[block] = InFloat32(transformer.transformer_blocks[block])
    vae = folder.vae(config.in_channels)
    clips = [
        folder.text_encoder(f"text_encoder{k}", CLIPTextModelWithProjection) for k in ("", "_2")
    ]
    lengths = [clip.config.max_position_embeddings for clip in clips]
    pairs = [folder.tokenizer(f"tokenizer{k}", n) for k, n in zip(("", "_2"), lengths, strict=True)]
    t5 = None
    with_t5 = folder.has("text_encoder_3") and not options.without_t5
    length = text_length(options, _T5_LENGTH, 2 if with_t5 else 0, _T5_LONGEST)
    if with_t5:
        t5 = folder.text_encoder("text_encoder_3", T5EncoderModel)
        pairs.append(folder.tokenizer("tokenizer_3", length))
    scheduler, grid = folder.scheduler()
    factor = latent_factor(vae)
    inner = config.num_attention_heads * config.attention_head_dim
    own = {f"tokenizer{k}": pair[0] for k, pair in zip(("", "_2", "_3"), pairs, strict=False)}
    parts = {
        "transformer": transformer,
        "vae": vae,
        "scheduler": scheduler,
        "text_encoder": clips[0],
        "text_encoder_2": clips[1],
        "text_encoder_3": t5,
        "tokenizer_3": None,
        **own,
    }
    return SD3(
        network=Network(transformer),
        refiner=refiner,
        text_encoder=TextEncoder(clips, t5, transformer, length),
        decoder=Decoder(vae),
        encoder=Encoder(vae),
        tokenizers=tuple(made for _, made in pairs),
        conditioning=(
            (CONTEXT, (lengths[0] + length, config.caption_projection_dim)),
            (POOLED, (inner,)),
        ),
        latent_channels=config.in_channels,
        factor=factor,
        multiple=factor * config.patch_size,
        patch=config.patch_size,
        size=(config.sample_size * factor,) * 2,
        largest=config.pos_embed_max_size * config.patch_size * factor,
        largest_decode=tile_size(vae),
        text_length=length,
        # The makers' values: 7 for SD3, 4.5 for SD3.5, which normalizes queries and keys.
        guidance_scale=7.0 if config.qk_norm is None else 4.5,
        grid=grid,
        distilled=options.distilled,
        ignored=folder.unused(),
        parts=parts,
    )


def _check_refiner(refiner: Any, transformer: Any, options: FolderOptions) -> None:
    own, of = refiner.config, transformer.config
    if (own.in_channels, own.out_channels) != (2 * of.in_channels, of.out_channels):
        raise CheckpointError(
            f"{options.refiner}: a refiner has in_channels {2 * of.in_channels} and out_channels "
            f"{of.out_channels}, got {own.in_channels} and {own.out_channels}"
        )
    check_same_text(refiner, transformer, _TEXT_PARTS, options)
