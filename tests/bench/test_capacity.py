"""The replica on paper, against closed forms."""

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from bench.capacity.block_times import BlockTimes, measure
from bench.capacity.plan import check, largest_load, plan
from bench.capacity.replica import Replica
from bench.capacity.simulation import closed_loop, open_loop
from flowturbo.contract import LABEL_ROLES, Role

ROWS = (1, 2, 4, 8, 16, 32, 64)
TIMES = BlockTimes(
    {
        Role.PREDICTOR: {rows: 5.0 + rows for rows in ROWS},
        Role.REFINER: {rows: 1.0 + 0.1 * rows for rows in ROWS},
        Role.DECODER: {rows: 2.0 + 2 * rows for rows in ROWS},
    },
    overhead_ms=0.5,
)


def one_call(ms: float, max_rows: int, max_inflight: int = 10_000, **settings: Any) -> Replica:
    """One call a request, which takes `ms` whatever the rows, with no overhead."""
    table = {Role.PREDICTOR: (ms,) * (max_rows + 1)}
    calls = ((Role.PREDICTOR, 1),)
    return Replica(calls, table, 0.0, max_rows, max_inflight, **settings)


@pytest.mark.parametrize(
    ("schedule", "scale", "predictor", "refiner", "rows"),
    [("H1P5R3", 1.5, 7, 3, 2), ("H1P5R3", 1.0, 7, 3, 1), ("H8", 3.0, 16, 0, 2)],
)
def test_lone_request(schedule: str, scale: float, predictor: int, refiner: int, rows: int) -> None:
    replica = Replica.of(TIMES, schedule, scale)
    want = predictor * (5 + rows) + refiner * (1 + 0.1 * rows) + 4
    want += 0.5 * (predictor + refiner + 1)
    assert replica.lone_ms() == pytest.approx(want)
    alone = closed_loop(replica, 1, requests=50)
    assert alone.mean_ms == pytest.approx(want)
    assert alone.p95_ms == pytest.approx(want)
    assert alone.images_per_s == pytest.approx(1e3 / want)
    assert alone.rows == rows
    rare = open_loop(replica, 1e-3, requests=50)
    assert (rare.p50_ms, rare.p95_ms) == (pytest.approx(want), pytest.approx(want))


def test_turns_bring_clients_into_step() -> None:
    """One model at a time, and most calls first: all of them make the predictor's calls together.

    Those of the refiner and the decoder may come in two halves, neither of which is the longer.
    """
    replica = Replica.of(TIMES, "H1P5R3", 1.5, turns=True)
    found = closed_loop(replica, 8)
    assert found.rows == pytest.approx(16, rel=0.01)
    most = 8e3 / (8 * replica.image_ms(8) + 11 * 0.5)
    assert 0.93 * most < found.images_per_s < 1.001 * most


def test_interpolation() -> None:
    table = BlockTimes({Role.PREDICTOR: {2: 4.0, 4: 8.0}}).table(Role.PREDICTOR, 4)
    assert table == (4.0, 4.0, 4.0, 6.0, 8.0)


def test_saturation_is_the_closed_form() -> None:
    """The predictor's batches are full; where the others' cost is linear, theirs need not be."""
    times = {model: dict(of_rows) for model, of_rows in TIMES.times_ms.items()}
    times[Role.REFINER] = {rows: 0.1 * rows for rows in ROWS}
    times[Role.DECODER] = {rows: 2.0 * rows for rows in ROWS}
    replica = Replica.of(BlockTimes(times))
    rate, images = replica.saturation()
    assert (rate, images) == (pytest.approx(32e3 / (7 * 69 + 3 * 6.4 + 64)), 32)
    crowd = closed_loop(replica, 64, requests=8000)
    assert crowd.images_per_s == pytest.approx(rate, rel=0.02)
    assert crowd.busy > 0.99
    flood = open_loop(replica, 3 * rate, requests=20_000)
    assert flood.images_per_s == pytest.approx(rate, rel=0.02)
    assert flood.refused == pytest.approx(2 / 3, abs=0.02)
    assert math.isinf(flood.p95_ms)


def test_saturation_is_a_bound() -> None:
    """Batches of refiner and decoder are not all full: somewhat less is made."""
    replica = Replica.of(TIMES)
    rate, _ = replica.saturation()
    assert rate == pytest.approx(32e3 / (7 * 69 + 3 * 7.4 + 66))
    assert 0.94 * rate < closed_loop(replica, 64).images_per_s < rate


def test_saturation_takes_the_best_batch() -> None:
    worse = {1: 1.0, 2: 1.0, 4: 1.0, 8: 8.0}
    times = BlockTimes({Role.PREDICTOR: worse}, 0.0)
    rate, images = Replica.of(times, "E1", 1.0, max_rows=8).saturation()
    assert (rate, images) == (4000.0, 4)


def test_devices_are_shared() -> None:
    """Two models that are always busy: the device makes the sum of their work, no more."""
    calls = ((Role.PREDICTOR, 1), (Role.REFINER, 1))
    table = {Role.PREDICTOR: (0.0, 6.0), Role.REFINER: (0.0, 4.0)}
    crowd = closed_loop(Replica(calls, table, 0.0, 1, 8), 8, requests=2000)
    assert crowd.images_per_s == pytest.approx(100.0, rel=0.005)
    assert crowd.mean_ms == pytest.approx(80.0, rel=0.02)  # Little's law


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_request_a_batch_is_m_d_1(load: float) -> None:
    """Pollaczek and Khinchine: the mean wait is load * D / (2 (1 - load))."""
    point = open_loop(one_call(10.0, max_rows=1), 1e3 * load / 10.0, requests=40_000, seed=1)
    assert point.mean_ms - 10.0 == pytest.approx(10.0 * load / (2 * (1 - load)), rel=0.05)
    assert point.busy == pytest.approx(load, rel=0.02)


@pytest.mark.parametrize("during", [0.5, 2.0, 8.0])
def test_constant_time_is_batch_service(during: float) -> None:
    """Every execution takes all who wait.

    Arrivals `during` one execution wait for half of it on average. With probability exp(-during)
    there are none. The next request is then served alone and at once.
    """
    point = open_loop(one_call(10.0, max_rows=64), 1e3 * during / 10.0, requests=40_000)
    size = during + math.exp(-during)
    assert point.rows == pytest.approx(size, rel=0.03)
    assert point.mean_ms == pytest.approx(10.0 + 5.0 * during / size, rel=0.03)
    assert point.busy == pytest.approx(during / size, rel=0.03)
    assert point.refused == 0


def test_gathering_merges_cohorts() -> None:
    """The requests of a batch go on together, with those that came meanwhile."""
    calls, table = ((Role.PREDICTOR, 1),) * 10, {Role.PREDICTOR: (20.0,) * 65}
    found = closed_loop(Replica(calls, table, 0.5), 8)
    assert found.rows == pytest.approx(8.0)
    assert found.images_per_s == pytest.approx(8e3 / (10 * 20.5), rel=0.01)


def test_admission() -> None:
    """Erlang's loss with one place: of requests at a load of 1, half are refused."""
    point = open_loop(one_call(10.0, max_rows=1, max_inflight=1), 100.0, requests=20_000)
    assert point.refused == pytest.approx(0.5, abs=0.02)
    assert point.mean_ms == pytest.approx(10.0)


def test_plan() -> None:
    replica = Replica.of(TIMES)
    found = plan(replica, 500.0, 1000.0, requests=1000)
    assert found.limit.p95_ms <= 500.0
    assert found.limit.load < found.saturation_per_s
    assert open_loop(replica, 1.05 * found.limit.load, 1000).p95_ms > 500.0
    assert found.gpus == math.ceil(1000.0 / found.limit.load)
    of_image = [point.busy / point.images_per_s for _, point in found.fleets]
    assert of_image == sorted(of_image)  # emptier batches cost more
    few, many = (plan(replica, 500.0, rate, requests=400).gpus for rate in (1.0, 2000.0))
    assert few == 1 and many and many > 10


def test_more_time_carries_more() -> None:
    replica = Replica.of(TIMES)
    tight, loose = (largest_load(replica, slo, 1000).load for slo in (150.0, 1000.0))
    assert tight < loose


def test_check() -> None:
    """The prediction of a curve that the simulation itself made is right, of half of it twice."""
    point = closed_loop(Replica.of(TIMES), 8)
    measured = {"schedule": "H1P5R3", "concurrency": 8, "images_per_s": point.images_per_s / 2}
    measured["latency_ms"] = {"p95": point.p95_ms}
    (found,) = check({"closed_loop": [measured], "open_loop": []}, lambda _: Replica.of(TIMES))
    assert (found.rate_error, found.p95_error) == (pytest.approx(1.0), pytest.approx(0.0))


def test_bad_input() -> None:
    replica = Replica.of(TIMES)
    with pytest.raises(ValueError, match=r"SLO of 60 ms .* the 62\.1 ms of a single request"):
        largest_load(replica, 60.0)
    with pytest.raises(ValueError, match="rate must be above 0 images/s, got -1"):
        plan(replica, 500.0, -1.0)
    with pytest.raises(ValueError, match="no point in closed_loop or open_loop"):
        check({"closed_loop": [{"error": "refused"}]}, lambda _: replica)
    with pytest.raises(ValueError, match="65 clients .* allowed are 1 to 64"):
        closed_loop(replica, 65)
    with pytest.raises(ValueError, match="max_rows is 1, an image needs 2"):
        Replica.of(TIMES, max_rows=1)
    with pytest.raises(ValueError, match="only up to 64 rows, 128 rows are needed"):
        Replica.of(TIMES, max_rows=128)
    with pytest.raises(ValueError, match="'unet': the models are predictor, refiner, decoder"):
        BlockTimes({"unet": {1: 1.0}})
    with pytest.raises(ValueError, match="no block times of predictor"):
        BlockTimes({Role.DECODER: {1: 1.0}})
    with pytest.raises(ValueError, match="-1.0 ms at 2 rows"):
        BlockTimes({Role.PREDICTOR: {2: -1.0}})


def test_reports_of_gpu_check(tmp_path: Path) -> None:
    blocks = [
        {"engine": engine, "precision": "bf16", "model": model, "rows": rows, "ms": ms * rows}
        for engine, ms in (("PyTorch", 2.0), ("TensorRT", 1.0))
        for model in LABEL_ROLES
        for rows in (2, 8)
    ]
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"blocks": blocks}))
    assert BlockTimes.read(path, "TensorRT").times_ms[Role.REFINER] == {2: 2.0, 8: 8.0}
    with pytest.raises(ValueError, match="PyTorch bf16, TensorRT bf16: name one"):
        BlockTimes.read(path)
    path.write_text('{"times_ms": {"predictor": [1]}}')
    with pytest.raises(ValueError, match=r"times_ms must be {model: {rows: ms}}"):
        BlockTimes.read(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="neither 'times_ms' nor"):
        BlockTimes.read(path)


def test_measured_models(glyphs_repository: Path) -> None:
    """By a clock on which the n-th evaluation takes n ms; the median leaves the first round out."""

    def ticks() -> Iterator[float]:
        now_s = 0.0
        for n in itertools.count(1):
            yield now_s
            now_s += n / 1e3
            yield now_s

    clock = partial(next, ticks())
    # Four rounds of two sizes of three models; these take up to 64 rows.
    times = measure(glyphs_repository, repetitions=3, sizes=(1, 16, 128), clock=clock)
    third = 2 * 6
    assert times == {
        model: {1: pytest.approx(third + k), 16: pytest.approx(third + 3 + k)}
        for k, model in enumerate(LABEL_ROLES, 1)
    }


def test_command(tmp_path: Path) -> None:
    """On the example of docs/sizing.md; its report can be read back as block times."""
    out = tmp_path / "plan.json"
    example = ROOT / "docs" / "sizing_example.json"
    asked = ("--slo-p95-ms", "300", "--rate", "20000", "--requests", "400")
    done = run("--times", example, *asked, "--json", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["plan"]
    assert f"20000 images/s: {found['gpus']} GPUs" in done.stdout
    assert found["limit"]["p95_ms"] <= 300
    # What does not depend on how much is simulated is as the page has it.
    assert done.stdout.splitlines()[0] in (ROOT / "docs" / "sizing.md").read_text()
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert BlockTimes.read(out) == BlockTimes.read(example)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--slo-p95-ms or --check is needed"),
        (("--slo-p95-ms", "20"), "the SLO of 20 ms is not above the 5"),
        (("--slo-p95-ms", "300", "--schedule", "R1"), "no velocity cached"),
    ],
)
def test_command_refuses(arguments: tuple[str, ...], message: str) -> None:
    done = run("--times", ROOT / "docs" / "sizing_example.json", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "bench.capacity", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
