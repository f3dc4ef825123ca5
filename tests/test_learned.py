"""A fitted solver in one execution of the predictor's block."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flowturbo_client import FlowTurboClient
from support import Caller
from threadpoolctl import threadpool_info
from tritonclient.utils import InferenceServerException

from bench.observe import Work, observing
from flowturbo.contract import Role
from flowturbo.errors import RequestError
from flowturbo.learned import OwnSolvers, in_one_execution, learned_program, solver_rows
from flowturbo.local import LocalPipeline
from flowturbo.pipeline import Pipeline, read_pipeline
from flowturbo.request import parse_request
from flowturbo.rows import Tensors
from flowturbo.runtimes import ONE_NUMPY_THREAD
from flowturbo.serving.batcher import Batcher
from flowturbo.serving.tritonserver import ServerAddress
from flowturbo.settings import Settings
from flowturbo.solver.operator import Operator
from flowturbo.solver.schedule import Schedule
from flowturbo.solvers import Solvers


@pytest.fixture(scope="module")
def glyphs(glyphs_repository: Path) -> Pipeline:
    return read_pipeline(glyphs_repository, "glyphs")


@pytest.fixture
def client(glyphs_server: ServerAddress) -> Iterator[FlowTurboClient]:
    with FlowTurboClient(glyphs_server.grpc) as connected:
        yield connected


def fitted(pipeline: Pipeline) -> Solvers:
    assert pipeline.solvers
    return pipeline.solvers


@pytest.mark.parametrize("scale", [1.0, 1.3, 3.0])
def test_alone_one_execution_with_the_same_latents(
    client: FlowTurboClient, glyphs_server: ServerAddress, scale: float
) -> None:
    """To the last bit; in company it is a call per step."""

    def made() -> tuple[np.ndarray, Work]:
        with observing(glyphs_server.grpc, "glyphs") as observer:
            latents = client.generate(
                [3, 4], [1, 2], "L4", guidance_scale=scale, outputs=("latent",)
            ).latents
        assert latents is not None
        return latents, observer.observation.models[Role.PREDICTOR]

    time.sleep(1.1)  # after company, requests are gathered for a while
    alone, at_once = made()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda seed: client.generate(3, seed, "H20"), range(2)))
    after_company, called = made()
    rows = 2 if scale == 1 else 4
    assert (at_once.calls, at_once.executions, at_once.rows) == (1, 1, rows)
    assert (called.calls, called.executions, called.rows) == (4, 4, 4 * rows)
    np.testing.assert_array_equal(alone, after_company)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"schedule": "H1P3Z1@3"}, False),
        ({"seed": np.arange(8), "label": np.arange(8)}, True),
        ({"image": np.zeros((1, 64, 64, 3), np.uint8), "mask": np.full((1, 64, 64), 255, np.uint8)},
         False),
    ],
)  # fmt: skip
def test_what_can_run_in_one_execution(
    glyphs: Pipeline, changes: dict[str, Any], expected: bool
) -> None:
    given = {"label": np.array([3]), "seed": np.array([1]), "schedule": "L4", **changes}
    given["schedule"] = np.array([given["schedule"].encode()], object)
    request = parse_request(given, ["image"], glyphs, Settings())
    assert in_one_execution(request, glyphs, 0.1) == expected
    assert not in_one_execution(request, glyphs, 0.0)  # nobody knows how long
    assert not in_one_execution(request, glyphs, 0.11)
    models = {role: replace(of, engine="tensorrt") for role, of in glyphs.models.items()}
    assert not in_one_execution(request, replace(glyphs, models=models), 0.1)


def test_a_scale_is_the_same_everywhere(glyphs: Pipeline) -> None:
    """A default comes as a Python number, a request's own scale as float32."""
    schedule = Schedule.parse("L4")
    found = [learned_program(schedule, fitted(glyphs), s) for s in (1.3, float(np.float32(1.3)))]
    assert found[0] is found[1]


def test_only_rows_of_one_solver_share_an_execution(glyphs: Pipeline) -> None:
    """Requests that each was alone may still wait together."""
    batches: list[np.ndarray] = []
    all_wait, ended = threading.Event(), threading.Semaphore(0)

    def call(model: str, tensors: Tensors) -> tuple[np.ndarray, ...]:
        assert all_wait.wait(10)
        batches.append(np.unique(tensors["solver"], axis=0))
        return (tensors["x"],)

    batcher = Batcher(call, {"block": 8})
    scales = (3.0, 1.5, 3.0, 3.0)
    for scale in scales:
        tensors = block_tensors(solver_rows(fitted(glyphs), 4, scale, 2))
        batcher.start(batcher.infer("block", tensors), lambda _: ended.release())
    all_wait.set()
    for _ in scales:
        assert ended.acquire(timeout=10)
    batcher.close()
    assert 2 <= len(batches) < len(scales)
    assert all(len(solvers) == 1 for solvers in batches)


def block_tensors(solver: np.ndarray) -> Tensors:
    chance = np.random.default_rng(0)
    return {
        "x": chance.standard_normal((2, 4, 16, 16), np.float32),
        "velocity": np.zeros((2, 4, 16, 16), np.float32),
        "scalars": np.zeros((2, 5), np.float32),
        "pair": np.array([[1], [-1]], np.int32),
        "label": np.array([[3], [36]]),
        "solver": solver,
    }


def test_a_block_refuses_what_it_cannot_run(glyphs: Pipeline, glyphs_server: ServerAddress) -> None:
    good = solver_rows(fitted(glyphs), 4, 3.0, 2)
    other = good + np.array([[0, 0, 1]], np.float32)
    with Caller(glyphs_server.grpc) as caller:

        def run(solver: np.ndarray, role: Role = Role.PREDICTOR) -> list[np.ndarray]:
            return caller.infer(glyphs.model(role), ["x_next"], **block_tensors(solver))

        assert np.isfinite(run(good)[0]).all()
        for solver, said in (
            (other, "solvers that this model does not have"),
            (np.stack([good[0], other[0]]), "must be finite and the same in all rows"),
            (good * np.array([[3.5, 1, 1]], np.float32), "evaluations of .*, got 14"),
            (good * np.array([[0.6, 1, 1]], np.float32), "evaluations of .*, got 2.4"),
            (good * np.array([[1, np.nan, 1]], np.float32), "must be finite"),
            (good * np.array([[1, 2, 1]], np.float32), "fitted for guidance scales 1 to 4, got 6"),
        ):
            with pytest.raises(InferenceServerException, match=said):
                run(solver)
        with pytest.raises(InferenceServerException, match="does not have"):
            run(good, Role.REFINER)


def test_solvers_are_read_anew_where_others_are_named(glyphs: Pipeline) -> None:
    """Those of a later fit, after the orchestrator alone was started again."""
    first = fitted(glyphs)
    second = Solvers(first.flow, first.latent_shape, first.fits[:-1])
    files = [first, second, second]
    own = OwnSolvers(lambda: files.pop(0))

    def run(solvers: Solvers) -> None:
        own.run(block_tensors(solver_rows(solvers, 4, 3.0, 2)), lambda of: (of["x"], of["x"]))

    for solvers, left in ((first, 2), (first, 2), (second, 1), (second, 1)):
        run(solvers)
        assert len(files) == left
    with pytest.raises(RequestError, match="start the server again"):
        run(first)


def blas_threads() -> list[int]:
    found = [each for each in threadpool_info() if "numpy" in each["filepath"]]
    return [each["num_threads"] for each in found]


def test_one_thread_for_products_of_numpy(
    glyphs_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, during = blas_threads(), []
    assert before
    first, second = ExitStack(), ExitStack()
    for each in (first, second):  # as two threads that overlap
        each.enter_context(ONE_NUMPY_THREAD)
    first.close()
    assert set(blas_threads()) == {1}
    second.close()
    assert blas_threads() == before
    usual = Operator.__call__

    def noted(self: Operator, *states: Any) -> np.ndarray:
        during.append(blas_threads())
        return usual(self, *states)

    monkeypatch.setattr(Operator, "__call__", noted)
    LocalPipeline(glyphs_repository, "glyphs").generate(3, 1, "L4")
    assert [set(each) for each in during] == [{1}] * 4
    assert blas_threads() == before
