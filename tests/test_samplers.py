"""The baselines against flows whose solution is known: order of convergence, counts, errors."""

import numpy as np
import pytest

from bench.quality.samplers import Counted, dopri5, parse
from flowturbo.errors import RequestError
from flowturbo.program import compile_program
from flowturbo.sampler import sample
from flowturbo.schedule import Schedule

MEAN, DEVIATION = 0.7, 0.4
NOISE = np.random.default_rng(0).standard_normal((8, 2, 2, 2))
EXACT = MEAN + DEVIATION * NOISE


def velocity(x: np.ndarray, t: float) -> np.ndarray:
    """Of data that are N(MEAN, DEVIATION^2): the map from noise to data is affine."""
    variance = (1 - t) ** 2 + (t * DEVIATION) ** 2
    return MEAN + (t * DEVIATION**2 - (1 - t)) / variance * (x - t * MEAN)


def error(text: str) -> float:
    return float(np.abs(parse(text)(velocity, NOISE) - EXACT).max())


@pytest.mark.parametrize(
    ("coarse", "fine", "order"),
    [
        ("H32", "H64", 2),
        ("P32", "P64", 2),
        ("HPPT" * 8, "HPPT" * 16, 2),
        ("HZ" * 32, "HZ" * 64, 1),
        ("unipc:64", "unipc:128", 2),
        # Its grid in log signal-to-noise ratio is far from uniform: the order shows late.
        ("dpm:128", "dpm:256", 2),
        ("unipc:64@3", "unipc:128@3", 2),
    ],
)
def test_order_of_convergence(coarse: str, fine: str, order: int) -> None:
    assert np.log2(error(coarse) / error(fine)) == pytest.approx(order, abs=0.35)


def test_dopri5_is_as_exact_as_asked() -> None:
    assert error("dopri5") < 1e-3
    assert np.abs(dopri5(1e-8, 1e-8)(velocity, NOISE) - EXACT).max() < 1e-7


@pytest.mark.parametrize(
    ("text", "evaluations"),
    [("H8", 16), ("H1P5", 7), ("H1P5T3", 7), ("H1P5Z3", 7), ("unipc:8", 8), ("dpm:12", 12)],
)
def test_evaluations(text: str, evaluations: int) -> None:
    counted = Counted(velocity)
    parse(text)(counted, NOISE)
    assert counted.evaluations == evaluations


@pytest.mark.parametrize("text", ["H8", "H2P5", "P7", "H2P5@3"])
def test_heun_and_pseudo_corrector_are_the_programs(text: str) -> None:
    def block(call, x, v, *_):  # type: ignore[no-untyped-def]
        v_next = velocity(x + call.euler * v, call.t)
        return x + call.w_prev * v + call.w_next * v_next, v_next

    expected = sample(compile_program(Schedule.parse(text)), NOISE, block)
    np.testing.assert_allclose(parse(text)(velocity, NOISE), expected, rtol=1e-12, atol=1e-12)


def test_a_line_is_extrapolated_exactly_and_a_constant_kept() -> None:
    assert parse("H1T3")(lambda x, t: np.full_like(x, 2 * t), NOISE) == pytest.approx(NOISE + 1)
    assert parse("H1Z3")(lambda x, t: np.ones_like(x), NOISE) == pytest.approx(NOISE + 1)


@pytest.mark.parametrize(
    "text",
    ["", "T3", "Z1P2", "H2R1", "unipc", "unipc:1", "dpm:x", "dopri5:0", "euler:3", "dopri5@2"],
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="a baseline is"):
        parse(text)
