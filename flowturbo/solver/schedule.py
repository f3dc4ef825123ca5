"""Schedules: which solver step is taken when, written `H1P5R3`, or `A8@3` on a shifted grid."""

import re
from dataclasses import dataclass, field
from itertools import groupby

from flowturbo.errors import RequestError
from flowturbo.solver.steps import STEPS, letters

MAX_STEPS = 250
MIN_SHIFT, MAX_SHIFT = 0.1, 20.0
_RUN = re.compile(r"([A-Z])([0-9]{0,4})")
_SHIFT = re.compile(r"[0-9]{1,2}(\.[0-9]{1,2})?")
_SHIFT_HELP = f"a shift is a number from {MIN_SHIFT:g} to {MAX_SHIFT:g}, as in A8@3"
_PAPERS = [f"{letter} ({STEPS[letter].name})" for letter in "HPR"]
_OTHERS = [letter for letter in STEPS if letter not in "HPR"]
_HELP = (
    f"a schedule is letters of {', '.join(_PAPERS)}, {', '.join(_OTHERS[:-1])} and {_OTHERS[-1]}, "
    "each with an optional count, such as H1P5R3 or HPPPPPRRR, and may end with the shift of its "
    "time grid, such as A8@3"
)


def _listed(found: list[str], word: str) -> str:
    return f"{', '.join(found[:-1])} {word} {found[-1]}" if len(found) > 1 else found[0]


_LATER = letters(lambda kind: kind.needs_velocity)
_FIRST = letters(lambda kind: not kind.needs_velocity and not kind.alone)
_PROLONGING = letters(lambda kind: kind.prolong is not None)
_ALONE = letters(lambda kind: kind.alone)
_OWN_GRID = letters(lambda kind: kind.table is not None)
LEARNED = "L"
_REFINING = letters(lambda kind: kind.refiner > 0)
# What follows the refiner's call cannot be joined to it, as it is to the predictor's.
_NEEDS = {
    f"^[{''.join(_LATER)}]": (
        f"{_listed(_LATER, 'and')} have no velocity cached before them: start with "
        f"{_listed(_FIRST, 'or')}"
    ),
    f"[{''.join(_REFINING)}][{''.join(_PROLONGING)}]": (
        f"{_listed(_PROLONGING, 'and')} follow evaluations of the predictor, not "
        f"{_listed(_REFINING, 'or')}"
    ),
}


@dataclass(frozen=True)
class Schedule:
    """Solver steps in order, one letter each; prints as `H1P5R3`, or `H1P5R3@2`.

    `shift` above 1 takes shorter steps near the noise and longer ones near the data, 1 is the
    uniform grid (`time_grid`). None is the own grid of whatever runs the schedule: the pipeline's,
    or the uniform grid. Raises RequestError for an unknown step, no step at all, more than
    MAX_STEPS, or a step without the velocities before it that it needs.

    `otherwise` is of presets: the schedule for requests that this one cannot serve, because it
    belongs to one time grid.
    """

    steps: str
    shift: float | None = None
    otherwise: "Schedule | None" = field(default=None, compare=False)

    def __post_init__(self) -> None:
        unknown = set(self.steps) - STEPS.keys()
        if unknown:
            raise RequestError(f"unknown step {sorted(unknown)[0]!r} in schedule: {_HELP}")
        if not 1 <= len(self.steps) <= MAX_STEPS:
            raise RequestError(
                f"a schedule has 1 to {MAX_STEPS} steps, this one has {len(self.steps)}: {_HELP}"
            )
        if (alone := set(self.steps) & set(_ALONE)) and len(set(self.steps)) > 1:
            raise RequestError(
                f"schedule {self}: {min(alone)} mixes with no other letter, as all of "
                f"{_listed(_ALONE, 'and')}"
            )
        if self.own_grid and self.shift is not None:
            raise RequestError(
                f"schedule {self}: {self.steps[0]} has a time grid of its own, take @ away"
            )
        if self.own_grid and not self.learned:
            STEPS[self.steps[0]].table(len(self))  # type: ignore[misc] # raises
        for form, need in _NEEDS.items():
            if re.search(form, self.steps):
                raise RequestError(f"schedule {self}: {need}")

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Reads `H1P5R3`, `HPPPPPRRR` or a mix of both; a count of zero drops the letter.

        Behind an @ stands the shift, of two decimals at most.
        """
        shown = text if len(text) <= 40 else text[:40] + "..."
        if len(text) > 5 * MAX_STEPS:  # a letter and four digits for each step
            raise RequestError(
                f"schedule {shown!r} has {len(text)} characters, allowed are {MAX_STEPS} steps"
            )
        text, shift = read_shift(text)
        if not text or re.sub(_RUN, "", text):
            raise RequestError(f"schedule {shown!r} cannot be read: {_HELP}")
        runs = [(letter, int(count or 1)) for letter, count in _RUN.findall(text)]
        total = sum(count for _, count in runs)
        if not 1 <= total <= MAX_STEPS:
            raise RequestError(
                f"schedule {shown!r} has {total} steps, allowed are 1 to {MAX_STEPS}: {_HELP}"
            )
        return cls("".join(letter * count for letter, count in runs), shift)

    def __str__(self) -> str:
        runs = "".join(f"{letter}{len(list(run))}" for letter, run in groupby(self.steps))
        return runs if self.shift is None else f"{runs}@{self.shift:g}"

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def refines(self) -> bool:
        """Whether any step needs the refiner."""
        return any(STEPS[letter].refiner for letter in self.steps)

    @property
    def own_grid(self) -> bool:
        """Whether the solver belongs to one time grid, from noise to data, as L and N do."""
        return self.steps[0] in _OWN_GRID

    @property
    def alone(self) -> bool:
        """Whether it is a solver of a whole schedule, which leads from noise to images only."""
        return self.steps[0] in _ALONE

    @property
    def learned(self) -> bool:
        """Whether the steps are L: fitted to a pipeline."""
        return self.steps[0] == LEARNED

    def check_falling(self) -> None:
        """Raises RequestError if the schedule cannot lead from an image to noise."""
        letter = self.steps[0]
        if self.refines:
            raise RequestError(
                f"schedule {self} has refiner steps, and the refiner knows no way from images to "
                "noise: leave R out"
            )
        if self.alone:
            raise RequestError(
                f"schedule {self}: {letter} ({STEPS[letter].name}) knows no way from images to "
                f"noise: take letters of {', '.join(_FIRST)}"
            )

    def without_refiner(self) -> "Schedule":
        """The other steps, for a pipeline that has no refiner."""
        kept = [letter for letter in self.steps if not STEPS[letter].refiner]
        otherwise = self.otherwise and self.otherwise.without_refiner()
        return Schedule("".join(kept), self.shift, otherwise)


def read_shift(text: str) -> tuple[str, float | None]:
    """What stands before the @ in `text`, and the shift behind it, None where there is none.

    Raises RequestError for a shift out of range, or with more than two decimals.
    """
    steps, at, shown = text.partition("@")
    if not at:
        return steps, None
    if not re.fullmatch(_SHIFT, shown):
        raise RequestError(f"shift {shown[:20]!r} cannot be read: {_SHIFT_HELP}")
    shift = float(shown)
    if not MIN_SHIFT <= shift <= MAX_SHIFT:
        raise RequestError(f"shift {shown} is out of range: {_SHIFT_HELP}")
    return steps, shift
