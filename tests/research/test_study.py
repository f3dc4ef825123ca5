"""The study: its list, its figures on the real model, resuming, and the report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import GLYPHS, ROOT

from export.install import write_record
from flowturbo.contract import Role
from flowturbo.pipeline import read_pipeline, with_models
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.sampler import Array
from research.quality.engine import Exact
from research.study import __main__ as study
from research.study import measure
from research.study.equal import EXACT, FRECHET, difference, rivals
from research.study.figures import family
from research.study.measure import stability, summary
from research.study.points import CURVES, Size, sections, unique
from research.study.refiners import REFINERS
from training import refiner


def test_every_point_of_the_paper_is_there_once() -> None:
    listed = sections(1.0, 3.0, Size(), ["wide"])
    points = unique(listed)
    assert len({str(point) for point in points}) == len(points)
    names = {point.spec.sampler for point in points}
    assert {"H8", "H7R1", "H2P8R2", "H1P5R3", "P5R7H3", "H8P9R5", "unipc:8", "H1P5T3"} <= names
    curves = next(section for section in listed if section.title == CURVES)
    assert all(family(point.spec.sampler) for point in curves.points)
    assert {point.images for point in curves.points} == {10_000}
    assert {point.repository for point in listed[-1].points} == {"main", "wide"}


def test_every_refiner_of_the_study_can_be_trained() -> None:
    for options in REFINERS.values():
        refiner._parser().parse_args(["--predictor=p", "--data=d", "--out=o", *options.split()])


def test_times_are_compared_within_a_round() -> None:
    found = summary([(10.0, 20.0), (30.0, 40.0), (12.0, 20.0)])
    assert (found["ms_per_image"], found["baseline_ms_per_image"]) == (12.0, 20.0)
    assert found["ratio"] == {"median": 0.6, "min": 0.5, "max": 0.75}


def point(sampler: str, share: float, offset: float) -> measure.Figures:
    """Seeds are as hard for one sampler as for another."""
    blocks = np.random.default_rng(0).random(10)
    return {
        "sampler": sampler,
        "images": 500,
        "ratio": {"median": share},
        "exact_images": 50,
        "from_exact": 0.1 + offset,
        "from_exact_without_block": list(blocks + offset),
        "frechet_distance": 1 + offset,
        "frechet_distance_without_block": list(blocks + offset),
    }


def test_differences_are_paired_by_seeds() -> None:
    """Two samplers whose figures move together differ by the same everywhere: no uncertainty."""
    one, other = point("H8", 1.0, 0.0), point("H4", 0.5, 0.25)
    for figure in (FRECHET, EXACT):
        assert difference(other, one, figure) == pytest.approx((0.25, 0))
    other["images"] = other["exact_images"] = 40
    for figure in (FRECHET, EXACT):
        assert difference(other, one, figure) is None


def test_the_fastest_as_good() -> None:
    heun = point("H8", 1.0, 0.0)
    others = [
        point("A6@3", 0.4, 0.02),  # not as good
        point("A8@3", 0.5, 0.005),
        point("A12@3", 0.6, -0.2),
        point("H1P5R3", 0.3, -0.1),
        point("H1P1H1", 0.1, -0.1),  # of no family
    ]
    h12 = point("H12", 1.5, 0.0)
    found = rivals([heun, *others, h12], h12, FRECHET)
    assert {name: rival.sampler for name, rival in found.items()} == {
        "Heun": "H8",
        "FlowTurbo": "H1P5R3",
        "Adams-Bashforth 2, shifted": "A8@3",
    }
    assert found["FlowTurbo"].share == pytest.approx(0.2)
    assert found["FlowTurbo"].difference == pytest.approx(-0.1)


def test_the_baseline_is_its_own_time() -> None:
    """Its ratio to itself, taken in turns, is noise that no share is to have."""
    heun, other = point("H8", 1.05, 0.0), point("H1P5R3", 0.5, 0.0)
    assert rivals([heun, other], heun, FRECHET)["FlowTurbo"].share == 0.5
    other = point("H12", 2.0, 0.0)
    assert rivals([heun, other], other, FRECHET)["Heun"].share == 0.5


def test_stability_of_a_known_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """v = x grows as exp(t): its relative change over h is exp(h) - 1 at all times."""
    exact = Exact(GLYPHS / "predictor.safetensors")

    def velocity(labels: Array, guidance: Guidance):  # type: ignore[no-untyped-def]
        return lambda x, t: x

    monkeypatch.setattr(exact, "velocity", velocity)
    found = stability(exact, Guidance(1.0), images=3)
    assert found["median"] == pytest.approx([np.expm1(1 / 32)] * 31, rel=0.01)


@pytest.fixture
def arguments(glyphs_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    monkeypatch.setattr(study, "STABILITY_IMAGES", 2)
    for module in (study, measure):
        monkeypatch.setattr(module, "BATCH", 6)  # images that are timed and solved exactly
    words = ["--repository", glyphs_repository, "--weights", GLYPHS, "--images", 24]
    words += ["--other-images", 20, "--rounds", 1, "--work", tmp_path / "work"]
    words += ["--refiners", tmp_path / "none"]
    words += ["--json", tmp_path / "study.json", "--report", tmp_path / "quality.md"]
    return [*map(str, words)]


def test_a_small_study(arguments: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study_findings.md").write_text("## What was found\n\nLittle.\n")
    for only, said in (
        ("/H8_g1 ", "2 points to measure, 0 done"),
        ("/(H8|H1P5R3|unipc-6@2|H5P7T3|H1P5R2)_g1 ", "5 points to measure, 2 done"),
    ):
        assert study.main([*arguments, "--only", only]) == 0
        assert said in capsys.readouterr().out
    points = json.loads((tmp_path / "study.json").read_text())["points"]
    ours = points["main/H1P5R3_g1 24"]
    assert (ours["predictor"], ours["refiner"], ours["images"]) == (7, 6, 24)
    assert points["main/unipc-6@2_g1 24"]["predictor"] == 6
    assert all(0.01 < point["from_exact"] < 1 for point in points.values())
    text = (tmp_path / "quality.md").read_text()
    assert text.count("`H5P7T3`") == 1  # its section has it, of fewer images
    assert "## What was found\n\nLittle.\n\n## At Heun's Fréchet distance" in text
    assert "## Solvers" in text
    assert "## Order of blocks" not in text
    assert "Not measured yet: " in text
    assert "| `H8` | " in text
    for picture in ("curves", "stability", "ablations"):
        assert f"(study_{picture}.png)" in text
        assert (tmp_path / f"study_{picture}.png").stat().st_size > 5000


def test_the_committed_report_is_of_the_committed_figures(tmp_path: Path) -> None:
    benchmarks = ROOT / "docs" / "benchmarks"
    for name in ("study.json", "study_findings.md"):
        shutil.copy(benchmarks / name, tmp_path)
    report = tmp_path / "quality.md"
    words = ["--report-only", "--json", str(tmp_path / "study.json"), "--report", str(report)]
    assert study.main(words) == 0
    said = report.read_text().replace("](study_", "](benchmarks/study_")
    committed = (ROOT / "docs" / "quality.md").read_text()
    assert said == committed, "make docs/quality.md anew: python -m research.study --report-only …"


@pytest.mark.parametrize("changed", ["--rounds=2", "--guidance-scale=2", "--other-images=19"])
def test_what_a_study_is_of_stays(
    arguments: list, capsys: pytest.CaptureFixture[str], changed: str
) -> None:
    """Even with no point in it: the velocity's stability is."""
    assert study.main([*arguments, "--only", "nothing"]) == 0
    assert study.main([*arguments, "--only", "nothing", changed]) == 2
    assert "give another --json" in capsys.readouterr().err


def test_a_study_makes_images(
    arguments: list, golden_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments[1] = str(golden_repository)
    assert study.main(arguments) == 2
    assert "makes latents only: export it with --vae" in capsys.readouterr().err


def test_a_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.json"
    for words, said in (("--report-only", "study.json"), ("--rounds=0", "--rounds must be 1")):
        assert study.main([words, "--json", str(file)]) == 2
        assert said in capsys.readouterr().err
    file.write_text('{"points": {}}')
    assert study.main(["--report-only", "--json", str(file)]) == 2
    assert "study.json is not a study's" in capsys.readouterr().err


def test_points_of_other_settings_are_not_mixed(
    arguments: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is a report of another size written over the one that is there."""
    known = {"points": {"main/H8_g1 24": {}}, "hardware": {"cpu": "another", "cores": 2}}
    (tmp_path / "study.json").write_text(json.dumps(known))
    assert study.main([*arguments, "--only", "/H8_g1 "]) == 2
    said = capsys.readouterr().err
    assert "study.json is of hardware {'cpu': 'another', 'cores': 2}, this would be of" in said
    assert "give another --json" in said
    assert json.loads((tmp_path / "study.json").read_text()) == known


def test_other_refiners_are_of_the_same_predictor(
    arguments: list, glyphs_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, pipeline = tmp_path / "refiners" / "deep", read_pipeline(glyphs_repository)
    shutil.copytree(glyphs_repository / "flowturbo", other / "flowturbo")
    arguments += ["--refiners", str(tmp_path / "refiners")]
    digests = {**pipeline.fingerprint["sha256"], Role.PREDICTOR: "0" * 64}
    fingerprint = {**pipeline.fingerprint, "sha256": digests}
    write_record(other, replace(pipeline, fingerprint=fingerprint))
    assert study.main(arguments) == 2
    assert f"{other} has another predictor than" in capsys.readouterr().err
    models = {role: each for role, each in pipeline.models.items() if role is not Role.DECODER}
    write_record(other, with_models(pipeline, models))
    assert study.main(arguments) == 2
    assert f"{other} has another decoder than" in capsys.readouterr().err
