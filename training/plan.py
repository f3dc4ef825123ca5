"""The settings of a training run: length, learning rate, and how often it saves."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from flowturbo.errors import FlowTurboError


class PlanError(FlowTurboError, ValueError):
    """A setting of a run is not allowed: the message names the value and what is allowed."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast to train.

    `batch` is the batch of all processes together. The learning rate rises over `warmup` steps.
    With `decay` cosine it then falls along a cosine, and restarts from its peak at the steps in
    `restarts` (SGDR, arXiv 1608.03983). `clip` is the largest gradient norm; 0 means no limit. In
    `precision` bf16 the matrix products are bfloat16 (autocast); weights and optimizer stay
    float32. Raises PlanError.
    """

    steps: int
    batch: int
    learning_rate: float
    seed: int
    warmup: int = 100
    decay: Literal["cosine", "constant"] = "cosine"
    restarts: tuple[int, ...] = ()
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema_decay: float = 0.998
    precision: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self) -> None:
        allowed = {
            # seed * 1,000,003 + step must fit into the 64-bit seed of a generator.
            "seed": (f"from 0 to {10**13}", 0 <= self.seed <= 10**13),
            "learning_rate": ("above 0", self.learning_rate > 0),
            "warmup": ("at least 0", self.warmup >= 0),
            "clip": ("at least 0", self.clip >= 0),
            "ema_decay": ("from 0 to below 1", 0 <= self.ema_decay < 1),
        }
        for name, (range_, fits) in allowed.items():
            if not fits:
                raise PlanError(f"{name} must be {range_}, got {getattr(self, name)}")

    def rate(self, step: int) -> float:
        """The learning rate of step number `step`, from 0."""
        warm = self.learning_rate * min(1.0, (step + 1) / max(self.warmup, 1))
        if self.decay == "constant":
            return warm
        starts = (0, *self.restarts, self.steps)
        begin, end = next((a, b) for a, b in pairwise(starts) if a <= step < b)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - begin) / (end - begin)))
        return warm * (0.01 + 0.99 * cosine)

    def check_processes(self, processes: int) -> None:
        """Raises PlanError unless `processes` can share a batch evenly."""
        if self.batch % processes:
            below = self.batch - self.batch % processes
            allowed = ", ".join(str(n) for n in (below, below + processes) if n)
            raise PlanError(
                f"batch must be a multiple of the {processes} processes, such as {allowed}; "
                f"got {self.batch}"
            )


@dataclass(frozen=True)
class Pace:
    """How often a run saves its state (in seconds) and logs its loss (in steps)."""

    save_every_s: float = 60.0
    log_every: int = 50
