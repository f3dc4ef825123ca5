"""The search for schedules finds the front that is there, and its presets can be installed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import GLYPHS

from bench.capacity.block_times import BlockTimes
from export.install import write_record
from flowturbo.contract import Role
from flowturbo.pipeline import read_pipeline
from flowturbo.presets import read_presets
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.schedule import Schedule
from research.quality.engine import Engine, schedule_evaluations
from tuning import scores
from tuning.__main__ import main
from tuning.candidates import MAX_EVALUATIONS, Cost, candidates, measured
from tuning.choice import Rated, best_of, choose, fastest_as_good, front, knee
from tuning.scores import Distances, Score, solve
from tuning.search import finalists, search

BLOCKS = 10
# A device on which the predictor takes 4 ms, a refiner step 1 ms and the decoder 2 ms at any size.
TIMES = {Role.PREDICTOR: 4.0, Role.REFINER: 1.0, Role.DECODER: 2.0}


def schedule(text: str) -> Schedule:
    return Schedule.parse(text)


def exactly(value: float) -> Score:
    return Score(value, (value,) * BLOCKS)


def rated(text: str, ms: float, value: float) -> Rated:
    return Rated(schedule(text), ms, exactly(value))


def times() -> BlockTimes:
    return BlockTimes({model: {1: ms, 64: ms} for model, ms in TIMES.items()}, overhead_ms=0.5)


def test_candidates() -> None:
    found = candidates(has_refiner=True)
    assert len(set(found)) == len(found) > 500
    assert {schedule(text) for text in ("H1P5R3", "H8P9R5", "H4", "A12", "P7")} <= set(found)
    assert max(schedule_evaluations(each)[0] for each in found) == MAX_EVALUATIONS
    assert not any(each.refines for each in candidates(has_refiner=False))
    learned = set(candidates(has_refiner=True, learned=[4, 6])) - set(found)
    assert learned == {schedule("L4"), schedule("L6")}
    assert {schedule("U8@3"), schedule("V5"), schedule("C12@2")} <= set(found)


def test_cost_is_that_of_every_call() -> None:
    cost = Cost.of(times(), images=4, guidance=Guidance(3.0))
    assert cost.ms(schedule("H1P5R3")) == pytest.approx(7 * 4 + 3 * 1 + 2 + 11 * 0.5)
    slope = BlockTimes({Role.PREDICTOR: {1: 1.0, 64: 64.0}}, overhead_ms=0.0)
    assert Cost.of(slope, 4, Guidance(3.0)).ms(schedule("A2")) == pytest.approx(2 * 8)
    assert Cost.of(slope, 4, Guidance(1.0)).ms(schedule("A2")) == pytest.approx(2 * 4)
    with pytest.raises(ValueError, match="only up to 64 rows, 66 rows are needed"):
        Cost.of(slope, 33, Guidance(3.0))


def test_a_difference_is_paired() -> None:
    """Seeds differ far more than schedules do, and yet a true difference is found, no other."""
    numbers = np.random.default_rng(0)
    found, mistaken = 0, 0
    for _ in range(200):
        hard = numbers.gamma(2.0, size=60)  # how hard a seed is, for any schedule
        one, same = (hard * numbers.normal(1.0, 0.05, 60) for _ in range(2))
        worse = 1.1 * hard * numbers.normal(1.0, 0.05, 60)
        score = Score.of(one)
        found += Score.of(worse).surely_above(score)
        mistaken += Score.of(same).surely_above(score)
    assert score.value == pytest.approx(one.mean())
    assert score.interval > 0.05 * score.value  # alone, 10% in the square would not show
    assert found >= 190
    assert mistaken <= 15  # one-sided, 2.5% of 200 are 5


def test_the_front() -> None:
    points = [
        rated("H2", 2.0, 1.0),
        rated("P1", 1.0, 3.0),
        rated("H3", 3.0, 1.0),  # no better than H2
        rated("H4", 4.0, 0.5),
        rated("H5", 4.0, 0.6),
    ]
    found = front(points)
    assert [str(each.schedule) for each in found] == ["P1", "H2", "H4"]
    assert best_of(found) is found[2]
    assert fastest_as_good(found, 0.9) is found[2]
    assert fastest_as_good(found, 0.4) is None
    noisy = Rated(schedule("H6"), 6.0, Score(0.49, (0.2, 0.8) * 5))
    assert best_of([*found, noisy]) is found[2]  # 0.49 for certain is not below 0.5
    assert knee([rated("P1", 1, 100), rated("P2", 2, 10), rated("P3", 4, 9)]).ms == 2
    assert knee([rated("P1", 1, 8), rated("P2", 2, 5), rated("P3", 4, 2)]).ms == 2  # above the line
    assert knee([rated("P1", 1, 8), rated("P3", 4, 2)]).ms == 1


def test_choice() -> None:
    tried = [rated(f"P{n}", n, 1 / n) for n in (4, 5, 7, 9)] + [rated("H3", 6, 0.1)]
    paper = rated("H8", 12, 0.2)
    found = choose([*tried, paper], paper.schedule, cap_ms=10.0, quality=None)
    names = {name: str(each.schedule) for name, each in found.presets.items()}
    assert names == {"fast": "P5", "balanced": "P5", "best": "H3"}
    assert found.recommended is found.presets["best"]
    found = choose([*tried, paper], paper.schedule, cap_ms=10.0, quality=0.25)
    assert found.recommended is tried[0]
    # Nothing within the cap is as good as the paper's: the nearest to it is all there is.
    found = choose([*tried, paper], paper.schedule, cap_ms=4.5, quality=0.01)
    assert {str(each.schedule) for each in found.presets.values()} == {"P4"}
    assert found.recommended is None


def test_a_preset_of_one_time_grid_has_a_stand_in() -> None:
    """The preset without such solvers; one that was dropped before if there is no other."""
    tried = [rated("L4", 4, 0.1), rated("P4", 4, 0.3), rated("E4", 5, 0.15), rated("P9", 9, 0.05)]
    paper = rated("H8", 12, 0.2)
    found = choose([*tried, paper], paper.schedule, cap_ms=10.0, quality=None)
    assert str(found.presets["fast"].schedule) == "L4"
    assert {name: str(each.schedule) for name, each in found.otherwise.items()} == {
        name: "E4" for name, each in found.presets.items() if each.schedule.learned
    }
    assert found.stated()["presets"]["fast"]["otherwise"] == "E4"
    assert "otherwise" not in found.stated()["presets"]["best"]
    alone = choose([tried[0], paper], paper.schedule, 10.0, None, [tried[1]])
    assert str(alone.otherwise["fast"].schedule) == "P4"


def test_the_front_is_never_cut() -> None:
    of_front = [rated(f"P{n}", n, 1 / n) for n in range(2, 9)]
    others = [rated("H3", 4.5, 0.3), rated("H2", 4.6, 0.9), rated("H4", 4.7, 0.26)]
    tried = [*others, *of_front]
    paper = others[1]
    chosen = finalists(tried, 3, [paper.schedule])
    assert {each.schedule for each in chosen} == {r.schedule for r in [*of_front, paper]}
    chosen = finalists(tried, 8, [paper.schedule])
    assert {each.schedule for each in chosen} == {r.schedule for r in [*of_front, paper, others[2]]}


def test_halving_finds_the_front_with_less_work() -> None:
    cost = Cost.of(times(), 1, Guidance(3.0))
    cost_ms = {each: cost.ms(each) for each in candidates(has_refiner=True)}
    asked = []

    def score(each: Schedule, count: int) -> Score:
        """Falls with the evaluations, more so with fewer Heun steps or shift 2; few latents err."""
        asked.append(count)
        wrong = np.random.default_rng([*each.steps.encode()]).normal(0, 0.05 / count**0.5)
        heun = each.steps.count("H") / len(each)
        grid = 1 + 0.1 * ((each.shift or 1) - 2) ** 2
        few = 1 + wrong * (count < 60)
        return exactly(schedule_evaluations(each)[0] ** -2.0 * (1 + heun) * grid * few)

    kept = schedule("H8")
    stages = search(cost_ms, score, 60, [kept])
    assert [len(stage) for stage in stages][0] == len(cost_ms)
    assert sum(asked) < 0.5 * 60 * len(cost_ms)
    assert kept in [each.schedule for each in stages[-1]]
    true = front(Rated(each, ms, score(each, 60)) for each, ms in cost_ms.items())
    assert [(r.ms, r.score) for r in front(stages[-1])] == [(r.ms, r.score) for r in true]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune") / "times.json"
    stated = {m: {str(rows): ms for rows in (1, 64)} for m, ms in TIMES.items()}
    path.write_text(json.dumps({"times_ms": stated, "overhead_ms": 0.5}))
    return path


def test_distances_fall_as_the_order_says(golden_repository: Path, tmp_path: Path) -> None:
    pipeline, guidance = Engine(golden_repository), Guidance(1.5)
    arguments = (pipeline, golden_repository, None, guidance, 50, tmp_path)
    whose, solved = solve(*arguments)
    assert "Heun, 64 steps" in whose
    np.testing.assert_array_equal(solve(*arguments)[1], solved)  # kept
    distances = Distances(pipeline, guidance, solved)
    values = [distances.score(schedule(f"H{n}"), 50).value for n in (8, 16)]
    assert 3.0 < values[0] / values[1] < 6.0  # 4 for order 2, and H64's own error
    first = Distances(pipeline, guidance, solved[:20]).score(schedule("H8"), 20)
    assert distances.score(schedule("H8"), 20).value == pytest.approx(first.value, rel=1e-4)
    assert measured(golden_repository, pipeline.pipeline.name, 2, guidance).max_rows == 4


def test_command(
    golden_repository: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--repository", str(golden_repository), "--times", str(file)]
    common += ["--latents", "50", "--cache", str(tmp_path)]
    out = tmp_path / "out" / "presets.json"
    assert main([*common, "--latency-ms", "26", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "recommended: " in printed
    assert "in process " in printed
    stated = json.loads(out.read_text())
    assert [each["ms"] <= 26 for each in stated["front"]] == [True] * len(stated["front"])
    assert stated["recommended"] == stated["presets"]["best"]
    assert stated["paper"]["schedule"] == "H1P5R3"
    assert set(read_presets(out, has_refiner=True)) == {"fast", "balanced", "best"}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert main([*common, "--latency-ms", "5"]) == 2
    assert (
        "no schedule takes 5 ms or less; the fastest, H1, takes 11.5 ms" in capsys.readouterr().err
    )
    assert main([*common[:4], "--latency-ms", "30", "--latents", "9"]) == 2
    assert "--latents must be at least 50, got 9" in capsys.readouterr().err
    assert main([*common, "--latency-ms", "0"]) == 2
    assert "no schedule takes 0 ms or less" in capsys.readouterr().err
    assert main([*common, "--latency-ms", "nan"]) == 2
    assert "--latency-ms must be a finite number, got nan" in capsys.readouterr().err
    for images, guidance, most in (("0", "1", 64), ("65", "1", 64), ("33", "1.5", 32)):
        more = ("--images", images, "--guidance-scale", guidance, "--latency-ms", "26")
        assert main([*common, *more]) == 2
        assert f"--images must be 1 to {most} here, got {images}" in capsys.readouterr().err
    stated = json.loads(file.read_text())
    del stated["times_ms"][Role.REFINER]
    (tmp_path / "some.json").write_text(json.dumps(stated))
    assert main([*common, "--times", str(tmp_path / "some.json"), "--latency-ms", "26"]) == 2
    assert "some.json has no times of refiner" in capsys.readouterr().err


def test_what_runs_elsewhere_is_not_measured_here(
    golden_repository: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scores, "HEUN_STEPS", 4)
    repository = tmp_path / "models"
    shutil.copytree(golden_repository, repository)
    common = ["--repository", str(repository), "--latents", "50", "--latency-ms", "26"]
    common += ["--cache", str(tmp_path), "--out", str(tmp_path / "presets.json")]
    for engine, where in (("onnxruntime", "on a GPU"), ("tensorrt", "in TensorRT")):
        pipeline = read_pipeline(repository)
        models = {
            role: replace(record, engine=engine, on_gpu=True)
            for role, record in pipeline.models.items()
        }
        write_record(repository, replace(pipeline, models=models))
        assert main(common) == 2
        assert f"runs {where}, whose times this process cannot measure" in capsys.readouterr().err
    # A report of bench.gpu_check: PyTorch takes twice as long.
    blocks = [
        {"engine": engine, "precision": "bf16", "model": model, "rows": rows, "ms": slower * ms}
        for engine, slower in (("PyTorch", 2), ("TensorRT", 1))
        for model, ms in TIMES.items()
        for rows in (1, 64)
    ]
    (tmp_path / "gpu_check.json").write_text(json.dumps({"blocks": blocks, "overhead_ms": 0.5}))
    common += ["--times", str(tmp_path / "gpu_check.json")]
    assert main(common) == 2
    assert "PyTorch bf16, TensorRT bf16: name one" in capsys.readouterr().err
    assert main([*common, "--engine", "TensorRT"]) == 0
    printed = capsys.readouterr().out
    assert "gpu_check.json; figures: the ONNX files in onnxruntime, in this process" in printed
    assert "in process " not in printed
    stated = json.loads((tmp_path / "presets.json").read_text())
    assert stated["block_ms"] == TIMES
    assert stated["times_of"].endswith("gpu_check.json")


def test_frechet_distance(
    glyphs_repository: Path,
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scores, "HEUN_STEPS", 4)  # exact or not, images are judged
    out = tmp_path / "presets.json"
    options = ["--metric", "frechet", "--judged", "36", "--finalists", "2", "--latents", "50"]
    paths = ["--weights", str(GLYPHS), "--cache", str(tmp_path), "--out", str(out)]
    repository = ["--repository", str(glyphs_repository), "--times", str(file)]
    assert main([*repository, "--latency-ms", "13", *options, *paths]) == 2
    assert "--judged must be at least 50, got 36" in capsys.readouterr().err
    options[3] = "50"
    assert main([*repository, "--latency-ms", "13", *options, *paths]) == 0
    assert "Fréchet distance; images: 1" in capsys.readouterr().out
    stated = json.loads(out.read_text())
    assert stated["judged"] == 50
    assert len(stated["front"]) <= 2
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == 3  # of two finalists and the paper's
    assert "H1P5R3" in {folder.name.split("_")[0] for folder in folders}
    assert all(len(list(folder.glob("*.png"))) == 50 for folder in folders)
