"""A schedule compiled to a program: the block calls that carry noise to an image.

Times run from noise at 0 to data at 1. A step that evaluates nothing (Z, T) is no call: it makes
the step of the call before it longer. The calls and their equations are in flowturbo.solver.calls.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from flowturbo.errors import RequestError
from flowturbo.solver.calls import BlockCall, Network, RefinerCall, Variant
from flowturbo.solver.grid import checked_grid, time_grid
from flowturbo.solver.schedule import Schedule
from flowturbo.solver.steps import STEPS, Stand
from flowturbo.solver.table import Table

LARGEST_TRAINED_STEP = 0.12  # of a refiner: the paper's range is (0, 0.12]


@dataclass(frozen=True)
class Program:
    """The block calls of one schedule on one time grid."""

    schedule: Schedule
    calls: tuple[BlockCall, ...]

    @cached_property
    def counts(self) -> Mapping[Network, int]:
        """How often each network is called."""
        return Counter(call.network for call in self.calls)

    @cached_property
    def history(self) -> int:
        """How many earlier velocities its calls use."""
        return max(call.history for call in self.calls)

    def evaluations(self, network: Network) -> int:
        """How often `network` is evaluated: H1P5R3 is 7 predictor and 6 refiner evaluations."""
        return sum(len(call.times) for call in self.calls if call.network is network)

    def largest_refiner_step(self) -> float:
        """The longest step that the refiner takes, 0 without any."""
        sizes = (call.end - call.t for call in self.calls if isinstance(call, RefinerCall))
        return max(sizes, default=0.0)


def compile_program(
    schedule: Schedule,
    times: Sequence[float] | None = None,
    variant: Variant = Variant.REFERENCE,
    fitted: Table | None = None,
) -> Program:
    """The block calls of `schedule` on the grid `times` (a time more than steps).

    Without `times` it is the grid of the schedule's shift, uniform if it has none. A falling grid
    leads from an image to noise; not all steps know that way. `fitted` is the table of L steps.
    Raises RequestError for a grid of another length, or one that neither rises nor falls within
    [0, 1].
    """
    steps, kind = len(schedule), STEPS[schedule.steps[0]]
    if kind.table:
        if times is not None:
            raise RequestError(f"schedule {schedule} has a time grid of its own: give no times")
        return Program(schedule, (fitted or kind.table(steps)).calls())
    falling = times is not None and len(times) > 1 and times[0] > times[-1]
    if falling:
        schedule.check_falling()
    grid = (
        time_grid(steps, schedule.shift)
        if times is None
        else checked_grid(steps, times, falling=falling)
    )
    if kind.whole:
        return Program(schedule, kind.whole(grid).calls())
    calls: list[BlockCall] = []
    for index, letter in enumerate(schedule.steps):
        stand = Stand(index, grid[index], grid[index + 1], variant, tuple(calls))
        kind = STEPS[letter]
        if kind.prolong:
            calls[-1] = kind.prolong(stand)
            continue
        assert kind.compile
        calls += kind.compile(stand)
    return Program(schedule, tuple(calls))


def outline(schedule: Schedule) -> Program:
    """A program with the block calls of `schedule`, to count them; L needs no fit here."""
    return compile_program(Schedule("E" * len(schedule)) if schedule.learned else schedule)
