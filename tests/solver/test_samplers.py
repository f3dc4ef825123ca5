"""The baseline against a flow whose solution is known."""

import numpy as np
import pytest

from flowturbo.errors import RequestError
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
    "text",
    ["", "H8", "T3", "U8", "dopri5:0", "dopri5:x", "euler:3", "dopri5@2"],
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="a baseline is"):
        parse(text)
