"""The schedule grammar."""

import pytest

from flowturbo.errors import RequestError
from flowturbo.solver.schedule import MAX_STEPS, Schedule

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "steps", "printed"),
    [
        ("H1P5R3", "HPPPPPRRR", "H1P5R3"),
        ("HPPPPPRRR", "HPPPPPRRR", "H1P5R3"),
        ("HP5R3", "HPPPPPRRR", "H1P5R3"),
        ("H0P3", "PPP", "P3"),
        ("H1P0R2", "HRR", "H1R2"),
        ("P5R7H3", "P" * 5 + "R" * 7 + "H" * 3, "P5R7H3"),
        ("H1P1R1H1P1R1", "HPRHPR", "H1P1R1H1P1R1"),
        ("E8", "E" * 8, "E8"),
        ("A4R2", "AAAARR", "A4R2"),
        ("H1Z2T1P1R1", "HZZTPR", "H1Z2T1P1R1"),
        (f"H{MAX_STEPS}", "H" * MAX_STEPS, f"H{MAX_STEPS}"),
        ("A8@3", "A" * 8, "A8@3"),
        ("H1P1R1@2.50", "HPR", "H1P1R1@2.5"),
        ("H8@1", "H" * 8, "H8@1"),  # not the grid of the pipeline's own
    ],
)
def test_reads_and_prints(text: str, steps: str, printed: str) -> None:
    schedule = Schedule.parse(text)
    assert schedule.steps == steps
    assert str(schedule) == printed
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read"),
        ("H0", "0 steps"),
        ("H0P0R0", "0 steps"),
        ("R3", "no velocity cached"),
        ("Z1P2", "no velocity cached"),
        ("T1", "no velocity cached"),
        ("H1R1Z1", "Z and T follow evaluations of the predictor, not R"),
        ("H0R3", "no velocity cached"),
        ("H1P5R3X", "unknown step 'X'"),
        ("h1", "'h1' cannot be read"),
        ("1H", "cannot be read"),
        ("H-1", "cannot be read"),
        ("H1 P5", "cannot be read"),
        ("H٣", "cannot be read"),
        ("H99999999", "cannot be read"),
        (f"H{MAX_STEPS + 1}", f"{MAX_STEPS + 1} steps"),
        ("H9999" * 2000, "steps"),
        ("@2", "cannot be read"),
        ("A8@", "shift '' cannot be read: a shift is a number from 0.1 to 20"),
        ("A8@x", "shift 'x' cannot be read"),
        ("A8@2@2", "shift '2@2' cannot be read"),
        ("A8@1.234", "shift '1.234' cannot be read"),
        ("A8@0.05", "shift 0.05 is out of range: a shift is a number from 0.1 to 20"),
        ("A8@21", "shift 21 is out of range"),
    ],
)
def test_refuses(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        Schedule.parse(text)
    assert len(str(caught.value)) < 400
