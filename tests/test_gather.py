"""Calls are joined and split rightly, wait for nobody needlessly, and fail together."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from flowturbo.guidance import Tensors
from flowturbo.serving.gather import MOST_PASSED_OVER, Gatherer, Outputs

CALL_S = 0.02


class Engine:
    """Doubles its input, slowly, one call at a time; remembers how many rows each call had."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, model: str, tensors: Tensors) -> Outputs:
        if np.isnan(tensors["x"]).any():
            raise FloatingPointError("NaN")
        self.rows.append(len(tensors["x"]))
        time.sleep(CALL_S)
        return (tensors["x"] * 2, tensors["y"] + 1)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def gather(engine: Engine) -> Gatherer:
    return Gatherer(engine, ("model",), max_rows=16, linger_s=0.5)


def run_request(gather: Gatherer, start: float, rows: int, calls: int) -> np.ndarray:
    x = np.full((rows, 3), start)
    with gather.request():
        for _ in range(calls):
            x, y = gather("model", {"x": x, "y": x})
            np.testing.assert_array_equal(y, x / 2 + 1)
    return x


def test_each_caller_gets_its_own_rows(gather: Gatherer, engine: Engine) -> None:
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(run_request, gather, k + 1.0, k % 3 + 1, 6) for k in range(8)]
        for k, job in enumerate(jobs):
            np.testing.assert_array_equal(job.result(), np.full((k % 3 + 1, 3), (k + 1.0) * 64))
    assert max(engine.rows) <= 16


def test_cohorts_merge(gather: Gatherer, engine: Engine) -> None:
    """Two requests out of step come into step, and stay in step while both run."""
    running = threading.Event()

    def late() -> None:
        running.wait(10)
        run_request(gather, 1, 2, 5)

    def early() -> None:
        with gather.request():
            for call in range(30):
                x = np.ones((2, 3))
                gather("model", {"x": x, "y": x})
                if call == 2:
                    running.set()

    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(late), pool.submit(early)]:
            job.result()
    assert engine.rows.count(4) == 5


def test_a_request_alone_waits_for_nobody(engine: Engine) -> None:
    gather = Gatherer(engine, ("model",), max_rows=16, linger_s=30)
    started = time.monotonic()
    run_request(gather, 1, 2, 5)
    assert time.monotonic() - started < 20


def test_a_slow_request_is_not_waited_for_without_end(engine: Engine) -> None:
    gather = Gatherer(engine, ("model",), max_rows=16, linger_s=0.01)
    inside, release = threading.Event(), threading.Event()

    def stuck() -> None:
        with gather.request():
            inside.set()
            release.wait(60)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(stuck)
        inside.wait(10)
        started = time.monotonic()
        run_request(gather, 1, 1, 3)
        assert time.monotonic() - started < 30
        release.set()
    assert engine.rows == [1, 1, 1]


def test_a_full_batch_waits_for_nobody(engine: Engine) -> None:
    """Nor does what does not fit in it, once the engine is free."""
    gather = Gatherer(engine, ("model",), max_rows=4, linger_s=30)
    with gather.request():  # one that never calls, and would be waited for
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(run_request, gather, 1.0, 2, 4) for _ in range(4)]
            for job in jobs:
                job.result(20)
    assert engine.rows == [4] * 8


def test_failures_reach_the_caller_and_end_nothing(gather: Gatherer) -> None:
    bad = np.full((1, 3), np.nan)
    with gather.request(), pytest.raises(FloatingPointError):
        gather("model", {"x": bad, "y": bad})
    assert run_request(gather, 1, 1, 1)[0, 0] == 2


def test_free_instances_share_the_rows() -> None:
    """With two engines, two batches run at a time, each with half of what is queued."""
    engine = Engine()
    gatherer = Gatherer(engine, ("model",), max_rows=16, linger_s=0.5, instances=2)
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(run_request, gatherer, k + 1.0, 1, 10) for k in range(8)]
        for k, job in enumerate(jobs):
            np.testing.assert_array_equal(job.result(), np.full((1, 3), (k + 1.0) * 2**10))
    elapsed = time.monotonic() - started
    assert sum(engine.rows) == 80
    assert len(engine.rows) * CALL_S > 1.4 * elapsed  # they ran side by side


def turn_taking(engine: Engine, order: list[str]) -> Gatherer:
    def call(model: str, tensors: Tensors) -> Outputs:
        order.append(model)
        return engine(model, tensors)

    return Gatherer(call, ("first", "second"), max_rows=16, linger_s=0.5, shared=True)


def test_models_that_share_a_device_take_turns() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def call(model: str, tensors: Tensors) -> Outputs:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(CALL_S / 4)
        with lock:
            running -= 1
        return (tensors["x"] * 2,)

    gather = Gatherer(call, ("first", "second"), max_rows=16, linger_s=0.01, shared=True)

    def request(start: float) -> np.ndarray:
        x = np.full((1, 3), start)
        with gather.request():
            for k in range(10):
                (x,) = gather(("first", "second")[k % 3 == 2], {"x": x})
        return x

    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(request, k + 1.0) for k in range(6)]
        for k, job in enumerate(jobs):
            np.testing.assert_array_equal(job.result(30), np.full((1, 3), (k + 1.0) * 2**10))
    assert most == 1


def test_most_calls_go_first_but_not_for_ever(engine: Engine) -> None:
    """One caller of the second model among three that never stop calling the first."""
    order: list[str] = []
    gather = turn_taking(engine, order)
    stop = threading.Event()
    x = {"x": np.ones((1, 3)), "y": np.ones((1, 3))}

    def crowd() -> None:
        with gather.request():
            while not stop.is_set():
                gather("first", x)

    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(crowd)
        while order.count("first") < 5:
            time.sleep(CALL_S)
        before = len(order)
        try:
            with gather.request():
                for _ in range(2):
                    gather("second", x)
        finally:
            stop.set()
    seconds = [k for k, model in enumerate(order) if model == "second"]
    gaps = np.diff([before, *seconds])
    assert len(seconds) == 2
    assert gaps.max() >= MOST_PASSED_OVER - 1
    assert gaps.max() <= MOST_PASSED_OVER + 3
