"""Two pipelines on one real server: glyphs, and one of other sizes and classes."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from flowturbo_client import FlowTurboClient, InvalidRequestError
from support import GLYPHS_EXPORT, GOLDEN_EXPORT, Caller, golden_cases, run_export

from bench.observe import read_work
from flowturbo import LocalPipeline
from flowturbo.contract import ORCHESTRATOR, Role
from flowturbo.pipeline import class_label, read_pipeline
from flowturbo.serving.tritonserver import ServerAddress, running_server

GLYPHS, SMALL = "glyphs", "small"


@dataclass(frozen=True)
class Served:
    repository: Path
    address: ServerAddress


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    repository = tmp_path_factory.mktemp("two") / "models"
    form = ("--runtime", "onnxruntime", "--precision", "fp32")
    for arguments in (
        (*GLYPHS_EXPORT, *form, "--ensemble", "H1P5R3"),
        (*GOLDEN_EXPORT, "--name", SMALL, "--ensemble", "H2"),
    ):
        done = run_export(*arguments, "--repository", repository)
        assert done.returncode == 0, done.stderr
    with running_server(repository) as address:
        yield Served(repository, address)


@pytest.fixture
def client(both: Served) -> Iterator[FlowTurboClient]:
    with FlowTurboClient(both.address.grpc) as connected:
        yield connected


def test_each_answers_as_it_does_alone(both: Served, client: FlowTurboClient) -> None:
    glyphs = LocalPipeline(both.repository)
    assert glyphs.pipeline.name == GLYPHS  # the first that was exported is the default
    want = glyphs.generate([1, 30], [3, 4], "H2P2R2")
    for pipeline in (None, GLYPHS):
        found = client.generate([1, 30], [3, 4], "H2P2R2", pipeline=pipeline)
        assert found.images is not None and want.image is not None
        assert np.abs(found.images.astype(int) - want.image).max() <= 1
        assert found.settings["pipeline"] == GLYPHS
        assert found.settings["guidance_scale"] == 3.0
    for case in golden_cases():
        small = client.generate(
            case.label,
            schedule=case.schedule,
            guidance_scale=case.guidance_scale,
            initial_noise=case.noise,
            outputs=("latent",),
            pipeline=SMALL,
        )
        np.testing.assert_allclose(small.latents, case.latent, atol=1e-4)


def test_what_is_served(both: Served, client: FlowTurboClient) -> None:
    found = {each["name"]: each for each in client.pipelines()}
    assert list(found) == [GLYPHS, SMALL]
    assert found[GLYPHS]["size"] == [64, 64] and found[SMALL]["size"] is None
    classes = class_label(read_pipeline(both.repository, SMALL)).num_classes
    assert found[SMALL]["condition"]["num_classes"] == classes != 36
    # Defaults are each pipeline's own, else the service's settings.
    scales = [each["default_guidance_scale"] for each in found.values()]
    assert scales == [3.0, 1.5]


def test_what_does_not_fit_is_refused_by_name(client: FlowTurboClient) -> None:
    with pytest.raises(InvalidRequestError, match="'sd35' is unknown, known are glyphs, small"):
        client.generate(1, pipeline="sd35")
    with pytest.raises(InvalidRequestError, match="label must be 0 to .*, got 35"):
        client.generate(35, outputs=("latent",), pipeline=SMALL)
    with pytest.raises(InvalidRequestError, match="pipeline small has no decoder"):
        client.generate(1, pipeline=SMALL)
    noise = np.zeros((1, 4, 16, 16), np.float32)
    with pytest.raises(InvalidRequestError, match=r"initial_noise must have shape \[n, 4, "):
        client.generate(1, initial_noise=noise, outputs=("latent",), pipeline=SMALL)
    with pytest.raises(InvalidRequestError, match="class_name 'A' is unknown"):
        client.generate("A", outputs=("latent",), pipeline=SMALL)


def test_mixed_load_shares_batches_within_each(both: Served) -> None:
    """Eight requests of one and four of the other at a time: neither starves the other."""
    predictors = {
        name: read_pipeline(both.repository, name).model(Role.PREDICTOR) for name in (GLYPHS, SMALL)
    }

    def work(name: str) -> tuple[int, int]:
        with triton.InferenceServerClient(both.address.grpc) as connected:
            found = read_work(connected, predictors[name])
        return found.executions, found.rows

    before = {name: work(name) for name in predictors}
    with Caller(both.address.grpc) as caller:
        begun = [
            caller.begin(
                ORCHESTRATOR, ["latent"], label=np.array([1]), schedule="E60", pipeline=name
            )
            for name, count in ((GLYPHS, 8), (SMALL, 4))
            for _ in range(count)
        ]
        for each in begun:
            each.result(120)
    for name, count in ((GLYPHS, 8), (SMALL, 4)):
        executions, rows = np.subtract(work(name), before[name])
        assert rows == 2 * 60 * count
        # All of a pipeline's requests would be 2 rows each; some come a few calls late.
        assert rows / executions > count


def test_metrics_by_pipeline(
    both: Served,
    client: FlowTurboClient,
    read_metrics: Callable[[ServerAddress], dict[str, float]],
) -> None:
    def count(name: str) -> float:
        of = f'pipeline="{name}"'
        return sum(
            value
            for key, value in read_metrics(both.address).items()
            if key.startswith("flowturbo_requests_total") and of in key and '"ok"' in key
        )

    before = {name: count(name) for name in (GLYPHS, SMALL)}
    client.generate(1, 2, "E2", outputs=("latent",))
    for _ in range(2):
        client.generate(1, 2, "E2", outputs=("latent",), pipeline=SMALL)
    assert [count(name) - before[name] for name in (GLYPHS, SMALL)] == [1, 2]


def test_a_running_server_notices_neither_an_export_nor_a_removal(
    both: Served, client: FlowTurboClient
) -> None:
    """It serves what it began with until it is started again."""
    want = client.generate(1, 2, "H2", outputs=("latent",), pipeline=SMALL).latents
    stop, failed = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            try:
                client.generate(1, 2, "H1", outputs=("latent",), pipeline=SMALL)
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        repository = both.repository
        done = run_export(*GOLDEN_EXPORT, "--name", "third", "--repository", repository)
        assert done.returncode == 0, done.stderr
        removed = run_export("remove", SMALL, "--repository", repository)
        assert removed.returncode == 0 and "removed small" in removed.stdout
    finally:
        stop.set()
        thread.join()
    assert not failed
    assert [each["name"] for each in client.pipelines()] == [GLYPHS, SMALL]
    again = client.generate(1, 2, "H2", outputs=("latent",), pipeline=SMALL).latents
    np.testing.assert_array_equal(again, want)
    with running_server(both.repository) as address, FlowTurboClient(address.grpc) as other:
        assert [each["name"] for each in other.pipelines()] == [GLYPHS, "third"]
        third = other.generate(1, 2, "H2", outputs=("latent",), pipeline="third").latents
        np.testing.assert_allclose(third, want, atol=1e-5)
