"""The objective of a refiner (FlowTurbo, section 3.2): the random numbers of a batch, the loss."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowturbo.nets.sit import GUIDED_CHANNELS
from flowturbo.solver.guidance import MAX_SCALE, guide
from flowturbo.solver.program import LARGEST_TRAINED_STEP
from training import flow_matching
from training.data import Latents, LatentSource
from training.loop import local_rows
from training.plan import PlanError

ANY_ATTENTION = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


class Rule(StrEnum):
    """The objective as in the paper's text (`paper`) or in the public code (`reference`).

    - Step: `paper` draws one per row from (low, high]; `reference` draws one per batch from
      [low, high).
    - Times: t + step is within [0, 1] in `paper`; up to 1 + high in `reference`.
    - Null label: `paper` feeds it to all evaluations; `reference` not to the predictor's first one.
    """

    PAPER = "paper"
    REFERENCE = "reference"


@dataclass(frozen=True)
class RefinerObjective:
    """A rule, and the ranges of the steps (within [0, 1]) and of the guidance scales.

    The paper uses velocities without guidance: a scale of 1. Guidance acts on the first
    `guided_channels` channels. Raises PlanError.
    """

    rule: Rule = Rule.PAPER
    smallest_step: float = 0.0
    largest_step: float = LARGEST_TRAINED_STEP
    smallest_scale: float = 1.0
    largest_scale: float = 1.0
    guided_channels: int = GUIDED_CHANNELS

    def __post_init__(self) -> None:
        if not 0 <= self.smallest_scale <= self.largest_scale <= MAX_SCALE:
            raise PlanError(
                f"the range of guidance scales must be 0 <= smallest <= largest <= {MAX_SCALE:g}, "
                f"got {self.smallest_scale} to {self.largest_scale}"
            )
        if not 0 <= self.smallest_step < self.largest_step <= 1:
            raise PlanError(
                "the range of steps must be 0 <= smallest < largest <= 1, got "
                f"{self.smallest_step} to {self.largest_step}"
            )

    def draw(self, batch: int, source: LatentSource, generator: torch.Generator) -> "Draws":
        """The random numbers of a whole batch."""
        row = torch.randint(len(source), (batch,), generator=generator)
        dropped = flow_matching.dropped(batch, generator)
        noise, posterior = torch.randn((2, batch, *source.shape), generator=generator)
        width = self.largest_step - self.smallest_step
        if self.rule is Rule.REFERENCE:
            share = torch.rand(1, generator=generator).expand(batch)
            step = self.smallest_step + width * share
            t = torch.rand(batch, generator=generator)
        else:
            step = self.largest_step - width * torch.rand(batch, generator=generator)
            t = torch.rand(batch, generator=generator) * (1 - step)
        scales = self.largest_scale - self.smallest_scale
        scale = self.smallest_scale + scales * torch.rand(batch, generator=generator)
        return Draws(row, dropped, noise, posterior, step, t, scale)


@dataclass(frozen=True)
class Draws:
    """The random numbers of each row of a batch.

    - `row` [B]: row of the data.
    - `dropped` [B]: whether the null label replaces its label.
    - `noise`, `posterior` [B, C, h, w]: noise of the path, and of the latent's distribution.
    - `step`, `t`, `scale` [B]: Euler step, time and guidance scale.
    """

    row: Tensor
    dropped: Tensor
    noise: Tensor
    posterior: Tensor
    step: Tensor
    t: Tensor
    scale: Tensor

    def local(self) -> "Draws":
        """The rows of this process."""
        return Draws(**{name: local_rows(value) for name, value in vars(self).items()})

    def to(self, device: torch.device) -> "Draws":
        """These random numbers on `device`."""
        return Draws(**{name: value.to(device) for name, value in vars(self).items()})


def regression_loss(
    objective: RefinerObjective,
    predictor: nn.Module,
    refiner: nn.Module,
    null_label: int | None,
    data: Latents,
    draws: Draws,
) -> Tensor:
    """Mean squared error of the change of the velocity, over rows, channels and pixels.

    With v = predictor(x_t, t), an Euler step leads to x_next = x_t + step * v. The refiner reads
    [x_next, v] at t + step and learns predictor(x_next, t + step) - v (Eq. 6).

    With a guidance scale other than 1 the Euler step uses the guided velocity, and the refiner
    reads it, as in sampling. The refiner still learns the change of the unguided velocity of its
    row. Guidance of its outputs then gives the change of the guided velocity. Without a null class
    (`null_label` None) every row keeps its label, and the scales must be 1.
    """
    label = data.label
    if null_label is not None:
        label = torch.where(draws.dropped, null_label, data.label)
    t, t_next = draws.t, draws.t + draws.step
    at, step = (value[:, None, None, None] for value in (t, draws.step))
    # The loop chooses an attention that is fast in the backward pass; the predictor has none.
    with torch.no_grad(), sdpa_kernel(ANY_ATTENTION):
        x = (1 - at) * draws.noise + at * data.sample(draws.posterior)
        first = data.label if objective.rule is Rule.REFERENCE else label
        if (draws.scale == 1).all():
            own = velocity = moved = predictor(x, t, first).float()
        else:
            assert null_label is not None, "guided training needs a null class"
            null = torch.full_like(label, null_label)
            c, u = (predictor(x, t, y).float() for y in (data.label, null))
            own = torch.where((first == null_label)[:, None, None, None], u, c)
            mixed = guide(c, u, draws.scale[:, None, None, None])
            guided = objective.guided_channels
            velocity, moved = (torch.cat([mixed[:, :guided], v[:, guided:]], 1) for v in (own, c))
        x_next = x + step * moved
        target = predictor(x_next, t_next, label).float() - own
    change = refiner(torch.cat([x_next, velocity], 1), t_next, label).float()
    return (change - target).square().mean()
