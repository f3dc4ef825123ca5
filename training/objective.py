"""What a refiner learns from (FlowTurbo, section 3.2): a batch's random numbers, and the loss."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowturbo.generate import LARGEST_TRAINED_STEP
from flowturbo.nets.sit import GUIDED_CHANNELS
from flowturbo.solver.guidance import MAX_SCALE, guide
from training.data import Latents, LatentSource
from training.loop import local_rows
from training.plan import PlanError
from training.predictor import NULL_LABEL_PROBABILITY

ANY_ATTENTION = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


class Rule(StrEnum):
    """`paper`: as the text has it. `reference`: as the public code does.

    They differ in the step (one for each row from (low, high]; one for the whole batch from
    [low, high)), in the times (t + step within [0, 1]; up to 1 + high), and in the null label (fed
    alike to all evaluations; not to the predictor's first).
    """

    PAPER = "paper"
    REFERENCE = "reference"


@dataclass(frozen=True)
class RefinerObjective:
    """A rule, the range that steps are drawn from, within [0, 1], and that of the guidance scale.

    A scale of 1 is the paper's: velocities without guidance, which acts on the first
    `guided_channels`. Raises PlanError.
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
        dropped = torch.rand(batch, generator=generator) < NULL_LABEL_PROBABILITY
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
    """Random numbers, a row each.

    `row` [B] of the data, whether its label is `dropped` [B], the path's `noise` and that of the
    latent's `posterior` [B, C, h, w], `step`, time `t` and guidance `scale` [B].
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
        """All of it on `device`."""
        return Draws(**{name: value.to(device) for name, value in vars(self).items()})


def regression_loss(
    objective: RefinerObjective,
    predictor: nn.Module,
    refiner: nn.Module,
    null_label: int | None,
    data: Latents,
    draws: Draws,
) -> Tensor:
    """Mean squared error of the change of the velocity, over rows, channels and places.

    With v = predictor(x_t, t), an Euler step leads to x_next = x_t + step * v, and the
    refiner reads [x_next, v] at t + step and learns predictor(x_next, t + step) - v (Eq. 6).

    With a guidance scale other than 1 the step is taken with the guided velocity and the refiner
    reads it, as in sampling; it learns the change of the row's own. Guided in turn, what it learned
    is the change of the guided velocity. Without a null class (`null_label` None) every row keeps
    its label, and the scales must be 1.
    """
    label = data.label
    if null_label is not None:
        label = torch.where(draws.dropped, null_label, data.label)
    t, t_next = draws.t, draws.t + draws.step
    at, step = (value[:, None, None, None] for value in (t, draws.step))
    # The loop's choice of attention is for going backwards, which the predictor does not.
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
