"""The baseline: FlowTurbo's sampler in plain PyTorch, on the same checkpoints.

The loop is that of the paper's public code (`reference` in `flowturbo.solver.program`). Guidance
doubles the batch, as in SiT: first the conditional rows, then as many rows with the null label.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flowturbo.errors import RequestError
from flowturbo.latents import noise
from flowturbo.nets.checkpoint import build_network
from flowturbo.nets.sit import GUIDED_CHANNELS, SiT
from flowturbo.nets.vae import Decoder, load_vae
from flowturbo.nets.weights import load_checkpoint
from flowturbo.solver.schedule import Schedule

PRECISIONS = ("fp32", "bf16")

Network = Callable[..., Tensor]


class TorchPipeline:
    """Predictor, refiner and decoder of `weights` on the CPU with `threads` threads.

    `precision` bf16 is autocast. `compiled` wraps each network in torch.compile in its default
    mode, as the paper's public code does. On a CPU, max-autotune and freezing were not faster with
    these networks. Sizes are fixed: a new batch size compiles again, which takes up to a minute.
    Raises CheckpointError, and ValueError for another precision.
    """

    def __init__(
        self, weights: Path, threads: int, compiled: bool = False, precision: str = "fp32"
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        torch.set_num_threads(threads)
        predictor = _network(weights / "predictor.safetensors", reads_velocity=False)
        refiner = _network(weights / "refiner.safetensors", reads_velocity=True)
        config = predictor.config
        self.latent_shape = config.latent_shape
        self.num_classes = config.num_classes
        self._bf16 = precision == "bf16"
        self._predictor, self._refiner, self._decoder = (
            _compiled(network) if compiled else network
            for network in (predictor, refiner, Decoder(load_vae(weights / "vae")))
        )

    @torch.inference_mode()
    def generate(
        self, labels: Sequence[int], seeds: Sequence[int], schedule: str, guidance_scale: float
    ) -> np.ndarray:
        """Images [n, H, W, 3] uint8 of the class ids `labels` from `seeds`, [n] each.

        `schedule` has steps H, P and R; others raise RequestError. A scale of 1 is unguided.
        """
        steps = Schedule.parse(schedule).steps
        if other := set(steps) - set("HPR"):
            raise RequestError(f"steps must be H, P or R, got {sorted(other)[0]} in {schedule}")
        x = torch.from_numpy(noise(np.array(seeds, dtype=np.int64), self.latent_shape))
        y = torch.tensor(labels, dtype=torch.long)
        if guidance_scale != 1.0:
            x = torch.cat([x, x])
            y = torch.cat([y, torch.full_like(y, self.num_classes)])
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            latent = sample_plainly(self._predictor, self._refiner, x, y, steps, guidance_scale)
            images: Tensor = self._decoder(latent[: len(labels)])
        return images.numpy()


def sample_plainly(
    predictor: Network, refiner: Network, x: Tensor, y: Tensor, steps: str, scale: float
) -> Tensor:
    """Latents [n, C, h, w] from noise `x`, with the letters `steps` on a uniform grid.

    With a `scale` other than 1, the second half of `x` repeats the first, and its labels in `y`
    are the null label.
    """
    t = torch.linspace(0, 1, len(steps) + 1, device=x.device)
    h = t[1]  # the grid is uniform
    v = None

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return _guide(predictor(_shared(x, scale), t.repeat(len(x)), y), scale)

    def refine(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        read = torch.cat([_shared(x, scale), v], 1)
        return _guide(refiner(read, t.repeat(len(x)), y), scale)

    for i, step in enumerate(steps):
        if step == "R":
            assert v is not None  # a schedule does not start with R
            d = v + refine(x, v, t[i])
            d_next = d + refine(x + h * d, v, t[i + 1])
        else:
            d = v if step == "P" and v is not None else predict(x, t[i])
            d_next = predict(x + h * d, t[i + 1])
        x = x + h / 2 * (d + d_next)
        v = d if step == "R" else d_next
    return x


def _network(path: Path, *, reads_velocity: bool) -> SiT:
    return build_network(load_checkpoint(path), reads_velocity=reads_velocity)


def _compiled(network: nn.Module) -> Network:
    compiled: Network = torch.compile(network, dynamic=False)
    return compiled


def _shared(x: Tensor, scale: float) -> Tensor:
    """The network's input: both halves of a guided batch take the conditional half's state."""
    if scale == 1.0:
        return x
    half = x[: len(x) // 2]
    return torch.cat([half, half])


def _guide(output: Tensor, scale: float) -> Tensor:
    """u + scale * (c - u) on the guided channels; the other channels stay unchanged."""
    output = output.float()
    if scale == 1.0:
        return output
    c, u = output[:, :GUIDED_CHANNELS].chunk(2)
    guided = u + scale * (c - u)
    return torch.cat([torch.cat([guided, guided]), output[:, GUIDED_CHANNELS:]], 1)
