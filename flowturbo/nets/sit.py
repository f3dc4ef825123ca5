"""SiT (Ma et al., arXiv 2401.08740), the architecture of both the predictor and the refiner.

Parameter names and shapes are those of the public checkpoints (`SiT-XL-2-256x256.pt`, the published
FlowTurbo refiner), so their state dicts load unchanged.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCY_CHANNELS = 256  # sinusoidal features of t
NORM_EPS = 1e-6
GUIDED_CHANNELS = 3  # of 4 latent channels, as in the public code and figures


@dataclass(frozen=True)
class SiTConfig:
    """Shape of one SiT network.

    `latent_channels` is C. `in_channels` is C for a predictor and 2C for a refiner, which reads
    [x, v]. The first C of the `out_channels` outputs are the velocity; in public checkpoints the
    others are an unused variance. With `null_class` the label table has one row more than there are
    classes, for guidance. With `reverse_time` the weights predict noise - data with noise at t = 1
    (REPA, arXiv 2410.06940); the network then reverses time and sign.
    """

    latent_size: int
    patch_size: int
    in_channels: int
    latent_channels: int
    out_channels: int
    width: int
    depth: int
    num_heads: int
    num_classes: int
    mlp_ratio: float = 4.0
    null_class: bool = True
    reverse_time: bool = False

    @property
    def label_rows(self) -> int:
        return self.num_classes + self.null_class

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent."""
        return self.latent_channels, self.latent_size, self.latent_size

    @property
    def tokens_per_side(self) -> int:
        return self.latent_size // self.patch_size


def refiner_config(predictor: SiTConfig) -> SiTConfig:
    """One block of the predictor's width that reads [x, v], like the published refiner."""
    return replace(
        predictor, depth=1, in_channels=2 * predictor.latent_channels, reverse_time=False
    )


class PatchEmbed(nn.Module):
    """[B, in, h, w] to [B, tokens, width]."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out.flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Time in [0, 1], [B], to [B, width]."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_CHANNELS, width), nn.SiLU(), nn.Linear(width, width)
        )
        half = FREQUENCY_CHANNELS // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].float() * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        out: Tensor = self.mlp(waves.to(next(self.mlp.parameters()).dtype))
        return out


class LabelEmbedder(nn.Module):
    """Rows of the label table, [B], to [B, width]."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, label: Tensor) -> Tensor:
        out: Tensor = self.embedding_table(label)
        return out


class Attention(nn.Module):
    """Self-attention over tokens."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        by_head = batch, tokens, self.num_heads, width // self.num_heads
        q, k, v = (part.reshape(by_head).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        out = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        return projected


class Mlp(nn.Module):
    """Two layers with the tanh approximation of GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm: x [B, tokens, width], shift and scale [B, width]."""
    normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return normed * (1 + scale[:, None]) + shift[:, None]


class SiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        width = config.width
        self.attn = Attention(width, config.num_heads)
        self.mlp = Mlp(width, round(width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate_a[:, None] * self.attn(modulate(x, shift_a, scale_a))
        out: Tensor = x + gate_m[:, None] * self.mlp(modulate(x, shift_m, scale_m))
        return out


class FinalLayer(nn.Module):
    """Tokens to patches of the output."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        width = config.width
        self.linear = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        out: Tensor = self.linear(modulate(x, shift, scale))
        return out


class SiT(nn.Module):
    """Velocity network: v(x, t, label).

    A predictor reads x [B, C, h, w]. A refiner reads [x, v] [B, 2C, h, w] and returns the change of
    the velocity (FlowTurbo, Eq. 6). Time t [B] is in [0, 1] with noise at 0. label is [B] int64;
    `num_classes` is the null class. The network computes and returns the type of its parameters,
    whatever the type of x.
    """

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(config.label_rows, config.width)
        positions = position_embedding(config.width, config.tokens_per_side)
        self.pos_embed = nn.Parameter(torch.from_numpy(positions)[None], requires_grad=False)
        self.blocks = nn.ModuleList(SiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        reverse = self.config.reverse_time
        tokens = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed
        c = self.t_embedder(1 - t if reverse else t) + self.y_embedder(label)
        for block in self.blocks:
            tokens = block(tokens, c)
        return velocity_of(self.final_layer(tokens, c), self.config)

    def initialize(self) -> None:
        """Random weights to start training: adaLN-Zero makes every block an identity at first."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        weight = self.x_embedder.proj.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        adaptive = [m for m in self.modules() if isinstance(m, SiTBlock | FinalLayer)]
        for layer in [self.final_layer.linear, *(m.adaLN_modulation[1] for m in adaptive)]:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def velocity_of(tokens: Tensor, config: SiTConfig) -> Tensor:
    """The last layer's tokens [B, tokens, patch*patch*out] as a velocity [B, C, h, w]."""
    side, patch, out = config.tokens_per_side, config.patch_size, config.out_channels
    x = tokens.reshape(-1, side, side, patch, patch, out).permute(0, 5, 1, 3, 2, 4)
    x = x.reshape(-1, out, side * patch, side * patch)[:, : config.latent_channels]
    return -x if config.reverse_time else x


class ByLabel(nn.Module):
    """A SiT, or its folded form, for a step block. Conditioning: labels of rows, [B, 1] int64."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        # A label out of range, for example in a padding row, must not fail the whole batch.
        known = label[:, 0].clamp(0, self.network.config.label_rows - 1)
        output: Tensor = self.network(x, t, known)
        return output


def position_embedding(width: int, side: int) -> np.ndarray:
    """Fixed 2-D sine-cosine embedding of a side x side grid, [side*side, width] float32."""
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    frequencies = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4.0))

    def encode(position: np.ndarray) -> np.ndarray:
        angles = position.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    # The column half comes first, as in the public code.
    return np.concatenate([encode(columns), encode(rows)], axis=1).astype(np.float32)
