"""Fitted solvers beside others, and a refiner on top of them, on a small real network."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import GOLDEN

from research import residual, solvers
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


def test_a_refiner_is_compared(fitted: Path, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    asked = ["--predictor", str(GOLDEN / "predictor.pt"), "--work", str(tmp_path)]
    few = ["--trajectories", "24", "--images", "20", "--steps", "8", "--batch", "8"]
    words = [*common(fitted), *asked, *few, "--evaluations", "4", *GUIDANCE, "--at", "1", "3"]
    cache = ["--cache", str(fitted / "cache"), "--json", str(path)]
    assert residual.main([*words, *cache, "--networks", "windows"]) == 0
    assert residual.main([*words, *cache, "--networks", "mixer"]) == 0
    found = json.loads(path.read_text())["found"]
    assert [(row["network"], row["guidance"]) for row in found] == [
        (network, scale) for network in ("windows", "mixer") for scale in (1, 3)
    ]
    for row in found:
        of = row["equal_evaluations"]
        assert of["ratio"] == pytest.approx(row["distance"] / row["solver"])
        assert row["equal_time"]["8"]["cost"] > 0
    assert path.with_suffix(".md").read_text().count("| mixer, 2 |") == 2


@pytest.mark.unit
def test_equal_time_is_between_two_solvers() -> None:
    """The logarithm of the distance is linear in evaluations, and 0 cost is no change."""
    own = np.full(20, 0.3)
    solver = {4: np.full(20, 0.4), 6: np.full(20, 0.1)}
    found = residual.compared(4, own, solver, {1: 0.0, 8: 1.0})
    assert found["equal_time"]["1"]["ratio"] == pytest.approx(0.75)
    assert found["equal_time"]["8"]["ratio"] == pytest.approx(1.5)
    assert found["at_4_percent"]["ratio"] == pytest.approx(0.3 / (0.4 * 0.25**0.04))


@pytest.mark.parametrize("kind", residual.NETWORKS)
def test_a_new_network_adds_nothing_and_a_trained_one_helps(kind: str) -> None:
    rng = np.random.default_rng(0)
    states = rng.standard_normal((1024, 3, 2, 4, 4)).astype(np.float32)
    label = rng.integers(3, size=1024)
    target = np.tanh(states[:, 0]) * states[:, 1]
    given = residual.Inputs(states, np.zeros(1024, np.float32), label, target)
    untrained = residual.Residual(residual.NETWORKS[kind](2, 2, 3), 1.0)
    assert not untrained(given).any()
    made = residual.trained(kind, given, 3, steps=400, batch=128, name=kind)
    left = np.square(made(given) - target).mean()
    assert left < 0.8 * np.square(target).mean()
