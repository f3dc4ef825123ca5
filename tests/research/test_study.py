"""The study: its points, its figures on the real model, resuming, and the report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import GLYPHS, ROOT

from export.install import write_record
from flowturbo.contract import Role
from flowturbo.pipeline import read_pipeline
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.sampler import Array
from research.quality.engine import ExactClasses
from research.quality.evaluate import measured_with
from research.quality.subjects import Classes, Subject
from research.study import __main__ as study
from research.study import measure
from research.study.equal import EXACT, FRECHET, difference, family, rivals, time_share
from research.study.measure import stability, summary
from research.study.points import CURVES, Size, sections, unique
from research.study.refiners import REFINERS
from training import refiner

BENCHMARKS = ROOT / "docs" / "benchmarks"


def test_every_point_of_the_paper_is_there_once() -> None:
    listed = sections(1.0, 3.0, Size(), ["wide"])
    points = unique(listed)
    assert len({str(point) for point in points}) == len(points)
    names = {point.spec.sampler for point in points}
    assert {"H8", "H7R1", "H2P8R2", "H1P5R3", "P5R7H3", "H8P9R5", "U8", "H1P5T3"} <= names
    curves = next(section for section in listed if section.title == CURVES)
    assert all(family(point.spec.sampler) for point in curves.points)
    assert {point.images for point in curves.points} == {10_000}
    assert {point.repository for point in listed[-1].points} == {"main", "wide"}


def test_the_options_of_every_refiner_are_valid() -> None:
    for options in REFINERS.values():
        refiner._parser().parse_args(["--predictor=p", "--data=d", "--out=o", *options.split()])


def test_times_are_compared_within_a_round() -> None:
    found = summary([(10.0, 20.0), (30.0, 40.0), (12.0, 20.0)])
    assert (found["ms_per_image"], found["baseline_ms_per_image"]) == (12.0, 20.0)
    assert found["ratio"] == {"median": 0.6, "min": 0.5, "max": 0.75}


def point(sampler: str, share: float, offset: float) -> measure.Figures:
    """The figures of a sampler; blocks of seeds have the same effect on every sampler."""
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
    """If the figures of two samplers move together, their difference has no uncertainty."""
    one, other = point("H8", 1.0, 0.0), point("H4", 0.5, 0.25)
    for figure in (FRECHET, EXACT):
        assert difference(other, one, figure) == pytest.approx((0.25, 0))
    other["images"] = other["exact_images"] = 40
    for figure in (FRECHET, EXACT):
        assert difference(other, one, figure) is None


def test_the_fastest_of_each_family_that_is_as_good_as_heun() -> None:
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


def test_the_baseline_takes_exactly_its_own_time() -> None:
    """The measured ratio of the baseline to itself is noise, and must not enter any share."""
    heun, other = point("H8", 1.05, 0.0), point("H1P5R3", 0.5, 0.0)
    assert rivals([heun, other], heun, FRECHET)["FlowTurbo"].share == 0.5
    other = point("H12", 2.0, 0.0)
    assert rivals([heun, other], other, FRECHET)["Heun"].share == 0.5


def test_stability_of_a_known_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """v = x grows as exp(t): the relative change over h is exp(h) - 1 at all times."""
    exact = ExactClasses(GLYPHS / "predictor.safetensors")

    def velocity(subject: Subject, seeds: Array, guidance: Guidance):  # type: ignore[no-untyped-def]
        return lambda x, t: x

    monkeypatch.setattr(exact, "velocity", velocity)
    found = stability(exact, Classes(36), Guidance(1.0), images=3)
    assert found["median"] == pytest.approx([np.expm1(1 / 32)] * 31, rel=0.01)


@pytest.fixture
def arguments(glyphs_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    monkeypatch.setattr(study, "STABILITY_IMAGES", 2)
    for module in (study, measure):
        monkeypatch.setattr(module, "BATCH", 6)  # images timed and compared with the exact solution
    words = ["--repository", glyphs_repository, "--weights", GLYPHS, "--images", 24]
    words += ["--other-images", 20, "--rounds", 1, "--work", tmp_path / "work"]
    words += ["--refiners", tmp_path / "none"]
    words += ["--json", tmp_path / "study.json", "--report", tmp_path / "study.md"]
    return [*map(str, words)]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("known", "done"),
    [
        ({}, False),
        ({"models": "m", "solvers": "s"}, True),
        ({"models": "m", "solvers": "others"}, False),
        ({"models": "m"}, False),
        ({"models": "others", "solvers": "s"}, False),
    ],
)
def test_figures_of_other_solvers_are_measured_again(known: dict[str, str], done: bool) -> None:
    assert measured_with(known, {"models": "m", "solvers": "s", "spec": "L4_g1"}) == done


def test_a_small_study(arguments: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study_findings.md").write_text("## Findings\n\nLittle.\n")
    for only, said in (
        ("/H8_g1 ", "2 points to measure, 0 done"),
        ("/(H8|H1P5R3|U6@2|H5P7T3|H1P5R2|L4)_g1 ", "6 points to measure, 2 done"),
    ):
        assert study.main([*arguments, "--only", only]) == 0
        assert said in capsys.readouterr().out
    kept = json.loads((tmp_path / "study.json").read_text())
    kept["points"]["main/L4_g1 24"]["solvers"] = "those fitted before"
    (tmp_path / "study.json").write_text(json.dumps(kept))
    assert study.main([*arguments, "--only", "/(L4|U6@2)_g1 24"]) == 0
    assert "1 points to measure, 1 done" in capsys.readouterr().out
    points = json.loads((tmp_path / "study.json").read_text())["points"]
    ours = points["main/H1P5R3_g1 24"]
    assert (ours["predictor"], ours["refiner"], ours["images"]) == (7, 6, 24)
    assert points["main/U6@2_g1 24"]["predictor"] == 6
    assert all(0.01 < point["from_exact"] < 1 for point in points.values())
    text = (tmp_path / "study.md").read_text()
    assert text.count("`H5P7T3`") == 1  # in its section, with fewer images
    assert "## Findings\n\nLittle.\n\n## At Heun's Fréchet distance" in text
    assert "## Solvers" in text
    assert "## Order of blocks" not in text
    assert "Not measured yet: " in text
    assert "| `H8` | " in text
    for picture in ("curves", "stability", "ablations"):
        assert f"(study_{picture}.png)" in text
        assert (tmp_path / f"study_{picture}.png").stat().st_size > 5000


def test_the_committed_report_is_of_the_committed_figures(tmp_path: Path) -> None:
    for name in ("study.json", "study_findings.md"):
        shutil.copy(BENCHMARKS / name, tmp_path)
    report = tmp_path / "study.md"
    words = ["--report-only", "--json", str(tmp_path / "study.json"), "--report", str(report)]
    assert study.main(words) == 0
    committed = (BENCHMARKS / "study.md").read_text()
    assert report.read_text() == committed, "write it again: python -m research.study --report-only"


def table_rows(path: Path) -> list[tuple[str, ...]]:
    lines = [line for line in path.read_text().splitlines() if line.startswith("| `")]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


def test_the_figures_of_the_quality_page_are_those_of_the_log() -> None:
    """In rows of one schedule. Cells of words and empty cells are not compared."""
    logs = (BENCHMARKS / "study.md", BENCHMARKS / "scenes.md")
    log = [set(row) for path in logs for row in table_rows(path)]
    rows = [row for row in table_rows(ROOT / "docs/quality.md") if " − `" not in row[0]]
    assert len(rows) > 10
    for name, *cells in rows:
        figures = {cell for cell in cells if "." in cell}
        assert figures
        assert any({name} | figures <= row for row in log), name


def test_the_differences_on_the_quality_page_are_those_of_the_json() -> None:
    """In rows of two schedules: relative time, and differences paired by seeds."""
    points = json.loads((BENCHMARKS / "study.json").read_text())["points"]
    rows = [row for row in table_rows(ROOT / "docs/quality.md") if " − `" in row[0]]
    assert len(rows) > 10
    for names, *cells in rows:
        keys = [name.strip("`").replace(":", "-") for name in names.split(" − ")]
        pairs = [[points.get(f"main/{key}_g1 {n}") for key in keys] for n in (10_000, 2_000)]
        one, other = next(pair for pair in pairs if all(pair))
        figures = [difference(one, other, figure) for figure in (FRECHET, EXACT)]
        assert cells == [
            f"{time_share(one) / time_share(other):.2f}",
            *(f"{apart:+.4f} ± {interval:.4f}" for apart, interval in figures),
        ], names


@pytest.mark.parametrize("changed", ["--rounds=2", "--guidance-scale=2", "--other-images=19"])
def test_the_settings_of_a_study_cannot_change(
    arguments: list, capsys: pytest.CaptureFixture[str], changed: str
) -> None:
    """Nor without points: the stability of the velocity is measured at once."""
    assert study.main([*arguments, "--only", "nothing"]) == 0
    assert study.main([*arguments, "--only", "nothing", changed]) == 2
    assert "give another --json" in capsys.readouterr().err


def test_a_study_needs_a_decoder(
    arguments: list, golden_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments[1] = str(golden_repository)
    assert study.main(arguments) == 2
    assert "makes latents only: export it with --vae" in capsys.readouterr().err


def test_a_report_needs_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.json"
    for words, said in (("--report-only", "study.json"), ("--rounds=0", "--rounds must be 1")):
        assert study.main([words, "--json", str(file)]) == 2
        assert said in capsys.readouterr().err
    file.write_text('{"points": {}}')
    assert study.main(["--report-only", "--json", str(file)]) == 2
    assert "study.json has no study" in capsys.readouterr().err


def test_points_of_other_settings_are_not_mixed(
    arguments: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The existing file stays as it is."""
    known = {"points": {"main/H8_g1 24": {}}, "hardware": {"cpu": "another", "cores": 2}}
    (tmp_path / "study.json").write_text(json.dumps(known))
    assert study.main([*arguments, "--only", "/H8_g1 "]) == 2
    said = capsys.readouterr().err
    assert "study.json was measured with hardware {'cpu': 'another', 'cores': 2}, not" in said
    assert "give another --json" in said
    assert json.loads((tmp_path / "study.json").read_text()) == known


def test_other_refiners_need_the_same_predictor_and_decoder(
    arguments: list, glyphs_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, pipeline = tmp_path / "refiners" / "deep", read_pipeline(glyphs_repository)
    shutil.copytree(glyphs_repository / "flowturbo", other / "flowturbo")
    arguments += ["--refiners", str(tmp_path / "refiners")]
    digests = {**pipeline.fingerprint["sha256"], Role.PREDICTOR: "0" * 64}
    fingerprint = {**pipeline.fingerprint, "sha256": digests}
    write_record(other, replace(pipeline, fingerprint=fingerprint))
    assert study.main(arguments) == 2
    assert "have different predictors" in capsys.readouterr().err
    models = {role: each for role, each in pipeline.models.items() if role is not Role.DECODER}
    write_record(other, replace(pipeline, models=models))
    assert study.main(arguments) == 2
    assert "have different decoders" in capsys.readouterr().err
