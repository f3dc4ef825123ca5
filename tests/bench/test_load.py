"""The load harness, on the real server and with the real perf_analyzer; counts, never times."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from flowturbo_client import FlowTurboClient
from support import ROOT

from bench import load, perf_analyzer
from bench.downloads import made_whole
from bench.observe import _models, listening_process, observing
from bench.perf_analyzer import Answer, Load, PerfAnalyzerError, Result, entry
from flowturbo import contract
from flowturbo.contract import LABEL_ROLES, Role
from flowturbo.generate import roles_called
from flowturbo.serving.tritonserver import ServerAddress
from flowturbo.solver.program import compile_program
from flowturbo.solver.schedule import Schedule


def run_load(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.load", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_quick_run(glyphs_repository: Path, glyphs_server: ServerAddress, tmp_path: Path) -> None:
    out = tmp_path / "reports" / "load.json"
    done = run_load(
        *("--quick", "--url", glyphs_server.grpc),
        *("--repository", glyphs_repository, "--out", out),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    lone, four = (
        next(p for p in report["closed_loop"] if p["concurrency"] == n and p["schedule"] != "H8")
        for n in (1, 4)
    )
    assert four["server"]["rows_per_execution"] > lone["server"]["rows_per_execution"] == 2
    costs = [p for part in report["cost"].values() for p in part["points"]]
    points = [*report["closed_loop"], *report["open_loop"], *report["mix"], *costs]
    assert len(points) == 2 + 1 + 1 + 2 + 2
    for point in points:
        assert point["error"] is None
        assert point["server"]["requests"] >= point["requests"] >= 6
        assert point["server"]["resident_mib"]["peak"] > 50
        assert point["server"]["cpu_cores"] > 0
    assert report["mix"][0]["kinds"] == 12
    check_overload(report["overload"])
    check_report(out)


def check_overload(point: load.Point) -> None:
    counts = point["requests"]
    assert counts["answered"] >= 64  # the service's max_inflight: as many found a place
    assert counts["refused"] > 0
    assert counts["failed"] == 0
    assert sum(counts.values()) == round(point["rate"] * point["seconds"])
    assert point["server"]["requests"] == sum(counts.values())
    # Those that were refused cost no evaluation. The first one may have been alone, on the
    # ensemble, whose executions make several calls.
    calls = roles_called(compile_program(Schedule.parse(load.SCHEDULE)))
    for model in (Role.PREDICTOR, Role.REFINER):
        rows = point["server"]["models"][model]["rows"]
        of_one = 2 * calls.count(model)
        assert of_one * (counts["answered"] - 1) < rows <= of_one * counts["answered"]


def check_report(out: Path) -> None:
    text = out.with_suffix(".md").read_text()
    for title in ("Closed loop", "Open loop", "Mixed requests", "Overload", "Time against work"):
        assert f"\n## {title}\n" in text
    plots = [out.with_name(f"load_{name}.png") for name in ("closed", "open", "cost")]
    for plot in plots:
        assert plot.stat().st_size > 10_000
        assert f"]({plot.name})" in text
        plot.unlink()
    out.with_suffix(".md").unlink()
    done = run_load("--report-only", "--out", out)
    assert done.returncode == 0, done.stderr
    assert out.with_suffix(".md").read_text() == text
    assert all(plot.exists() for plot in plots)


def test_observed_work_is_that_of_the_program(glyphs_server: ServerAddress) -> None:
    with (
        observing(glyphs_server.grpc, "glyphs") as observer,
        FlowTurboClient(glyphs_server.grpc) as client,
    ):
        for seed in range(3):
            client.generate([0, 1], [seed, seed + 1], "H2P4R2")  # it has no ensemble
    found = observer.observation
    calls = [call.network for call in compile_program(Schedule.parse("H2P4R2")).calls]
    executions = {name: work.executions for name, work in found.models.items()}
    assert executions == {
        Role.PREDICTOR: 3 * calls.count("predictor"),
        Role.REFINER: 3 * calls.count("refiner"),
        Role.DECODER: 3,
    }
    # Two images with guidance are four rows; the decoder has one per image.
    rows = {name: work.rows_per_execution for name, work in found.models.items()}
    assert rows == {Role.PREDICTOR: 4, Role.REFINER: 4, Role.DECODER: 2}
    assert found.requests == 3
    assert found.rows_per_execution == 4
    for work in found.models.values():
        assert sum(work.shares().values()) == pytest.approx(1)
    assert found.cpu_s is not None and found.cpu_s > 0
    assert min(sample.resident for sample in found.memory) > 50 * 2**20
    assert min(sample.shared_files for sample in found.memory) > 0


def test_which_models_are_observed() -> None:
    """Those of the one pipeline that is served, or of the one that is named."""
    one = {"flowturbo", "sit_velocity_predictor", "sit_h2", "sit_h2_planner", "sit_finisher"}
    assert _models(one, None) == {"predictor": "sit_velocity_predictor"}
    glyphs = {role.value: contract.model_name("glyphs", role) for role in LABEL_ROLES}
    two = one | {*glyphs.values()}
    assert _models(two, "glyphs") == glyphs
    assert _models(two, "sit") == {"predictor": "sit_velocity_predictor"}
    with pytest.raises(ValueError, match="the server serves glyphs, sit: name one"):
        _models(two, None)
    with pytest.raises(ValueError, match="the server serves nothing: name one"):
        _models({"flowturbo"}, None)


def test_a_full_server_ends_the_run_with_its_words(glyphs_server: ServerAddress) -> None:
    tool = perf_analyzer.find_perf_analyzer()
    result = perf_analyzer.run(
        tool, glyphs_server.grpc, [entry([0], "P1")], Load(concurrency=80, requests=6)
    )
    assert result.answers == ()
    assert result.error is not None and "at most 64 are allowed" in result.error
    with pytest.raises(PerfAnalyzerError, match="perf_analyzer"):
        perf_analyzer.run(tool, "127.0.0.1:1", [entry([0], "P1")], Load(concurrency=1))


def test_no_process_listens_on_port_zero() -> None:
    assert listening_process(0) is None


@pytest.mark.parametrize("batch", [1, 4])
def test_rate_of_answers_that_come_in_batches(batch: int) -> None:
    """`batch` callers answered together every second, from 0 to 20 s; the window cuts into two."""
    answers = [Answer(k, k + 1.0, 2, "P1") for k in range(20) for _ in range(batch)]
    seen = tuple(a for a in answers if 0.3 <= a.end_s <= 19.7)
    assert Result(seen, (0.3, 19.7)).images_per_s() == pytest.approx(2 * batch)
    # Too short to leave out its ends: what was answered by the length.
    assert Result(seen[:batch], (0.0, 2.0)).images_per_s() == batch


def test_a_load_is_either_closed_or_open(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 1 and 2"):
        Load(concurrency=1, rate=2)
    intervals = tmp_path / "intervals"
    options = Load(rate=8, seconds=90).options(intervals)
    assert f"--request-intervals={intervals}" in options
    gaps_us = np.array(intervals.read_text().split(), dtype=float)
    assert len(gaps_us) == 8 * 90
    assert gaps_us.sum() == pytest.approx(90e6, rel=1e-4)
    assert gaps_us.std() == pytest.approx(gaps_us.mean(), rel=0.1)  # as exponential ones have


def test_fitted_line() -> None:
    points = [{"steps": n, "latency_ms": {"p50": 7 + 3.0 * n}} for n in (4, 8, 16)]
    line = load.fitted_line([p["steps"] for p in points], [p["latency_ms"]["p50"] for p in points])
    assert line["slope_ms"] == pytest.approx(3)
    assert line["intercept_ms"] == pytest.approx(7)
    assert line["largest_relative_error"] == pytest.approx(0, abs=1e-9)


def test_cache_is_filled_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "flowturbo"

    def half(folder: Path) -> None:
        (folder / "part").write_text("half")
        raise zipfile.BadZipFile("cut off")

    with pytest.raises(zipfile.BadZipFile):
        made_whole("tool", half)
    assert list(cache.iterdir()) == []
    assert made_whole("tool", lambda folder: (folder / "part").touch()) == cache / "tool"
    # A second time nothing is made.
    made_whole("tool", half)
    assert [path.name for path in cache.iterdir()] == ["tool"]
