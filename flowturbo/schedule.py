"""Schedules: which solver step is taken when, written `H1P5R3` or a letter a step."""

import re
from dataclasses import dataclass
from itertools import groupby

from flowturbo.errors import RequestError

STEP_NAMES = {
    "H": "Heun",
    "P": "pseudo corrector",
    "R": "refiner",
    "E": "Euler",
    "A": "Adams-Bashforth 2",
}
MAX_STEPS = 250
_RUN = re.compile(r"([A-Z])([0-9]{0,4})")
_HELP = (
    "a schedule is letters of H (Heun), P (pseudo corrector), R (refiner), E (Euler) and "
    "A (Adams-Bashforth 2), each with an optional count, such as H1P5R3 or HPPPPPRRR"
)


@dataclass(frozen=True)
class Schedule:
    """Solver steps in order, one letter each; prints as `H1P5R3`.

    Raises RequestError for an unknown step, no step at all, more than MAX_STEPS, or a refiner step
    with no velocity cached before it.
    """

    steps: str

    def __post_init__(self) -> None:
        unknown = set(self.steps) - STEP_NAMES.keys()
        if unknown:
            raise RequestError(f"unknown step {sorted(unknown)[0]!r} in schedule: {_HELP}")
        if not 1 <= len(self.steps) <= MAX_STEPS:
            raise RequestError(
                f"a schedule has 1 to {MAX_STEPS} steps, this one has {len(self.steps)}: {_HELP}"
            )
        if self.steps[0] == "R":
            raise RequestError(
                f"schedule {self} refines with no velocity cached: start with H, P, E or A"
            )

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Reads `H1P5R3`, `HPPPPPRRR` or a mix of both; a count of zero drops the letter."""
        shown = text if len(text) <= 40 else text[:40] + "..."
        if len(text) > 5 * MAX_STEPS:  # a letter and four digits for each step
            raise RequestError(
                f"schedule {shown!r} has {len(text)} characters, allowed are {MAX_STEPS} steps"
            )
        if not text or re.sub(_RUN, "", text):
            raise RequestError(f"schedule {shown!r} cannot be read: {_HELP}")
        runs = [(letter, int(count or 1)) for letter, count in _RUN.findall(text)]
        total = sum(count for _, count in runs)
        if not 1 <= total <= MAX_STEPS:
            raise RequestError(
                f"schedule {shown!r} has {total} steps, allowed are 1 to {MAX_STEPS}: {_HELP}"
            )
        return cls("".join(letter * count for letter, count in runs))

    def __str__(self) -> str:
        return "".join(f"{letter}{len(list(run))}" for letter, run in groupby(self.steps))

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def refines(self) -> bool:
        """Whether any step needs the refiner."""
        return "R" in self.steps

    def without_refiner(self) -> "Schedule":
        """The other steps, for a pipeline that has no refiner."""
        return Schedule(self.steps.replace("R", ""))
