"""Z-Image: folders of `ZImagePipeline`.

Its forward takes lists of tensors of each row's own length, and complex numbers. This one computes
the same over diffusers' modules with tensors of one length: what a row's own padding does not reach
is masked. The network's time is t, and its output is the velocity.

diffusers' guidance_scale s is pred = pos + s (pos - neg): the usual scale, which requests have, is
s + 1.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM, Qwen3Model

from flowturbo.nets.families.family import (
    CONTEXT,
    CONTEXT_LENGTH,
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
    zero,
)
from flowturbo.nets.families.folder import DiffusersFolder, load_network
from flowturbo.nets.families.qwen import Qwen
from flowturbo.nets.vae import Decoder, Encoder, latent_factor, tile_size
from flowturbo.nets.weights import CheckpointError

_TEXT_LENGTH = 512  # diffusers' default
_PATCH, _MULTIPLE = 2, 32  # tokens of texts and images are padded to multiples of 32
_KIND = f"{_PATCH}-1"
_LATENTS = 128  # on a side by default: 1024 pixels with the model's VAE


class RealRope:
    """Attention with the cosine and sine of each position in place of complex numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, n, D] to [B, n, D]; the mask [B, n] says which keys are read."""
        assert freqs_cis is not None
        if isinstance(freqs_cis, Tensor):  # complex: diffusers' own forward
            freqs_cis = freqs_cis.real, freqs_cis.imag
        q, k, v = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1))
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        cos, sin = (each[:, :, None] for each in freqs_cis)

        def turned(x: Tensor) -> Tensor:
            a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3).type_as(x)

        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        q, k, v = (each.transpose(1, 2) for each in (turned(q), turned(k), v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        made: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2, 3))
        return made


class Rope(nn.Module):
    """Cosines and sines of the positions along three axes."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        rope = transformer.rope_embedder
        tables = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, rope.theta)
        for axis, table in enumerate(tables):
            self.register_buffer(f"cos{axis}", table.real.contiguous(), persistent=False)
            self.register_buffer(f"sin{axis}", table.imag.contiguous(), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, n, 3] to cosines and sines, [B, n, head / 2] each."""
        cos, sin = (
            torch.cat([getattr(self, f"{name}{k}")[positions[..., k]] for k in range(3)], -1)
            for name in ("cos", "sin")
        )
        return cos, sin


def _text_positions(length: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of texts of `length` [B]: positions [B, n, 3], what their padding reaches, and its length."""
    padded = (length + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE
    n = torch.arange(count, device=length.device)[None]
    inside = n < padded[:, None]
    first = torch.where(inside, n + 1, torch.zeros_like(n))
    none = torch.zeros_like(first)
    return torch.stack([first, none, none], -1), inside, padded


class TextEncoder(nn.Module):
    """Qwen3's last layer but one, and the transformer's layers that read the text alone."""

    def __init__(self, qwen: Qwen, transformer: Any) -> None:
        super().__init__()
        self.qwen = qwen
        self.embed = transformer.cap_embedder
        self.refiner = transformer.context_refiner
        self.pad = transformer.cap_pad_token
        self.rope = Rope(transformer)

    def forward(self, *tokens: Tensor) -> tuple[Tensor, Tensor]:
        ids, mask = tokens
        context = self.embed(self.qwen(ids, mask))
        length = mask.sum(1)
        n = torch.arange(ids.shape[1], device=ids.device)[None, :, None]
        context = torch.where(n < length[:, None, None], context, self.pad[None])
        positions, inside, _ = _text_positions(length, ids.shape[1])
        rope = self.rope(positions)
        for layer in self.refiner:
            context = layer(context, inside, rope)
        return context, length[:, None]


class Network(nn.Module):
    """The other layers. `out_channels` are kept of the output."""

    def __init__(self, transformer: Any, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.scale = transformer.t_scale
        self.embed_time = transformer.t_embedder
        self.embed = transformer.all_x_embedder[_KIND]
        self.refiner = transformer.noise_refiner
        self.layers = transformer.layers
        self.final = transformer.all_final_layer[_KIND]
        self.pad = transformer.x_pad_token
        self.rope = Rope(transformer)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, length: Tensor) -> Tensor:
        kind = type_of(self)
        rows, channels, high, wide = x.shape
        high, wide = high // _PATCH, wide // _PATCH
        time = self.embed_time(t * self.scale).to(kind)
        positions, inside, padded = _text_positions(length[:, 0], context.shape[1])
        tokens = x.reshape(rows, channels, high, _PATCH, wide, _PATCH).permute(0, 2, 4, 3, 5, 1)
        tokens = self.embed(tokens.reshape(rows, high * wide, -1).to(kind))
        # Image tokens are padded too, and attended, as texts are.
        count = high * wide
        every = torch.arange((count + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE, device=x.device)
        real, read = every < count, every.clamp(max=count - 1)
        tokens = tokens[:, read]
        tokens = torch.where(real[None, :, None], tokens, self.pad[None])
        first = (padded + 1)[:, None].expand(rows, every.shape[0])
        y = torch.arange(high, device=x.device)[:, None].expand(high, wide).reshape(-1)[read]
        z = torch.arange(wide, device=x.device)[None].expand(high, wide).reshape(-1)[read]
        places = torch.stack([first, *(each[None].expand(rows, -1) for each in (y, z))], -1)
        places = places * real[None, :, None]
        rope = self.rope(places)
        for layer in self.refiner:
            tokens = layer(tokens, None, rope, time)
        both = torch.cat([tokens, context.to(kind)], 1)
        rope = tuple(torch.cat(pair, 1) for pair in zip(rope, self.rope(positions), strict=True))
        keep = torch.cat([torch.ones_like(first, dtype=torch.bool), inside], 1)
        for layer in self.layers:
            both = layer(both, keep, rope, time)
        out = self.final(both, c=time)[:, :count]
        out = out.reshape(rows, high, wide, _PATCH, _PATCH, -1).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(rows, -1, high * _PATCH, wide * _PATCH)[:, : self.out_channels]


class ZImage(Family):
    """A ZImagePipeline."""

    title: ClassVar[str] = "z-image"

    def reference(self, wanted: Wanted) -> tuple[np.ndarray, tuple[float, ...]]:
        """As in the base class."""
        pipe = ZImagePipeline(**self.parts)
        latents, times = run(pipe, wanted, guidance_scale=wanted.guidance_scale - 1)
        return latents.numpy(), times

    def untrained_refiner(self) -> UntrainedRefiner:
        """As in the base class: one layer, which starts as the predictor's last one."""
        teacher = self.parts["transformer"]
        config, channels = teacher.config, teacher.config.in_channels
        last = config.n_layers - 1
        made = built(
            type(teacher), config, in_channels=2 * channels, n_layers=1, n_refiner_layers=0
        )
        copy_weights(made, teacher, {"layers.0.": f"layers.{last}."})
        embed = made.all_x_embedder[_KIND]
        with torch.no_grad():  # it reads the state as the predictor does, and no velocity yet
            weight = embed.weight.zero_().unflatten(1, (_PATCH**2, 2 * channels))
            known = teacher.all_x_embedder[_KIND].weight.unflatten(1, (_PATCH**2, channels))
            weight[..., :channels] = known
        zero(made.all_final_layer[_KIND].linear)
        return UntrainedRefiner(made, Network(_with_real_rope(made), channels))


def load(folder: DiffusersFolder, options: FolderOptions) -> ZImage:
    """Reads a Z-Image folder. Raises CheckpointError."""
    transformer = folder.network("transformer", ZImageTransformer2DModel)
    config = transformer.config
    if _KIND not in transformer.all_x_embedder or config.siglip_feat_dim is not None:
        raise CheckpointError(
            f"{folder.path}/transformer: only patches of {_PATCH} without SigLIP are supported"
        )
    refiner = None
    if options.refiner:
        refiner = load_network(options.refiner, ZImageTransformer2DModel)
        if refiner.config.in_channels != 2 * config.in_channels or refiner.config.dim != config.dim:
            raise CheckpointError(
                f"{options.refiner}: a refiner has in_channels {2 * config.in_channels} and dim "
                f"{config.dim}, got {refiner.config.in_channels} and {refiner.config.dim}"
            )
        # Both networks read what the predictor's layers make of the text.
        parts = ["cap_embedder"] + ["context_refiner"] * bool(refiner.config.n_refiner_layers)
        check_same_text(refiner, transformer, parts, options)
        refiner = Network(_with_real_rope(refiner), config.in_channels)
    vae = folder.vae(config.in_channels)
    model = folder.text_encoder("text_encoder", Qwen3Model, Qwen3ForCausalLM)
    longest = min(_TEXT_LENGTH, config.axes_lens[0] - 2)  # the image stands behind the text
    length = text_length(options, _TEXT_LENGTH, _MULTIPLE, longest)
    if length % _MULTIPLE:
        raise CheckpointError(f"--text-length must be a multiple of {_MULTIPLE}, got {length}")
    tokenizer, tokenizing = folder.tokenizer("tokenizer", length, mask=True, enable_thinking=True)
    factor = latent_factor(vae)
    largest = min(config.axes_lens[1:]) * _PATCH * factor
    scheduler, grid = folder.scheduler()
    _with_real_rope(transformer)
    qwen = Qwen(model, (model.config.num_hidden_layers - 1,))
    return ZImage(
        network=Network(transformer, config.in_channels),
        refiner=refiner,
        text_encoder=TextEncoder(qwen, transformer),
        decoder=Decoder(vae),
        encoder=Encoder(vae),
        tokenizers=(tokenizing,),
        conditioning=((CONTEXT, (length, config.dim)), (CONTEXT_LENGTH, (1,))),
        latent_channels=config.in_channels,
        factor=factor,
        multiple=factor * _PATCH,
        patch=_PATCH,
        size=(min(_LATENTS * factor, largest),) * 2,
        largest=largest,
        largest_decode=tile_size(vae),
        text_length=length,
        guidance_scale=6.0,  # 5 in the convention of diffusers' pipeline, which is its default
        grid=grid,
        distilled=options.distilled,
        ignored=folder.unused(),
        parts={
            "transformer": transformer,
            "vae": vae,
            "scheduler": scheduler,
            "text_encoder": model,
            "tokenizer": tokenizer,
        },
    )


def _with_real_rope(transformer: Any) -> Any:
    for module in transformer.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(RealRope())
    return transformer
