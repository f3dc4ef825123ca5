"""The baselines against flows whose solution is known: order of convergence, counts, errors."""

import numpy as np
import pytest

from flowturbo.errors import RequestError
from flowturbo.solver.guidance import Guidance
from research.quality.samplers import MAX_EVALUATIONS, Counted, dopri5, parse

pytestmark = pytest.mark.unit

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
        ("unipc:64", "unipc:128", 2),
        # Its grid in log signal-to-noise ratio is far from uniform: the order shows late.
        ("dpm:128", "dpm:256", 2),
    ],
)
def test_order_of_convergence(coarse: str, fine: str, order: int) -> None:
    assert np.log2(error(coarse) / error(fine)) == pytest.approx(order, abs=0.35)


def test_dopri5_is_as_exact_as_asked() -> None:
    assert error("dopri5") < 1e-3
    assert np.abs(dopri5(1e-8, 1e-8)(velocity, NOISE) - EXACT).max() < 1e-7


def test_dopri5_does_not_chase_rounding() -> None:
    """As of few digits: no step is short enough for a velocity that jumps."""

    def rounded(x: np.ndarray, t: float) -> np.ndarray:
        return np.round(velocity(x, t), 2)

    counted = Counted(rounded)
    with pytest.raises(RequestError, match=r"rtol 1e-07 is at t = 0\.\d+ after 2000 evaluations"):
        dopri5(1e-7, 1e-7)(counted, NOISE)
    assert counted.evaluations == MAX_EVALUATIONS


@pytest.mark.parametrize(
    ("text", "evaluations"),
    [("unipc:8", 8), ("dpm:12", 12), ("dpm:12@2", 12)],
)
def test_evaluations(text: str, evaluations: int) -> None:
    counted = Counted(velocity)
    parse(text)(counted, NOISE)
    assert counted.evaluations == evaluations


@pytest.mark.parametrize("name", ["unipc", "dpm"])
def test_grids_may_be_shifted(name: str) -> None:
    seen: list[float] = []

    def noted(x: np.ndarray, t: float) -> np.ndarray:
        seen.append(t)
        return velocity(x, t)

    parse(f"{name}:4@3")(noted, NOISE)
    assert seen == pytest.approx([0, 0.1, 0.25, 0.5])


@pytest.mark.parametrize("name", ["unipc", "dpm"])
@pytest.mark.parametrize("steps", [3, 5, 7, 10])
def test_guidance_begins_on_the_grid_as_a_schedules(name: str, steps: int) -> None:
    for low in range(steps):
        seen: list[bool] = []

        def noted(x: np.ndarray, t: float) -> np.ndarray:
            seen.append(Guidance(3.0, (low / steps, 1.0)).applies_at(t))  # noqa: B023
            return velocity(x, t)

        parse(f"{name}:{steps}")(noted, NOISE)
        assert seen == [k >= low for k in range(steps)]


@pytest.mark.parametrize(
    "text",
    ["", "H8", "T3", "unipc", "unipc:1", "dpm:x", "dopri5:0", "euler:3", "dopri5@2"],
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="a baseline is"):
        parse(text)
