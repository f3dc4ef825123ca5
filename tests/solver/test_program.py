"""Programs against the paper: network calls counted, order of convergence measured."""

from collections.abc import Callable

import numpy as np
import pytest

from flowturbo import Schedule, Variant, compile_program, sample
from flowturbo.errors import RequestError
from flowturbo.generate import program_for
from flowturbo.solver.calls import BlockCall, Network, RefinerCall
from flowturbo.solver.grid import time_grid
from flowturbo.solver.sampler import Array, Block
from flowturbo.solver.schedule import MAX_STEPS
from flowturbo.solver.steps import STEPS, steps_table

pytestmark = pytest.mark.unit

Field = Callable[[Array, float], Array]


def exact_block(field: Field) -> Block:
    """A step block over a closed-form velocity; its refiner knows the exact change of velocity."""

    def block(call: BlockCall, x: Array, v: Array) -> tuple[Array, Array]:
        if isinstance(call, RefinerCall):
            h = call.end - call.t
            d = field(x, call.t)
            return x + h / 2 * (d + field(x + h * d, call.end)), d
        v_next = field(x + call.euler * v, call.t)
        return x + call.w_prev * v + call.w_next * v_next, v_next

    return block


def linear(x: Array, t: float) -> Array:
    """x' = cos(t) x, so that x(1) = x(0) exp(sin 1)."""
    return np.cos(t) * x


def gaussian(x: Array, t: float) -> Array:
    """The exact flow from N(0, 1) to N(1, 0.25) along the linear path: x(1) = 1 + x(0) / 2."""
    deviation = np.hypot(1 - t, 0.5 * t)
    growth = (0.25 * t - (1 - t)) / deviation**2
    return 1.0 + growth * (x - t)


FLOWS = [
    (linear, lambda x: x * np.exp(np.sin(1.0))),
    (gaussian, lambda x: 1 + x / 2),
]
NOISE = np.linspace(-2, 2, 8).reshape(2, 1, 2, 2)


def error(
    field: Field, solution: Callable[[Array], Array], letters: str, steps: int, warp: float
) -> float:
    first, repeated = letters.split("|")
    schedule = Schedule((first + repeated * steps)[:steps])
    times = np.linspace(0, 1, steps + 1) ** warp
    program = compile_program(schedule, times.tolist())
    return float(np.abs(sample(program, NOISE, exact_block(field)) - solution(NOISE)).max())


# The first step, | and what is repeated after it.
_ORDERS = [
    *(("|H", 2), ("|P", 2), ("|A", 2), ("|E", 1), ("H|R", 2)),
    *(("|HPPT", 2), ("|HZ", 1)),
]


@pytest.mark.parametrize(("letters", "order"), _ORDERS)
@pytest.mark.parametrize(("field", "solution"), FLOWS)
@pytest.mark.parametrize("warp", [1.0, 1.5])
def test_order_of_convergence(
    letters: str, order: int, field: Field, solution: Callable[[Array], Array], warp: float
) -> None:
    counts = [60, 120, 240]
    errors = [error(field, solution, letters, n, warp) for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(
    ("text", "predictor", "refiner"),
    [
        ("H1P5R3", 7, 6),
        ("H8", 16, 0),
        ("H2P4R2", 8, 4),
        ("H5P7R3", 17, 6),
        ("P3", 4, 0),
        ("E8", 8, 0),
        ("A8", 8, 0),
        ("H1R3", 2, 6),
        ("P1H1", 4, 0),
        ("H1P5T3", 7, 0),
        ("H1P5Z3", 7, 0),
        ("H1P2Z1A2T1R1", 6, 2),
    ],
)
@pytest.mark.parametrize("variant", list(Variant))
def test_network_calls(text: str, predictor: int, refiner: int, variant: Variant) -> None:
    program = compile_program(Schedule.parse(text), variant=variant)
    seen: list[Network] = []

    def block(call: BlockCall, x: Array, v: Array) -> tuple[Array, Array]:
        seen.extend([call.network] * len(call.times))
        return x, v

    sample(program, NOISE, block)
    assert seen.count(Network.PREDICTOR) == program.evaluations(Network.PREDICTOR) == predictor
    assert seen.count(Network.REFINER) == program.evaluations(Network.REFINER) == refiner


# Every letter, first or repeated or after another; steps that evaluate nothing prolong a call.
_JOINED = [
    *("H3", "P3", "E3", "A3", "H1R3", "H1Z3", "A2T3", "E1Z1T2", "M3"),
    *("B4", "H1C5Z1", "A1B2C3T1R1", "D5", "G5@3", "U5", "V6", "N6"),
    *("H1P1M2A1M1Z1P1", "H1P2Z1A2T1R1E1", "P1T2Z1R2H1", "H1P5R3@2", "H1P2Z1A2T1R1E1@0.5"),
]


@pytest.mark.parametrize("variant", list(Variant))
@pytest.mark.parametrize("warp", [None, 1.5])
@pytest.mark.parametrize("text", _JOINED)
def test_calls_join_without_a_gap(text: str, warp: float | None, variant: Variant) -> None:
    """Each call starts where the one before it landed, from the first time to the last."""
    schedule = Schedule.parse(text)
    times = list(time_grid(len(schedule), schedule.shift))
    if warp is not None and not schedule.own_grid:
        times = (0.1 + 0.8 * np.linspace(0, 1, len(schedule) + 1) ** warp).tolist()
    given = None if warp is None or schedule.own_grid else times
    program = compile_program(schedule, given, variant)
    if schedule.own_grid:
        times = [program.calls[0].starts_at, *(call.lands_at for call in program.calls)]
    starts = [call.starts_at for call in program.calls]
    lands = [call.lands_at for call in program.calls]
    assert starts == [times[0], *lands[:-1]]
    assert lands[-1] == times[-1]
    # A call lands at the end of its own step, or of those that prolong it.
    evaluating = [k for k, letter in enumerate(schedule.steps) if not STEPS[letter].prolong]
    ends = [times[k] for k in [*evaluating[1:], len(schedule)]]
    assert [at for at, start in zip(lands, starts, strict=True) if at != start] == ends


@pytest.mark.parametrize("text", _JOINED)
def test_a_call_moves_as_far_as_it_says(text: str) -> None:
    """A velocity of 1 moves x by the time from `starts_at` to `lands_at`."""
    block = exact_block(lambda x, t: np.ones_like(x))
    for call in compile_program(Schedule.parse(text)).calls:
        x, v = call.inputs(np.zeros(1), [np.ones(1)] * 9)
        moved, _ = block(call, x, v)
        # NeuralSolver's numbers are rounded; 1e-6 stands for 0 in the log-SNR.
        rounded = 3e-4 if text[0] == "N" else 2e-6
        assert moved == pytest.approx(call.lands_at - call.starts_at, abs=rounded)


def test_the_joined_schedules_have_every_letter() -> None:
    assert set("".join(Schedule.parse(text).steps for text in _JOINED)) == STEPS.keys() - {"L"}


def test_the_table_of_steps_names_every_letter() -> None:
    """With its name, and the evaluations that a program counts for it."""
    head, rule, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in steps_table().splitlines()
    ]
    assert head[:2] == ["letter", "step"] and set("".join(rule)) == {"-"}
    assert [row[0] for row in rows] == [f"`{letter}`" for letter in STEPS]
    assert len({row[1] for row in rows}) == len({row[2] for row in rows}) == len(rows)
    before = compile_program(Schedule("HP"))
    for row in rows:
        letter = row[0].strip("`")
        if STEPS[letter].alone:
            assert row[3:] == ["1", "0"]
            continue
        after = compile_program(Schedule(f"HP{letter}"))
        assert row[3:] == [
            str(after.evaluations(network) - before.evaluations(network)) for network in Network
        ]


def test_variable_step_adams_bashforth() -> None:
    """A polynomial of degree 1 in t is integrated exactly from two velocities on any grid."""
    times = [0.0, 0.1, 0.45, 1.0]
    program = compile_program(Schedule.parse("H1A2"), times)
    block = exact_block(lambda x, t: np.full_like(x, 3 * t))
    # The Adams step right after Heun has no earlier velocity: it is an Euler step.
    euler = 0.35 * 3 * 0.1
    exact = 1.5 * (0.1**2 + 1 - 0.45**2) + euler
    assert sample(program, np.zeros((1, 1, 1, 1)), block) == pytest.approx(exact)


def test_a_line_is_extrapolated_exactly_and_a_constant_kept() -> None:
    for text, field, change in (
        ("H1T3", lambda x, t: np.full_like(x, 2 * t), 1.0),
        ("H1P1T2@2", lambda x, t: np.full_like(x, 2 * t), 1.0),
        ("E1A1T2", lambda x, t: np.full_like(x, 2 * t), 1 - 2 * 0.25**2 / 2),  # Euler's step errs
        ("H1Z3", lambda x, t: np.ones_like(x), 1.0),
        ("E1T1", lambda x, t: np.full_like(x, 2 * t + 1), 1.0),  # no other velocity: it is kept
        ("H1E1T2", lambda x, t: np.full_like(x, 2 * t), 0.0625 + 0.75 * 0.5),
    ):
        found = sample(compile_program(Schedule.parse(text)), NOISE, exact_block(field))
        assert found == pytest.approx(NOISE + change), text


def test_a_shifted_grid() -> None:
    """Shares of noise 1, 0.75, 0.5, 0.25 become 1, 0.9, 0.75, 0.5; without a shift none changes."""
    assert time_grid(4, 3.0) == pytest.approx((0, 0.1, 0.25, 0.5, 1))
    for steps in range(1, MAX_STEPS + 1):
        assert time_grid(steps) == tuple(np.linspace(0, 1, steps + 1))
    program = compile_program(Schedule.parse("H1E3@3"))
    times = [call.t for call in program.calls]
    assert times == pytest.approx([0, 0.1, 0.1, 0.25, 0.5])


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ([0, 1], "needs 3 times"),
        ([0, 0.5, 0.5], "rise strictly"),
        ([0, float("nan"), 1], "finite"),
        ([0, 0.5, 1.5], "within"),
        ([-0.1, 0.5, 1], "within"),
    ],
)
def test_refuses_bad_grids(times: list[float], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        compile_program(Schedule.parse("H2"), times)


def test_steps_beyond_the_refiners_training_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    program_for.cache_clear()  # a program is compiled, and warned of, once
    program_for(Schedule.parse("H1P5R3"), Variant.PAPER)
    assert not caplog.messages
    program_for(Schedule.parse("H1R3"), Variant.PAPER)
    assert "H1R3 has refiner steps of 0.250" in caplog.messages[0]
