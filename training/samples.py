"""Pictures of what a refiner makes while it is trained."""

from contextlib import AbstractContextManager
from itertools import pairwise

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from flowturbo.latents import noise
from flowturbo.nets.sit import GUIDED_CHANNELS, SiT
from flowturbo.nets.vae import Decoder
from flowturbo.solver.grid import time_grid
from flowturbo.solver.guidance import MAX_SCALE
from flowturbo.solver.schedule import Schedule
from training.loop import device
from training.plan import PlanError


class RefinerPreview:
    """A grid of images, the same classes from the same noise every time.

    Without a `vae` the latents' first three channels are shown. A `guidance_scale` of 1 is none.
    Raises RequestError for a schedule that cannot be read, PlanError for one with steps other
    than H, P and R and for a scale that is no use.
    """

    def __init__(
        self,
        predictor: SiT,
        every: int,
        *,
        vae: AutoencoderKL | None = None,
        schedule: str = "H1P5R3",
        guidance_scale: float = 1.5,
        images: int = 16,
        precision: str = "bf16",
        guided_channels: int = GUIDED_CHANNELS,
    ) -> None:
        self.every, self._schedule = every, Schedule.parse(schedule)
        if other := set(self._schedule.steps) - set("HPR"):
            raise PlanError(f"steps must be H, P or R, got {sorted(other)[0]} in {schedule}")
        if not 0 <= guidance_scale <= MAX_SCALE:
            raise PlanError(
                f"the samples' guidance scale must be 0 to {MAX_SCALE:g}, got {guidance_scale}"
            )
        self._predictor, self._scale, self._guided = predictor, guidance_scale, guided_channels
        self._decode = Decoder(vae).to(device()) if vae else _as_colours
        config = predictor.config
        shape = (config.latent_channels, config.latent_size, config.latent_size)
        self._noise = torch.from_numpy(noise(np.arange(images), shape))
        self._label = torch.arange(images) * config.num_classes // images
        self._bf16 = precision == "bf16"

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> np.ndarray:
        """[H, W, 3] uint8: a near square of images that the refiner `network` had a part in."""
        x, label = self._noise.to(device()), self._label.to(device())
        with self._autocast():
            latent = sample(
                self._predictor, network, x, label, self._schedule, self._scale, self._guided
            )
        return tile(self._decode(latent).cpu().numpy())

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(device().type, torch.bfloat16, enabled=self._bf16)


def sample(
    predictor: SiT,
    refiner: nn.Module,
    x: Tensor,
    label: Tensor,
    schedule: Schedule,
    scale: float,
    guided_channels: int = GUIDED_CHANNELS,
) -> Tensor:
    """Latents [B, C, h, w] from noise `x` of that shape, of class ids `label` [B].

    Steps H, P and R on the schedule's grid as the public code takes them
    (`flowturbo.solver.program`, variant `reference`). Guided, the batch is doubled, as in SiT: the
    rows with the null label follow the conditional ones.
    """
    guided, count = scale != 1.0, len(x)
    if guided:
        x = torch.cat([x, x])
        label = torch.cat([label, torch.full_like(label, predictor.config.num_classes)])

    def evaluate(network: nn.Module, x: Tensor, t: float, *velocity: Tensor) -> Tensor:
        half = x[:count]
        read = torch.cat([torch.cat([half, half]) if guided else half, *velocity], 1)
        out = network(read, torch.full((len(x),), t, device=x.device), label).float()
        if not guided:
            return out
        c, u = out[:, :guided_channels].chunk(2)
        mixed = u + scale * (c - u)
        return torch.cat([torch.cat([mixed, mixed]), out[:, guided_channels:]], 1)

    v = None
    grid = time_grid(len(schedule), schedule.shift)
    for step, (t, t_next) in zip(schedule.steps, pairwise(grid), strict=True):
        h = t_next - t
        if step == "R" and v is not None:
            d = v + evaluate(refiner, x, t, v)
            d_next = d + evaluate(refiner, x + h * d, t_next, v)
        else:
            d = v if step == "P" and v is not None else evaluate(predictor, x, t)
            d_next = evaluate(predictor, x + h * d, t_next)
        x = x + h / 2 * (d + d_next)
        v = d if step == "R" else d_next
    return x[:count]


def tile(images: np.ndarray) -> np.ndarray:
    """[n, H, W, 3] to one near square grid, filled row by row; what is left is black."""
    count, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    padding = np.zeros((rows * columns - count, height, width, channels), images.dtype)
    cells = np.concatenate([images, padding]).reshape(rows, columns, height, width, channels)
    return cells.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)


def _as_colours(latent: Tensor) -> Tensor:
    """[B, C, h, w] of about unit scale to [B, 4h, 4w, 3] uint8, from three channels or fewer."""
    channels = torch.arange(3, device=latent.device).clamp(max=latent.shape[1] - 1)
    levels = (latent[:, channels] * 0.2 + 0.5).clamp(0, 1) * 255
    large = levels.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return large.round().permute(0, 2, 3, 1).to(torch.uint8)
