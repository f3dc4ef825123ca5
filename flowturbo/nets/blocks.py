"""The step block around a network, as one static graph (FlowTurbo's sample-aware compilation)."""

from typing import Any

import torch
from torch import Tensor, nn

from flowturbo.nets.vae import to_levels
from flowturbo.solver.calls import PredictorScalars, RefinerScalars
from flowturbo.solver.guidance import guide

Conditioning = tuple[Tensor, ...]
Members = tuple[Tensor, Tensor]  # the conditional and the unconditional row of each row's pair


class StepBlock(nn.Module):
    """A network with guidance, for rows with one set of coefficients each.

    Inputs as in `flowturbo.contract`: x and velocity [B, C, h, w], scalars [B, 5], pair [B, 1],
    then the conditioning tensors. The equations and the columns of `scalars` are those of
    `flowturbo.solver.calls`. `network` maps (x, t [B], conditioning) to the velocity. Guidance acts
    on its first `guidance_channels` channels. The other channels keep the row's own output, as in
    SiT. The network computes in the type of its parameters, the rest in float32.
    """

    def __init__(self, network: nn.Module, guidance_channels: int) -> None:
        super().__init__()
        self.network = network
        self.guidance_channels = guidance_channels

    def evaluate(
        self, read: Tensor, t: Tensor, conditioning: Conditioning, members: Members, scale: Tensor
    ) -> Tensor:
        """The network's guided output at times `t`, with guidance scales `scale` [B, 1, 1, 1]."""
        output = self.network(read, t.flatten(), *conditioning).float()
        conditional, unconditional = members
        guided, rest = output[:, : self.guidance_channels], output[:, self.guidance_channels :]
        c, u = guided[conditional], guided[unconditional]
        guided = guide(c, u, scale)  # a row without a partner keeps its own output
        return torch.cat([guided, rest], 1) if rest.shape[1] else guided


class PredictorBlock(StepBlock):
    """One evaluation of the predictor, and the solver's update."""

    def forward(
        self, x: Tensor, velocity: Tensor, scalars: Tensor, pair: Tensor, *conditioning: Tensor
    ) -> tuple[Tensor, Tensor]:
        row = PredictorScalars(*columns(scalars))
        members = partners(pair[:, 0])
        read = shared(x + row.euler * velocity, members)
        velocity_next = self.evaluate(read, row.t, conditioning, members, row.scale)
        return x + row.w_prev * velocity + row.w_next * velocity_next, velocity_next


class RefinerBlock(StepBlock):
    """One refiner step: both evaluations, and the solver's update."""

    def forward(
        self, x: Tensor, velocity: Tensor, scalars: Tensor, pair: Tensor, *conditioning: Tensor
    ) -> tuple[Tensor, Tensor]:
        row = RefinerScalars(*columns(scalars))
        members, h = partners(pair[:, 0]), row.end - row.t

        def refine(v: Tensor, x: Tensor, read: Tensor, t: Tensor, scale: Tensor) -> Tensor:
            both = torch.cat([shared(x, members), read], 1)
            return v + self.evaluate(both, t, conditioning, members, scale)

        d = refine(velocity, x, velocity, row.t, row.scale)
        read = torch.where(row.reads_refined > 0.5, d, velocity)
        d_next = refine(d, x + h * d, read, row.end, row.scale_end)
        return x + h / 2 * (d + d_next), d


class DecoderBlock(nn.Module):
    """Latents [B, C, h, w] to images and their magnitudes, as in `flowturbo.contract`.

    `decoder` has `pixels`, from latents to [B, 3, H, W] float32 with visible levels in [-1, 1].
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder: Any = decoder

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.decoder.pixels(latent)
        # A mean always keeps NaN and infinity; a maximum may lose them, and images lose both.
        return to_levels(pixels), pixels.abs().mean((1, 2, 3))[:, None]


class InFloat32(nn.Module):
    """Computes `module` in float32 within a network of another type."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **options: Any) -> Any:
        """The result in the type of the first tensor."""
        given = [value for value in (*args, *options.values()) if isinstance(value, Tensor)]
        kind = given[0].dtype
        made = self.module(*map(_float, args), **{key: _float(of) for key, of in options.items()})
        if isinstance(made, tuple):
            return tuple(of.to(kind) if isinstance(of, Tensor) else of for of in made)
        return made.to(kind)


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def columns(scalars: Tensor) -> tuple[Tensor, ...]:
    """[B, 5] to five tensors [B, 1, 1, 1]."""
    return scalars[:, :, None, None, None].unbind(1)


def shared(x: Tensor, members: Members) -> Tensor:
    """`x` [B, ...] with unconditional rows replaced by their partners: both have the same state."""
    conditional, _ = members
    return x[conditional]


def partners(pair: Tensor) -> Members:
    """Row indices [B] of the conditional and the unconditional row of each row's pair.

    `pair` [B] is the offset to a row's partner: 1 in a conditional row, -1 in an unconditional one,
    0 without a partner. Indices are clamped, so that they stay inside a padded batch.
    """
    row = torch.arange(pair.shape[0], device=pair.device)
    partner = torch.minimum((row + pair).clamp(min=0), row[-1:])
    return torch.where(pair < 0, partner, row), torch.where(pair > 0, partner, row)
