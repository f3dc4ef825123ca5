"""The step block around a network, as one static graph (FlowTurbo's sample-aware compilation)."""

import torch
from torch import Tensor, nn

from flowturbo.nets.sit import SiT


class StepBlock(nn.Module):
    """Network, guidance and solver update for rows that each have their own coefficients.

    Inputs as in `flowturbo.contract`: x, velocity and network_velocity [B, C, h, w], label [B, 1],
    scalars [B, 5] (t, euler, w_prev, w_next, guidance scale), pair [B, 1]. The equations are those
    of `flowturbo.program`. Guidance acts on the first `guidance_channels` channels; the others keep
    the row's own output, as in SiT. The network computes in the type of its parameters, all else in
    float32.
    """

    def __init__(self, network: SiT, guidance_channels: int) -> None:
        super().__init__()
        self.network = network
        self.guidance_channels = guidance_channels

    def forward(
        self,
        x: Tensor,
        velocity: Tensor,
        label: Tensor,
        scalars: Tensor,
        pair: Tensor,
        network_velocity: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        t = scalars[:, 0]
        euler, w_prev, w_next, scale = (scalars[:, k, None, None, None] for k in range(1, 5))
        conditional, unconditional = partners(pair[:, 0])
        x_in = x + euler * velocity
        # The unconditional row reads its partner's state: both evaluate the same x.
        read = x_in[conditional]
        if network_velocity is not None:
            read = torch.cat([read, network_velocity], 1)
        # A label out of range, or a padding row's, must not fail the rows that share its batch.
        known = label[:, 0].clamp(0, self.network.config.num_classes)
        output = self.network(read, t, known).float()
        velocity_next = self.guide(output, conditional, unconditional, scale)
        if network_velocity is not None:
            velocity_next = velocity_next + velocity  # the refiner regresses the change
        return x + w_prev * velocity + w_next * velocity_next, velocity_next

    def guide(
        self, output: Tensor, conditional: Tensor, unconditional: Tensor, scale: Tensor
    ) -> Tensor:
        """u + scale * (c - u), which for a row without a partner is its own output."""
        guided, rest = output[:, : self.guidance_channels], output[:, self.guidance_channels :]
        c, u = guided[conditional], guided[unconditional]
        guided = u + scale * (c - u)
        whole = self.guidance_channels == self.network.config.latent_channels
        return guided if whole else torch.cat([guided, rest], 1)


def partners(pair: Tensor) -> tuple[Tensor, Tensor]:
    """Row indices [B] of each row's conditional and unconditional member.

    `pair` [B] is the offset of a row's partner: 1 in a conditional row, -1 in an unconditional one,
    0 in a row alone. Indices are clamped, so that a batch's padding rows cannot reach outside it.
    """
    row = torch.arange(pair.shape[0], device=pair.device)
    partner = torch.minimum((row + pair).clamp(min=0), row[-1:])
    return torch.where(pair < 0, partner, row), torch.where(pair > 0, partner, row)
