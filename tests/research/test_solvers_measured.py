"""Fitted solvers beside others, and a refiner on top of them, on a small real network."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import GOLDEN

from flowturbo.pipeline import solvers_path
from flowturbo.solvers import Solvers
from research import fitted_refiner, solvers
from tuning import fit

GUIDANCE = ["--guidance", "1", "3"]


@pytest.fixture(scope="module")
def fitted(golden_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a repository, models/, that has L3 and L4, and their trajectories."""
    folder = tmp_path_factory.mktemp("fitted")
    shutil.copytree(golden_repository, folder / "models")
    few = ["--trajectories", "24", "--held-out", "1", "--evaluations", "3", "4", *GUIDANCE]
    assert fit.main([*common(folder), *few, "--cache", str(folder / "cache")]) == 0
    return folder


def common(folder: Path) -> list[str]:
    return ["--repository", str(folder / "models"), "--pipeline", "sit"]


def test_solvers_are_compared(fitted: Path, tmp_path: Path) -> None:
    """Every row is nearer with more evaluations, and its ratio is to the row beside it."""
    path = tmp_path / "found.json"
    asked = ["--predictor", str(GOLDEN / "predictor.pt"), "--work", str(tmp_path)]
    few = ["--images", "20", "--first-seed", "7", "--evaluations", "3", "4", "--schedule", "H8"]
    assert solvers.main([*common(fitted), *asked, *few, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["guidance"]["3"]
    assert {"L3", "L4", "A3@3", "A4@3", "U4@2", "H8"} <= rows.keys()
    for text in ("L{}", "A{}@3", "U{}@3"):
        assert rows[text.format(4)]["distance"] < rows[text.format(3)]["distance"]
    beside = rows["L4"]["distance"] / rows["A4@3"]["distance"]
    assert rows["L4"]["ratio"] == pytest.approx(beside) and rows["A4@3"]["ratio"] == 1
    nearest = min(("A4@2", "A4@3"), key=lambda each: rows[each]["distance"])
    of_nearest = rows["L4"]["rivals"][nearest]["ratio"]
    assert of_nearest == pytest.approx(rows["L4"]["distance"] / rows[nearest]["distance"])
    assert "| 4 | `L4` |" in path.with_suffix(".md").read_text()
    kept = json.loads(path.read_text())
    again = ["--letters", "U", "--schedule", "H4"]
    few = ["--images", "20", "--first-seed", "7", "--evaluations", "4", *again]
    assert solvers.main([*common(fitted), *asked, *few, "--json", str(path)]) == 0
    more = json.loads(path.read_text())["guidance"]["3"]
    assert more["L4"] == rows["L4"] and more["H8"] == rows["H8"] and "H4" in more
    path.write_text(json.dumps(kept | {"solvers": "others"}))
    assert solvers.main([*common(fitted), *asked, *few, "--json", str(path)]) == 0
    more = json.loads(path.read_text())["guidance"]["3"]
    assert "L4" not in more and more["H8"] == rows["H8"]


def test_a_refiner_is_compared(fitted: Path, tmp_path: Path) -> None:
    """With the same solvers without refiner, at equal evaluations and at equal time."""
    plain, path = tmp_path / "plain.npz", tmp_path / "found.json"
    few = ["--trajectories", "24", "--held-out", "1", "--evaluations", "3", "4", *GUIDANCE]
    kept = ["--cache", str(fitted / "cache")]
    assert fit.main([*common(fitted), *few, *kept, "--units", "0", "--out", str(plain)]) == 0
    asked = ["--predictor", str(GOLDEN / "predictor.pt"), "--work", str(tmp_path)]
    words = [*common(fitted), *asked, "--images", "20", "--rounds", "2", *GUIDANCE]
    words += ["--json", str(path)]
    few = ["--evaluations", "3", "4"]
    assert fitted_refiner.main([*words, *few, "--without", str(plain)]) == 0
    found = json.loads(path.read_text())["guidance"]
    assert [(scale, list(of)) for scale, of in found.items()] == [
        ("1", ["L3", "L4"]),
        ("3", ["L3", "L4"]),
    ]
    installed = Solvers.read(solvers_path(fitted / "models", "sit"))
    rows = [(float(scale), name, row) for scale, of in found.items() for name, row in of.items()]
    for scale, name, row in rows:
        refiners = installed.fit_for(int(name[1:]), scale).refiners
        assert row["units"] == [len(refiner) for refiner in refiners] and len(refiners) == 2
        of = row["equal_evaluations"]
        assert of["ratio"] == pytest.approx(row["distance"] / row["without"])
        assert row["equal_time"]["8"]["ms"] > 0
    assert path.with_suffix(".md").read_text().count("| L4 |") == 2


def test_a_refiner_is_compared_with_none(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = solvers_path(fitted / "models", "sit")
    words = [*common(fitted), "--predictor", str(GOLDEN / "predictor.pt")]
    assert fitted_refiner.main([*words, "--without", str(installed)]) == 2
    assert "has refiners: fit it with --units 0" in capsys.readouterr().err
    assert fitted_refiner.main([*words, "--without", str(tmp_path / "none.npz")]) == 2
    assert "has no fitted solvers" in capsys.readouterr().err


@pytest.mark.unit
def test_equal_time_is_between_two_solvers() -> None:
    """The logarithm of the distance is linear in time; beyond the last it is the last one's."""
    own = np.full(20, 0.3)
    others = {4: np.full(20, 0.4), 6: np.full(20, 0.1)}
    times = {4: 10.0, 6: 14.0}
    for at, wanted in ((10.0, 0.4), (12.0, 0.2), (11.0, 0.4 * 0.25**0.25), (20.0, 0.1)):
        found = fitted_refiner.compared(own, others, times, at)
        assert found["ratio"] == pytest.approx(0.3 / wanted)
        assert found["interval"] == pytest.approx(0)
