"""Sample images from a refiner during training."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from flowturbo.latents import noise
from flowturbo.nets.blocks import PredictorBlock, RefinerBlock
from flowturbo.nets.sit import GUIDED_CHANNELS, ByLabel, SiT
from flowturbo.nets.vae import Decoder, to_levels
from flowturbo.rows import pair_rows, scalar_rows
from flowturbo.solver.calls import BlockCall, Network
from flowturbo.solver.guidance import MAX_SCALE, Guidance
from flowturbo.solver.program import Program, compile_program
from flowturbo.solver.sampler import sample
from flowturbo.solver.schedule import Schedule
from training.loop import device
from training.plan import PlanError


class RefinerPreview:
    """Draws a grid of images, each time with the same classes and the same noise.

    Without a `vae` it shows the first three channels of the latents. A `guidance_scale` of 1 means
    no guidance. Raises RequestError for a schedule that cannot be read, PlanError for a scale that
    is out of range.
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
        if not 0 <= guidance_scale <= MAX_SCALE:
            raise PlanError(
                f"the samples' guidance scale must be 0 to {MAX_SCALE:g}, got {guidance_scale}"
            )
        self._predictor, self._scale, self._guided = predictor, guidance_scale, guided_channels
        self._decode = Decoder(vae).to(device()) if vae else _as_colours
        config = predictor.config
        shape = config.latent_shape
        self._noise = torch.from_numpy(noise(np.arange(images), shape))
        self._label = torch.arange(images) * config.num_classes // images
        self._bf16 = precision == "bf16"

    @torch.no_grad()
    def __call__(self, network: Any) -> np.ndarray:
        """A nearly square grid of images, [H, W, 3] uint8, sampled with the refiner `network`."""
        x, label = self._noise.to(device()), self._label.to(device())
        with self._autocast():
            networks = {
                Network.PREDICTOR: ByLabel(self._predictor),
                Network.REFINER: ByLabel(network),
            }
            null = torch.full_like(label, self._predictor.config.num_classes)
            program = compile_program(self._schedule)
            latent = sample_latents(
                networks, x, [label[:, None]], [null[:, None]], program, self._scale, self._guided
            )
        return tile(self._decode(latent).cpu().numpy())

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(device().type, torch.bfloat16, enabled=self._bf16)


def sample_latents(
    networks: Mapping[Network, nn.Module],
    x: Tensor,
    conditioning: Sequence[Tensor],
    null: Sequence[Tensor],
    program: Program,
    scale: float,
    guided_channels: int,
) -> Tensor:
    """Latents [B, C, h, w] from noise `x` of the same shape, with the networks in training.

    Uses the sampler and step blocks of the service. `conditioning` are the block's tensors, [B,
    ...] each, and `null` those of the unconditional rows, which a `scale` of 1 does not need.
    """
    guidance = Guidance(scale)
    forms = {Network.PREDICTOR: PredictorBlock, Network.REFINER: RefinerBlock}
    blocks = {role: forms[role](of, guided_channels) for role, of in networks.items()}
    if guidance.enabled:  # rows in pairs, conditional then unconditional
        x = x.repeat_interleave(2, 0)
        pairs = zip(conditioning, null, strict=True)
        conditioning = [torch.stack(pair, 1).flatten(0, 1) for pair in pairs]
    pair = torch.from_numpy(pair_rows(len(x), guided=guidance.enabled)).to(x.device)

    def block(call: BlockCall, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scalars = torch.from_numpy(scalar_rows(call, len(x), guidance)).to(x.device)
        x_next, v_next = blocks[call.network](x, v, scalars, pair, *conditioning)
        return x_next, v_next

    latents = sample(program, x, block)
    return latents[:: guidance.rows]


class PromptSheet:
    """Draws a nearly square grid of images of prompts, each time from the same noise.

    `conditioning` and `null` are the block's tensors with and without the prompts, [n, ...] each.
    `decoder` has `pixels`, from latents [n, C, h, w] to [n, 3, H, W].
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        conditioning: Sequence[Tensor],
        null: Sequence[Tensor],
        program: Program,
        scale: float,
        decoder: nn.Module,
    ) -> None:
        count = len(conditioning[0])
        self._noise = torch.from_numpy(noise(np.arange(count), shape)).to(device())
        self._conditioning, self._null = conditioning, null
        self._program, self._scale, self._decoder = program, scale, decoder

    @torch.no_grad()
    def draw(self, networks: Mapping[Network, nn.Module]) -> np.ndarray:
        """The grid, [H, W, 3] uint8; `networks` compute in bfloat16 where autocast allows."""
        with torch.autocast(device().type, torch.bfloat16):
            latent = sample_latents(
                networks,
                self._noise,
                self._conditioning,
                self._null,
                self._program,
                self._scale,
                len(self._noise[0]),
            )
        decoder: Any = self._decoder.to(device())
        return tile(to_levels(decoder.pixels(latent.float())).cpu().numpy())


def tile(images: np.ndarray) -> np.ndarray:
    """[n, H, W, 3] to one nearly square grid, filled row by row. Empty cells are black."""
    count, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    padding = np.zeros((rows * columns - count, height, width, channels), images.dtype)
    cells = np.concatenate([images, padding]).reshape(rows, columns, height, width, channels)
    return cells.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)


def _as_colours(latent: Tensor) -> Tensor:
    """[B, C, h, w] of about unit scale to [B, 4h, 4w, 3] uint8; shows at most three channels."""
    channels = torch.arange(3, device=latent.device).clamp(max=latent.shape[1] - 1)
    levels = (latent[:, channels] * 0.2 + 0.5).clamp(0, 1) * 255
    large = levels.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return large.round().permute(0, 2, 3, 1).to(torch.uint8)
