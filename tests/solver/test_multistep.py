"""Methods of several velocities: orders of convergence, and their authors' own updates."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from flowturbo import Schedule, compile_program, sample
from flowturbo.errors import RequestError
from flowturbo.solver import neural
from flowturbo.solver.calls import BlockCall, PredictorCall
from flowturbo.solver.grid import time_grid
from flowturbo.solver.operator import Operator, features, from_squares, to_squares
from flowturbo.solver.sampler import Array
from flowturbo.solver.steps import STEPS
from flowturbo.solver.table import Table

pytestmark = pytest.mark.unit

MEAN, DEVIATION = 0.7, 0.4
NOISE = np.random.default_rng(0).standard_normal((8, 2, 4, 4))
EXACT = MEAN + DEVIATION * NOISE


def velocity(x: Array, t: float) -> Array:
    """Of data that are N(MEAN, DEVIATION^2): the map from noise to data is affine."""
    variance = (1 - t) ** 2 + (t * DEVIATION) ** 2
    return MEAN + (t * DEVIATION**2 - (1 - t)) / variance * (x - t * MEAN)


def block(call: BlockCall, x: Array, v: Array) -> tuple[Array, Array]:
    assert isinstance(call, PredictorCall)
    v_next = velocity(x + call.euler * v, call.t)
    return x + call.w_prev * v + call.w_next * v_next, v_next


def solved(text: str, times: Any = None) -> Array:
    return sample(compile_program(Schedule.parse(text), times), NOISE, block)


@pytest.mark.parametrize(("letters", "order"), [("B", 3), ("C", 4)])
def test_order_of_convergence(letters: str, order: int) -> None:
    """x' = cos(t) x on a grid whose first steps are short: they are of order 1, 2 and 3."""
    errors = []
    for steps in (60, 120, 240):
        grid = np.linspace(0, 1, steps + 1)
        program = compile_program(Schedule(letters * steps), (grid**2 * (3 - 2 * grid)).tolist())

        def field(call: BlockCall, x: Array, v: Array) -> tuple[Array, Array]:
            assert isinstance(call, PredictorCall)
            v_next = np.cos(call.t) * (x + call.euler * v)
            return x + call.w_prev * v + call.w_next * v_next, v_next

        found = sample(program, NOISE, field)
        errors.append(np.abs(found - NOISE * np.exp(np.sin(1.0))).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)
    assert np.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("letters", "order"), [("D", 2), ("G", 3), ("U", 2), ("V", 3)])
def test_order_in_the_log_snr(letters: str, order: int) -> None:
    """At least: UniPC's corrector adds one. Both ends have short steps, the last is of order 1."""
    errors = []
    for steps in (30, 60):
        grid = np.linspace(0, 1, steps + 1)
        found = solved(letters * steps, (grid**2 * (3 - 2 * grid)).tolist())
        errors.append(np.abs(found - EXACT).max())
    assert np.log2(errors[0] / errors[1]) > order - 0.1


def test_the_log_snr_of_short_first_steps() -> None:
    """Times closer to 0 than what stands for 0 there."""
    for letter in "DGUV":
        found = solved(letter * 4, [0.0, 1e-12, 1e-7, 0.5, 1.0])
        assert np.abs(found - EXACT).max() < 1


@pytest.mark.parametrize("shift", [None, 3.0])
@pytest.mark.parametrize("steps", [2, 3, 5, 8, 14, 20])
@pytest.mark.parametrize(
    ("letter", "scheduler", "order"),
    [
        ("D", DPMSolverMultistepScheduler, 2),
        ("G", DPMSolverMultistepScheduler, 3),
        ("U", UniPCMultistepScheduler, 2),
        ("V", UniPCMultistepScheduler, 3),
    ],
)
def test_diffusers_updates(
    letter: str, scheduler: Any, order: int, steps: int, shift: float | None
) -> None:
    theirs = scheduler(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=order)
    grid = time_grid(steps, shift)
    theirs.set_timesteps(steps)
    theirs.sigmas = (1 - torch.tensor(grid, dtype=torch.float64)).clamp(max=1 - 1e-6)
    theirs.set_begin_index(0)
    x = torch.from_numpy(NOISE)
    for t, step in zip(grid, theirs.timesteps, strict=False):
        x = theirs.step(-torch.from_numpy(velocity(x.numpy(), t)), step, x).prev_sample
    text = f"{letter}{steps}" + (f"@{shift:g}" if shift else "")
    np.testing.assert_allclose(solved(text), x.numpy(), atol=1e-6)


@pytest.mark.parametrize("steps", [5, 6, 7, 8, 9, 10, 15])
def test_neural_solvers_updates(steps: int) -> None:
    """The loop of the authors' sampler: the newest velocity has what is missing to 1."""
    lengths, rows = neural._TABLES[steps]
    x, seen, t = NOISE, [], 0.0
    for length, row in zip(lengths, rows, strict=True):
        seen.append(velocity(x, t))
        mixed = sum(c * v for c, v in zip(row, seen, strict=False)) + (1 - sum(row)) * seen[-1]
        x, t = x + length * mixed, t + length
    assert t == pytest.approx(1, abs=2e-4)
    np.testing.assert_allclose(solved(f"N{steps}"), x, atol=1e-9)
    assert np.abs(x - EXACT).max() < 0.25


def test_published_solvers_are_better_than_euler() -> None:
    errors = {text: np.abs(solved(text) - EXACT).mean() for text in ("N8", "E8")}
    assert errors["N8"] < errors["E8"] / 2


@pytest.mark.parametrize("letters", ["B", "C"])
def test_adams_bashforth_is_exact_for_polynomials(letters: str) -> None:
    """Of degree 2 and 3, once enough velocities are known; on an uneven grid."""
    degree = {"B": 2, "C": 3}[letters]
    times = np.array([0.0, 0.1, 0.15, 0.4, 0.7, 1.0])
    program = compile_program(Schedule(letters * 5), times.tolist())

    def field(call: BlockCall, x: Array, v: Array) -> tuple[Array, Array]:
        assert isinstance(call, PredictorCall)
        v_next = np.full_like(x, call.t**degree)
        return x + call.w_prev * v + call.w_next * v_next, v_next

    x, seen = np.zeros((1, 1, 1, 1)), [np.zeros((1, 1, 1, 1))]
    for k, call in enumerate(program.calls):
        moved, v = field(call, *call.inputs(x, seen))
        if k >= degree:
            want = (times[k + 1] ** (degree + 1) - times[k] ** (degree + 1)) / (degree + 1)
            assert (moved - x).item() == pytest.approx(want)
        x, seen = moved, [*seen, v]


def test_a_sum_of_velocities_is_the_blocks_own_arithmetic() -> None:
    """What the network reads and the update, each with coefficients of its own."""
    rng = np.random.default_rng(1)
    x, own, *earlier = rng.standard_normal((5, 1, 2, 4, 4))
    call = PredictorCall(0, 0.5, 0.4, 0.6, (0.1, -0.2, 0.3), (0.4, 0.5), 0.7)
    state, v = call.inputs(x, earlier)
    read = x + 0.1 * earlier[0] - 0.2 * earlier[1] + 0.3 * earlier[2]
    np.testing.assert_allclose(state + call.euler * v, read)
    moved = x + 0.4 * earlier[1] + 0.5 * earlier[2] + 0.7 * own
    np.testing.assert_allclose(state + call.w_prev * v + call.w_next * own, moved)
    assert call.history == 3


def test_only_velocities_that_are_used_are_kept() -> None:
    kept = {text: compile_program(Schedule.parse(text)).history for text in ("H1P5R3", "A6Z1")}
    assert kept == {"H1P5R3": 1, "A6Z1": 1}
    assert compile_program(Schedule.parse("B20")).history == 2
    assert compile_program(Schedule.parse("C20")).history == 3
    assert compile_program(Schedule.parse("U250")).history < 60


@pytest.mark.parametrize("side", [1, 4])
def test_operators_use_what_lies_around_a_pixel(side: int) -> None:
    """Against sums written out for one square, and zeros beyond the border."""
    rng = np.random.default_rng(2)
    x, first, second = rng.standard_normal((3, 2, 3, 6, 8))
    square = 1 if side == 1 else 2
    matrix = rng.standard_normal((3 * 3 * side**2 + 1, 3 * square**2))
    found = Operator(matrix, side, 2)(x, [np.zeros_like(x), first, second])
    assert found.shape == x.shape
    joined = np.pad(np.concatenate([x, first, second], 1), ((0, 0), (0, 0), (1, 1), (1, 1)))
    for n, row, column in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        y, z = row * square, column * square
        window = joined[n, :, y : y + side, z : z + side]
        if side == 1:
            window = joined[n, :, y + 1 : y + 2, z + 1 : z + 2]
        want = (window.ravel() @ matrix[:-1] + matrix[-1]).reshape(3, square, square)
        np.testing.assert_allclose(found[n, :, y : y + square, z : z + square], want)
    np.testing.assert_array_equal(from_squares(to_squares(x, square), x.shape, square), x)
    assert features([x], side).shape == (2 * (6 // square) * (8 // square), 3 * side**2)


@pytest.mark.parametrize("side", [1, 4])
def test_a_refiner_is_a_layer_of_rectified_units_over_the_same_windows(side: int) -> None:
    rng = np.random.default_rng(7)
    x, velocity = rng.standard_normal((2, 2, 3, 4, 6)).astype(np.float32)
    outputs, square = (3, 1) if side == 1 else (12, 2)
    matrix = rng.standard_normal((6 * side**2 + 1, outputs + 5)).astype(np.float32)
    refiner = rng.standard_normal((5, outputs)).astype(np.float32)
    found = Operator(matrix, side, 1, refiner)(x, [velocity])
    made = features([x, velocity], side) @ matrix[:-1] + matrix[-1]
    wanted = made[:, :outputs] + np.where(made[:, outputs:] > 0, made[:, outputs:], 0) @ refiner
    np.testing.assert_allclose(found, from_squares(wanted, x.shape, square), rtol=1e-4, atol=1e-4)


def test_a_table_with_an_operator_adds_it_to_the_update() -> None:
    """With all velocities so far, its own included."""
    matrix = np.zeros((3 * 2 + 1, 2))
    matrix[2:4] = 0.5 * np.eye(2)  # half of the first velocity
    weights = np.array([[0.5, 0.0], [0.0, 0.5]])
    table = Table((0.0, 0.5, 1.0), weights, (None, Operator(matrix, 1, 2)))
    program = compile_program(Schedule("LL"), fitted=table)
    assert program.history == 1
    seen: list[Array] = []

    def noted(call: BlockCall, x: Array, v: Array) -> tuple[Array, Array]:
        moved = block(call, x, v)
        seen.append(moved[1])
        return moved

    found = sample(program, NOISE, noted)
    np.testing.assert_allclose(found, NOISE + 0.5 * (seen[0] + seen[1]) + 0.5 * seen[0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("D4Z1", "D mixes with no other letter"),
        ("H1L4", "L mixes with no other letter"),
        ("U3V3", "U mixes with no other letter"),
        ("N6@3", "N has a time grid of its own"),
        ("L4@2", "L has a time grid of its own"),
    ],
)
def test_solvers_of_whole_schedules_stand_alone(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Schedule.parse(text)


def test_what_a_table_cannot_do_is_refused() -> None:
    with pytest.raises(RequestError, match="N4: .* published for 5, 6, 7, 8, 9, 10 and 15"):
        compile_program(Schedule.parse("N4"))
    with pytest.raises(RequestError, match="L4 is fitted to a pipeline"):
        compile_program(Schedule.parse("L4"))
    for text in ("N6", "L6"):
        with pytest.raises(RequestError, match="time grid of its own: give no times"):
            compile_program(Schedule.parse(text), np.linspace(0, 1, 7).tolist())
    for letter, kind in STEPS.items():
        if kind.whole:
            with pytest.raises(RequestError, match=rf"{letter} .* no way from images to noise"):
                compile_program(Schedule(letter * 4), np.linspace(1, 0, 5).tolist())
