"""Flow matching on a straight path: times, states, and the velocity to learn."""

import torch
from torch import Tensor, nn

from training.loop import device

NULL_PROBABILITY = 0.1  # share of training rows without a condition, for guidance


def logit_normal(count: int, generator: torch.Generator) -> Tensor:
    """Times [count] around the middle, where most of the image forms."""
    return torch.sigmoid(torch.randn(count, generator=generator))


def uniform(count: int, generator: torch.Generator) -> Tensor:
    """Times [count] in [0, 1)."""
    return torch.rand(count, generator=generator)


def either(count: int, generator: torch.Generator) -> Tensor:
    """Times [count], half logit-normal and half uniform.

    Logit-normal times alone hardly train the first steps from noise, and these decide what the
    image shows.
    """
    middle = torch.rand(count, generator=generator) < 0.5
    return torch.where(middle, logit_normal(count, generator), uniform(count, generator))


def dropped(count: int, generator: torch.Generator) -> Tensor:
    """Which rows have no condition, [count] bool."""
    return torch.rand(count, generator=generator) < NULL_PROBABILITY


def loss(network: nn.Module, data: Tensor, noise: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """Mean squared error of the velocity data - noise, which `network` (x, t, condition) predicts.

    `data` and `noise` are [B, C, h, w]. The states lie between them at times `t` [B].
    """
    data, noise, t, condition = (each.to(device()) for each in (data, noise, t, condition))
    at = t[:, None, None, None]
    x = (1 - at) * noise + at * data
    return (network(x, t, condition).float() - (data - noise)).square().mean()
