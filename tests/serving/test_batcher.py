"""Calls are joined and split rightly, stay together, and fail together."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flowturbo.rows import Tensors
from flowturbo.serving.batcher import Batcher, Outputs
from flowturbo.serving.scheduling import MAX_SKIPPED

pytestmark = pytest.mark.unit

PATIENCE_S = 60


class Engine:
    """Doubles its input; remembers the models called and how many rows each call had.

    Call number `held`, from 0, and all after it wait until `go_on`. `together` calls wait for each
    other. So as many run at a time.
    """

    def __init__(self, held: int | None = None, together: int = 1) -> None:
        self.calls: list[tuple[str, int]] = []
        self.running = self.most_running = 0
        self._held, self._together = held, together
        self._holding, self._free = threading.Event(), threading.Event()
        self._met = threading.Event()
        self._lock = threading.Lock()

    def wait_until_held(self) -> None:
        assert self._holding.wait(PATIENCE_S)

    def go_on(self) -> None:
        self._free.set()

    @property
    def rows(self) -> list[int]:
        return [rows for _, rows in self.calls]

    def __call__(self, model: str, tensors: Tensors) -> Outputs:
        if np.isnan(tensors["x"]).any():
            raise FloatingPointError("NaN")
        with self._lock:
            self.calls.append((model, len(tensors["x"])))
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            if self.running == self._together:
                self._met.set()
            held = self._held is not None and len(self.calls) > self._held
        assert self._met.wait(PATIENCE_S)
        if held:
            self._holding.set()
            assert self._free.wait(PATIENCE_S)
        with self._lock:
            self.running -= 1
        return (tensors["x"] * 2, tensors["y"] + 1)


class Crowd:
    """Requests of a batcher, and what came of them."""

    def __init__(
        self,
        engine: Engine,
        models: tuple[str, ...] | dict[str, int],
        max_rows: int = 16,
        **options: Any,
    ) -> None:
        """`models`, each of at most so many rows in a batch."""
        most = models if isinstance(models, dict) else dict.fromkeys(models, max_rows)
        self.batcher = Batcher(engine, most, **options)
        self._done: queue.Queue[tuple[int, Any]] = queue.Queue()
        self._started = 0

    def start(self, value: float, rows: int, *models: str) -> None:
        """A request that calls `models` in turn."""

        async def request() -> np.ndarray:
            x = np.full((rows, 3), value)
            for model in models:
                x, y = await self.batcher.infer(model, {"x": x, "y": x})
                np.testing.assert_array_equal(y, x / 2 + 1)
            return x

        number = self._started
        self._started += 1
        self.batcher.start(request(), lambda result: self._done.put((number, result)))

    def results(self) -> list[Any]:
        """Of all requests, in the order of their start."""
        found = dict(self._done.get(timeout=PATIENCE_S) for _ in range(self._started))
        return [found[number] for number in range(self._started)]


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def crowd(engine: Engine) -> Iterator[Crowd]:
    made = Crowd(engine, ("model",))
    yield made
    made.batcher.close()


def test_each_request_gets_its_own_rows(crowd: Crowd, engine: Engine) -> None:
    for k in range(8):
        crowd.start(k + 1.0, k % 3 + 1, *["model"] * 6)
    for k, found in enumerate(crowd.results()):
        np.testing.assert_array_equal(found, np.full((k % 3 + 1, 3), (k + 1.0) * 64))
    assert max(engine.rows) <= 16


def test_requests_come_into_step_and_stay() -> None:
    """One that comes late shares every batch from its first call on."""
    engine = Engine(held=3)
    crowd = Crowd(engine, ("model",))
    crowd.start(1, 2, *["model"] * 30)
    engine.wait_until_held()
    crowd.start(1, 2, *["model"] * 5)
    engine.go_on()
    crowd.results()
    crowd.batcher.close()
    assert engine.rows.count(4) == 5
    assert engine.rows.count(2) == 25


def test_a_batch_is_no_larger_than_allowed() -> None:
    engine = Engine(held=0)
    crowd = Crowd(engine, ("model",), max_rows=4)
    crowd.start(1, 1, "model")
    engine.wait_until_held()
    for rows in (3, 2, 1, 4):
        crowd.start(1, rows, "model")
    engine.go_on()
    crowd.results()
    crowd.batcher.close()
    assert engine.rows == [1, 4, 2, 4]  # 3 and 1, which still fits; 2; 4


def test_each_model_has_its_own_most_rows() -> None:
    """Pipelines differ in the rows that their models take, also on one device."""
    engine = Engine(held=0)
    crowd = Crowd(engine, {"small": 2, "large": 8}, shared=("small", "large"))
    crowd.start(1, 1, "small")
    engine.wait_until_held()
    for model in ("small", "large") * 4:
        crowd.start(1, 1, model)
    engine.go_on()
    crowd.results()
    crowd.batcher.close()
    assert sorted(engine.calls[1:]) == [("large", 4), ("small", 2), ("small", 2)]


def test_models_that_are_not_shared_have_threads_of_their_own() -> None:
    """One of a pipeline on a GPU does not wait for those of a pipeline on the CPU."""
    engine = Engine(together=2)
    crowd = Crowd(engine, ("first", "second", "alone"), shared=("first", "second"))
    crowd.start(1, 1, *["first", "second"] * 5)
    crowd.start(1, 1, *["alone"] * 10)
    crowd.results()
    crowd.batcher.close()
    assert engine.most_running == 2


def test_failures_reach_their_requests_and_end_nothing(crowd: Crowd) -> None:
    crowd.start(float("nan"), 1, "model")
    assert isinstance(crowd.results()[0], FloatingPointError)
    crowd.start(1, 1, "model")
    np.testing.assert_array_equal(crowd._done.get(timeout=PATIENCE_S)[1], np.full((1, 3), 2.0))


def test_a_request_whose_end_cannot_be_told_ends_no_other(
    crowd: Crowd, caplog: pytest.LogCaptureFixture
) -> None:
    async def request() -> None:
        await crowd.batcher.infer("model", {"x": np.ones((1, 3)), "y": np.ones((1, 3))})

    def done(result: object) -> None:
        raise RuntimeError("can't start new thread")

    crowd.batcher.start(request(), done)
    crowd.start(1, 1, "model", "model")
    np.testing.assert_array_equal(crowd.results()[0], np.full((1, 3), 4.0))
    assert "completion callback failed" in caplog.text


def test_a_request_that_never_calls_is_done(crowd: Crowd) -> None:
    crowd.start(5, 1)
    np.testing.assert_array_equal(crowd.results()[0], np.full((1, 3), 5.0))


def test_free_instances_share_the_rows() -> None:
    """With two engines, two batches run at a time, each with half of what is queued."""
    engine = Engine(held=0, together=2)
    crowd = Crowd(engine, ("model",), instances=2)
    for k in range(2):
        crowd.start(k + 1.0, 1, "model")
    engine.wait_until_held()  # both are busy
    for k in range(2, 10):
        crowd.start(k + 1.0, 1, *["model"] * 10)
    engine.go_on()
    for k, found in enumerate(crowd.results()):
        calls = 1 if k < 2 else 10
        np.testing.assert_array_equal(found, np.full((1, 3), (k + 1.0) * 2**calls))
    crowd.batcher.close()
    assert sum(engine.rows) == 82
    assert engine.most_running == 2
    assert engine.rows[2] in (4, 8)  # half of them, or all where the other one was not free yet


@pytest.mark.parametrize("shared", [False, True])
def test_models_that_share_a_device_take_turns(shared: bool) -> None:
    """Without a device in common two run at a time: the first calls wait for each other."""
    engine = Engine(together=1 if shared else 2)
    models = ("first", "second")
    crowd = Crowd(engine, models, shared=models if shared else ())
    for k in range(6):
        crowd.start(k + 1.0, 1, *[("first", "second")[(n + k) % 2] for n in range(10)])
    for k, found in enumerate(crowd.results()):
        np.testing.assert_array_equal(found, np.full((1, 3), (k + 1.0) * 2**10))
    crowd.batcher.close()
    assert engine.most_running == (1 if shared else 2)


def test_most_calls_go_first_but_not_for_ever() -> None:
    """One request of the second model among three of the first, all of them there at once."""
    engine = Engine(held=0)
    crowd = Crowd(engine, ("first", "second"), shared=("first", "second"))
    crowd.start(1, 1, "first")
    engine.wait_until_held()
    crowd.start(1, 1, "second", "second")
    for _ in range(3):
        crowd.start(0, 1, *["first"] * 30)
    engine.go_on()
    crowd.results()
    crowd.batcher.close()
    order = [model for model, _ in engine.calls[1:]]
    turns = [k for k, model in enumerate(order) if model == "second"]
    assert turns == [MAX_SKIPPED, 2 * MAX_SKIPPED + 1]
