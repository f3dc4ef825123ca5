"""Networks of the public sizes with random weights: speed does not depend on the weights."""

from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKL
from torch import nn

from export.onnx_graph import ExportTarget
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import Role
from flowturbo.nets.blocks import DecoderBlock, PredictorBlock, RefinerBlock
from flowturbo.nets.sit import ByLabel, SiT, SiTConfig, refiner_config
from flowturbo.nets.vae import Decoder

XL = SiTConfig(
    latent_size=32,
    patch_size=2,
    in_channels=4,
    latent_channels=4,
    out_channels=8,
    width=1152,
    depth=28,
    num_heads=16,
    num_classes=1000,
)
GLYPHS = replace(
    XL, latent_size=16, out_channels=4, width=192, depth=6, num_heads=6, num_classes=36
)
SMALL = replace(XL, latent_size=8, width=64, depth=2, num_heads=2, num_classes=10)


@dataclass(frozen=True)
class Size:
    """A predictor's shape, its VAE's block widths, and what to measure.

    `rows` are batch sizes of a block, `batches` are images per request. Each measurement repeats
    for `measure_s` seconds.
    """

    config: SiTConfig
    vae_channels: tuple[int, ...]
    rows: tuple[int, ...]
    batches: tuple[int, ...]
    measure_s: float


SIZES = {
    # SiT-XL/2 at 256 x 256 with its refiner (one block) and sd-vae-ft-ema's decoder.
    "xl": Size(XL, (128, 256, 512, 512), (2, 8, 16, 32, 64), (1, 8), 0.5),
    "small": Size(SMALL, (32, 32), (2, 8), (1, 2), 0.02),
}


def random_network(config: SiTConfig, seed: int) -> SiT:
    """A SiT with random weights in all layers: adaLN-Zero would make each block the identity."""
    torch.manual_seed(seed)
    network = SiT(config)
    return network.eval().requires_grad_(False)


def random_vae(channels: tuple[int, ...], latent_channels: int) -> AutoencoderKL:
    """An `AutoencoderKL` with the structure of sd-vae-ft-ema and the block widths `channels`."""
    torch.manual_seed(0)
    levels = len(channels)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
        latent_channels=latent_channels,
        scaling_factor=0.18215,
    )
    frozen: AutoencoderKL = vae.eval().requires_grad_(False)
    return frozen


def pipeline_modules(size: Size) -> list[ExportTarget]:
    """Predictor, refiner and decoder blocks in float32, as the export makes them."""
    config = size.config
    shape = config.latent_shape
    condition = ClassLabel(config.num_classes)
    made: dict[Role, nn.Module] = {
        Role.PREDICTOR: PredictorBlock(ByLabel(random_network(config, 0)), 3),
        Role.REFINER: RefinerBlock(ByLabel(random_network(refiner_config(config), 1)), 3),
        Role.DECODER: DecoderBlock(Decoder(random_vae(size.vae_channels, config.latent_channels))),
    }
    return [ExportTarget(role, module, shape, condition) for role, module in made.items()]


def matrix_flops(config: SiTConfig, rows: int) -> float:
    """Floating-point operations of the matrix products of one evaluation on `rows` rows."""
    width, tokens = config.width, config.tokens_per_side**2
    per_token = (8 + 4 * config.mlp_ratio) * width**2 + 4 * tokens * width
    return rows * config.depth * (tokens * per_token + 12 * width**2)
