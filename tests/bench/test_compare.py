"""The baselines make the service's images, and the comparison says something of all of them."""

import math
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, run_export

from bench import compare, compare_report
from bench.baseline import TorchPipeline
from bench.closed_loop import Work, closed_loop, measured, torch_process
from bench.web import WebClient, running_web
from flowturbo import LocalPipeline
from flowturbo.errors import FlowTurboError, RequestError

GLYPHS = ROOT / "weights" / "glyphs"
LABELS, SEEDS = [0, 35], [3, 2**40]


@pytest.fixture(scope="module")
def torch_pipeline() -> TorchPipeline:
    return TorchPipeline(GLYPHS, threads=2)


@pytest.fixture(scope="module")
def fp32_pipeline(tmp_path_factory: pytest.TempPathFactory) -> LocalPipeline:
    repository = tmp_path_factory.mktemp("fp32") / "models"
    source = ("--predictor", GLYPHS / "predictor.safetensors")
    source += ("--refiner", GLYPHS / "refiner.safetensors", "--vae", GLYPHS / "vae")
    how = ("--precision", "fp32", "--runtime", "onnxruntime")
    done = run_export(*source, *how, "--repository", repository)
    assert done.returncode == 0, done.stderr
    return LocalPipeline(repository)


@pytest.fixture(scope="module")
def web() -> Iterator[WebClient]:
    with running_web(GLYPHS, threads=2) as port, WebClient(port, timeout_s=60) as client:
        yield client


def differences(found: np.ndarray, expected: np.ndarray | None) -> np.ndarray:
    assert expected is not None
    assert (found.dtype, found.shape) == (np.uint8, expected.shape)
    return np.abs(found.astype(int) - expected.astype(int))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("schedule", ["H4", "H1P5R3", "P6", "H2P4R2"])
def test_plain_sampler_is_the_program(
    torch_pipeline: TorchPipeline,
    fp32_pipeline: LocalPipeline,
    schedule: str,
    guidance_scale: float,
) -> None:
    found = torch_pipeline.generate(LABELS, SEEDS, schedule, guidance_scale)
    expected = fp32_pipeline.generate(LABELS, SEEDS, schedule, guidance_scale).image
    assert differences(found, expected).max() <= 2


def test_bf16_is_close(fp32_pipeline: LocalPipeline) -> None:
    found = TorchPipeline(GLYPHS, 2, precision="bf16").generate(LABELS, SEEDS, "H1P5R3", 3.0)
    expected = fp32_pipeline.generate(LABELS, SEEDS, "H1P5R3", 3.0).image
    assert 0 < differences(found, expected).mean() < 2


def test_web_server_answers_the_same_images(web: WebClient, torch_pipeline: TorchPipeline) -> None:
    expected = torch_pipeline.generate(LABELS, SEEDS, "H2P1R1", 3.0)
    for _ in range(2):  # the second over the same connection
        assert differences(web.generate(LABELS, SEEDS, "H2P1R1", 3.0), expected).max() <= 1


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (([0], [1], "H1E2", 3.0), "steps must be H, P or R, got E"),
        (([0, 1], [1], "H1", 3.0), "2 labels and 1 seeds"),
        (([36], [1], "H1", 3.0), "labels must be 0 to 35, got 36"),
        (([0], [-1], "H1", 3.0), "seeds must be"),
    ],
)
def test_web_server_refuses(
    web: WebClient, wanted: tuple[list[int], list[int], str, float], reason: str
) -> None:
    with pytest.raises(RequestError, match=reason):
        web.generate(*wanted)


@pytest.mark.parametrize("clients", [1, 4])
def test_a_known_rate(clients: int) -> None:
    """Every call takes 20 ms and makes two images: 100 images a second and client.

    Wherever the window lies among the calls: 0.5 s, from 3 and a half calls on.
    """
    spans = [(0.02 * k, 0.02 * (k + 1)) for k in range(40)] * clients
    found = measured(spans, 0.07, 0.57, images=2)
    assert found.images_per_s == pytest.approx(100 * clients)
    assert found.latencies_ms == pytest.approx([20] * len(found.latencies_ms))
    assert len(found.latencies_ms) == 26 * clients  # those that touch the window


@pytest.mark.parametrize("clients", [1, 4])
def test_every_client_of_a_closed_loop_calls(clients: int) -> None:
    """Once to warm up, and until the window ends."""
    callers: dict[int, int] = {}
    together = threading.Barrier(clients)

    def call() -> None:
        caller = threading.get_ident()
        callers[caller] = callers.get(caller, 0) + 1
        if callers[caller] == 1:
            together.wait(timeout=60)  # for the first call of every client

    found = closed_loop(call, clients, seconds=0.05)
    assert len(callers) == clients and sum(callers.values()) >= 2 * clients
    assert len(found.latencies_ms) >= clients and found.images_per_s > 0


def test_closed_loop_passes_errors_on() -> None:
    with pytest.raises(ZeroDivisionError):
        closed_loop(lambda: 1 // 0, 2, 0.1)


def test_process_reports_its_errors_and_ends() -> None:
    with torch_process(GLYPHS, 2, False, "fp32") as process:
        with pytest.raises(FlowTurboError, match="steps must be H, P or R, got A"):
            process.measure(Work("H1A1", 1, 3.0), 1, 0.1)
        assert process.measure(Work("H1", 2, 1.0), 1, 0.1).images_per_s > 0
    assert not multiprocessing.active_children()


def test_every_ratio_is_finite(glyphs_repository: Path, tmp_path: Path) -> None:
    report = compare.run(
        glyphs_repository,
        rounds=1,
        weights=GLYPHS,
        seconds=0.1,
        clients=2,
        batches=(2,),
        forms=[compare.Form(compiled=False, precision="bf16")],
    )
    cases = {row["case"] for row in report["summary"]}
    assert cases == {
        "H1P5R3, 2 images, 1 client",
        "H8, 2 images, 1 client",
        "H1P5R3, 1 image, 2 clients",
    }
    assert len(report["rounds"]) == len(report["summary"]) == 2 * len(cases)
    ratios = [row["ratio"][key] for row in report["summary"] for key in ("median", "min", "max")]
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios)
    assert report["settings"]["mean_difference_levels"] < 2  # whatever the repository's precision
    assert all(case in report["markdown"] for case in cases)
    compare_report.plot(report, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 10_000
