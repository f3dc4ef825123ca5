"""A SiT for inference: the same function, in the form that compilers make fast programs of.

What only the weights decide is done once, here. The scale of attention is in the weights of
the queries, and the 1 of `1 + scale` in a bias. The conditioning of all layers is one product.
Patches are a product instead of a convolution.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowturbo.nets.sit import NORM_EPS, Attention, SiT, SiTBlock, velocity_of


class FoldedSiT(nn.Module):
    """`sit` with its weights folded; both share the others. Maps as `sit` does.

    In float32 the outputs differ by rounding, by less than 1e-5 of the largest value.
    """

    def __init__(self, sit: SiT) -> None:
        super().__init__()
        self.config = sit.config
        self.t_embedder, self.y_embedder = sit.t_embedder, sit.y_embedder
        patches = sit.x_embedder.proj
        weight = patches.weight.flatten(1).T.detach()
        self.patches = nn.Parameter(weight.contiguous(), requires_grad=False)
        place = sit.pos_embed + patches.bias  # type: ignore[operator]
        self.place = nn.Parameter(place.detach(), requires_grad=False)
        blocks: list[SiTBlock] = list(sit.blocks)  # type: ignore[arg-type]
        adaptive: list[Any] = [*blocks, sit.final_layer]
        self.conditioning = _joined([each.adaLN_modulation[1] for each in adaptive])
        with torch.no_grad():  # each layer has (shift, scale, gate) twice, the last (shift, scale)
            scales = self.conditioning.bias.view(-1, sit.config.width)[1::3]
            scales += 1
        self.layers = nn.ModuleList(FoldedBlock(block) for block in blocks)
        self.out = sit.final_layer.linear

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """As SiT.forward."""
        reverse, patch = self.config.reverse_time, self.config.patch_size
        side, channels = self.config.tokens_per_side, self.config.in_channels
        parts = x.to(self.place.dtype).reshape(-1, channels, side, patch, side, patch)
        rows = parts.permute(0, 2, 4, 1, 3, 5).reshape(-1, side * side, channels * patch * patch)
        tokens = rows @ self.patches + self.place
        c = self.t_embedder(1 - t if reverse else t) + self.y_embedder(label)
        all_parts = self.conditioning(F.silu(c))[:, None].split(self.config.width, 2)
        for k, layer in enumerate(self.layers):
            tokens = layer(tokens, *all_parts[6 * k : 6 * k + 6])
        shift, scale = all_parts[-2:]
        return velocity_of(self.out(_normed(tokens) * scale + shift), self.config)


class FoldedBlock(nn.Module):
    """A block whose conditioning comes from outside; each scale includes the 1."""

    def __init__(self, block: SiTBlock) -> None:
        super().__init__()
        self.heads, self.qkv = block.attn.num_heads, _scaled_queries(block.attn)
        self.proj, self.mlp = block.attn.proj, block.mlp

    def forward(
        self,
        x: Tensor,
        shift_a: Tensor,
        scale_a: Tensor,
        gate_a: Tensor,
        shift_m: Tensor,
        scale_m: Tensor,
        gate_m: Tensor,
    ) -> Tensor:
        """`x` [B, tokens, width]; the others are [B, 1, width]."""
        x = x + gate_a * self._attention(_normed(x) * scale_a + shift_a)
        out: Tensor = x + gate_m * self.mlp(_normed(x) * scale_m + shift_m)
        return out

    def _attention(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        return projected


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def _scaled_queries(attention: Attention) -> nn.Linear:
    folded = _joined([attention.qkv])
    width = attention.qkv.in_features
    factor = (width // attention.num_heads) ** -0.5
    with torch.no_grad():
        folded.weight[:width] *= factor
        folded.bias[:width] *= factor
    return folded


def _joined(layers: list[nn.Linear]) -> nn.Linear:
    """One layer with the outputs of all; a copy."""
    weight = torch.cat([layer.weight for layer in layers]).detach()
    made = nn.Linear(weight.shape[1], len(weight), device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]).detach(), False)
    return made
