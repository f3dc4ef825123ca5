"""Estimates SiT's time on a GPU: tile waves of its matrix products, attention and memory passes.

The estimate is a reference for measurements, accurate to about 20%. Products run in waves of tiles
over the multiprocessors. Attention runs at a third of the peak. Everything else reads and writes
the activations. docs/gpu.md has the figures for an H100 and an H200.
"""

import math
from dataclasses import dataclass

from bench.networks import matrix_flops
from flowturbo.contract import Role
from flowturbo.generate import roles_called
from flowturbo.nets.sit import SiTConfig, refiner_config
from flowturbo.solver.program import Program

# Rows and columns of an output tile, and the share of the peak that such tiles reach.
_TILES = (((128, 256), 1.0), ((128, 128), 0.9))
_ATTENTION = 0.32  # of the peak
_PASSES = 10  # over the activations, per transformer layer
_BYTES = 2  # per number in bf16 or fp16
_CALL_MS = 0.6  # per call through the orchestrator, while the GPU waits
# sd-vae-ft-ema's decoder: its work per image of 256 x 256, and its share of the peak.
DECODER_TFLOP, _DECODER = 0.622, 0.45


@dataclass(frozen=True)
class Chip:
    """A GPU: peak of its matrix products in TFLOP/s, memory in TB/s, multiprocessors."""

    peak: float
    bandwidth: float
    processors: int


def predictor_ms(chip: Chip, config: SiTConfig, rows: int) -> float:
    """Milliseconds of one evaluation of a SiT on `rows` rows."""
    width, tokens = config.width, config.tokens_per_side**2
    hidden = round(width * config.mlp_ratio)
    products = ((3 * width, width), (width, width), (hidden, width), (width, hidden))
    layer = sum(_product_ms(chip, rows * tokens, *shape) for shape in products)
    attention = 4 * rows * tokens**2 * width / (chip.peak * _ATTENTION * 1e9)
    activations = _PASSES * rows * tokens * width * _BYTES / (chip.bandwidth * 1e9)
    modulation = 6 * width**2 * _BYTES / (chip.bandwidth * 1e9)
    return config.depth * (layer + attention + activations + modulation)


def _product_ms(chip: Chip, rows: int, columns: int, inner: int) -> float:
    """[rows, inner] x [inner, columns] with the fastest tiles; weights are read once."""
    flop, times = 2 * rows * columns * inner, []
    for (high, wide), share in _TILES:
        tiles = math.ceil(rows / high) * math.ceil(columns / wide)
        used = tiles / (math.ceil(tiles / chip.processors) * chip.processors)
        times.append(flop / (chip.peak * share * used * 1e9))
    return max(min(times), columns * inner * _BYTES / (chip.bandwidth * 1e9))


def request_ms(
    chip: Chip, config: SiTConfig, program: Program, images: int, *, calls: bool = True
) -> float:
    """Milliseconds per guided request, decoder included; `calls=False` for an ensemble."""
    called = roles_called(program)
    rows = 2 * images
    total = images * DECODER_TFLOP / (chip.peak * _DECODER) * 1e3
    for model in called:
        if model == Role.PREDICTOR:
            total += predictor_ms(chip, config, rows)
        else:
            total += 2 * predictor_ms(chip, refiner_config(config), rows)  # 2 evaluations per step
    return total + (len(called) + 1) * _CALL_MS * calls


def image_tflop(config: SiTConfig, program: Program) -> float:
    """TFLOP per guided image, decoder included."""
    called = roles_called(program)
    flop = {
        Role.PREDICTOR: matrix_flops(config, 2),
        Role.REFINER: 2 * matrix_flops(refiner_config(config), 2),
    }
    return sum(flop[model] for model in called) / 1e12 + DECODER_TFLOP
