"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), over an interval of times."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from flowturbo.errors import RequestError

MAX_SCALE = 100.0
Values = TypeVar("Values")  # arrays of numpy or torch


def guide(conditional: Values, unconditional: Values, scale: object) -> Values:
    """u + scale * (c - u), for arrays of any library."""
    c, u, s = conditional, unconditional, scale
    guided: Values = u + s * (c - u)  # type: ignore[operator]
    return guided


@dataclass(frozen=True)
class Guidance:
    """Guidance of one `scale` at times within `interval`; a scale of 1 is no guidance.

    Raises RequestError unless the scale is in [0, 100] and the interval within [0, 1].
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0.0 <= self.scale <= MAX_SCALE:  # false for NaN too
            raise RequestError(
                f"guidance_scale must be a number from 0 to {MAX_SCALE:g}, got {self.scale}"
            )
        low, high = (float(np.float32(end)) for end in self.interval)
        object.__setattr__(self, "interval", (low, high))
        if not 0.0 <= low <= high <= 1.0:
            raise RequestError(
                f"guidance_interval must be two times with 0 <= low <= high <= 1, got {low}, {high}"
            )

    @property
    def enabled(self) -> bool:
        """Whether any evaluation is guided."""
        return self.scale != 1.0

    @property
    def rows(self) -> int:
        """Rows per image in a network evaluation: two where it is guided."""
        return 2 if self.enabled else 1

    def applies_at(self, t: float) -> bool:
        """Whether an evaluation at time `t` is guided."""
        # The ends come as float32: compared as such, a time named as an end is within.
        return self.enabled and self.interval[0] <= float(np.float32(t)) <= self.interval[1]

    def scale_at(self, t: float) -> float:
        """The scale of an evaluation at time `t`."""
        return self.scale if self.applies_at(t) else 1.0
