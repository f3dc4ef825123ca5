"""The orchestrator without Triton: its races, in milliseconds."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flowturbo.conditions.class_label import CLASS_NAME, LABEL, ClassLabel
from flowturbo.contract import (
    DECODER_OUTPUTS,
    IMAGE,
    LATENT,
    MAGNITUDE,
    PIPELINE,
    PIPELINES,
    SCHEDULE,
    SEED,
    SETTINGS,
    VELOCITY_NEXT,
    X_NEXT,
    Role,
    X,
    composed_tensors,
)
from flowturbo.errors import (
    BusyError,
    CancelledError,
    DeadlineError,
    FlowTurboError,
    RepositoryError,
    RequestError,
    UnavailableError,
)
from flowturbo.pipeline import UNKNOWN, ModelRecord, Pipeline
from flowturbo.rows import Tensors
from flowturbo.serving.service import Asked, Service
from flowturbo.settings import Settings

pytestmark = pytest.mark.unit

LONG_S = 30.0  # no test waits so long


def pipeline(name: str, classes: int = 3, side: int = 2, **of: Any) -> Pipeline:
    return Pipeline(
        name, ClassLabel(classes), (4, side, side), dict.fromkeys(Role, ModelRecord()), **of
    )


ONE = pipeline("one")
TWO = pipeline("two", classes=7, side=4)


class Networks:
    """Stands for Triton: adds one to x in each block, and remembers the rows of every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.hold = threading.Event()
        self.hold.set()
        self.entered = threading.Event()

    def __call__(
        self, model: str, tensors: Tensors, names: Sequence[str]
    ) -> tuple[np.ndarray, ...]:
        self.calls.append((model, len(next(iter(tensors.values())))))
        self.entered.set()
        assert self.hold.wait(LONG_S)
        if model.endswith("text_encoder"):
            return (np.zeros((len(tensors["ids"]), 1), np.float32),)
        if model.endswith("vae_decoder"):
            latent = tensors[LATENT]
            answer = {
                IMAGE: np.zeros((len(latent), 2, 2, 3), np.uint8),
                MAGNITUDE: np.ones((len(latent), 1), np.float32),
            }
            assert list(names) == [spec.name for spec in DECODER_OUTPUTS]
        else:
            answer = {X_NEXT: tensors[X] + 1, VELOCITY_NEXT: np.zeros_like(tensors[X])}
        return tuple(answer[name] for name in names)


class Reply:
    """A caller's way back: takes one answer, and no question after it."""

    def __init__(self) -> None:
        self.answer: Future[Any] = Future()
        self.gone = False
        self.fails = False

    def response(self, result: Tensors | BaseException) -> Any:
        if self.fails and not isinstance(result, BaseException):
            raise MemoryError("no room for the answer")
        return result

    def send(self, response: Any) -> None:
        self.answer.set_result(response)  # raises for a second answer

    def is_cancelled(self) -> bool:
        assert not self.answer.done(), "asked after the answer"
        return self.gone

    def get(self) -> Any:
        return self.answer.result(LONG_S)


class Counts:
    """The metrics that are counted."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.rows: Counter[str] = Counter()
        self.together: dict[str, int] = {}
        self.texts: Counter[str] = Counter()

    def encoded(self, pipeline: str, hits: int, misses: int) -> None:
        self.texts.update(hit=hits, miss=misses)

    def inflight(self, pipeline: str, count: int) -> None:
        self.together[pipeline] = count

    def executed(self, pipeline: str, rows: Mapping[str, int]) -> None:
        self.rows.update(rows)

    def planned(self, left_s: float, blocks: Mapping[tuple[str, int], float]) -> None:
        assert left_s >= 0

    def finished(self, pipeline: str, outcome: str, seconds: float) -> None:
        assert seconds >= 0
        self.outcomes[pipeline, outcome] += 1


class Bench:
    """A service with stand-ins around it."""

    def __init__(self, check: Callable[[], None], settings: Settings, *served: Pipeline) -> None:
        self.networks, self.counts = Networks(), Counts()
        pipelines = {each.name: each for each in served}
        self.service = Service(pipelines, settings, self.networks, self.counts, check)

    def ask(
        self,
        *wanted: str,
        timeout_s: float = LONG_S,
        reply: Reply | None = None,
        images: int = 1,
        **tensors: Any,
    ) -> Reply:
        reply = reply or Reply()
        given = {LABEL: np.zeros(images, np.int64), SCHEDULE: "E4"} | tensors
        arrays = {
            name: np.array([value.encode()], object) if isinstance(value, str) else value
            for name, value in given.items()
            if value is not None
        }
        asked = Asked(arrays, wanted or (LATENT,), timeout_s)
        self.service.handle(reply, lambda: asked)
        return reply

    def wait_entered(self) -> None:
        """Until a network is called."""
        assert self.networks.entered.wait(LONG_S)

    def wait_queued(self, calls: int) -> None:
        """Until so many calls wait for the device."""
        (device,) = set(self.service._batcher._devices.values())
        end = time.monotonic() + LONG_S
        while len(device.waiting) < calls:
            assert time.monotonic() < end
            time.sleep(0.001)


@contextmanager
def serving(
    *served: Pipeline, check: Callable[[], None] = lambda: None, **settings: Any
) -> Iterator[Bench]:
    bench = Bench(check, Settings(**{"max_inflight": 8} | settings), *(served or (ONE,)))
    try:
        yield bench
    finally:
        bench.networks.hold.set()
        bench.service.close()
    assert set(bench.counts.together.values()) <= {0}


def test_one_answer_to_one_request() -> None:
    with serving() as bench:
        found = bench.ask(LATENT, SEED, CLASS_NAME, SETTINGS, seed=np.array([5])).get()
    assert list(found) == [LATENT, SEED, CLASS_NAME, SETTINGS]
    assert json.loads(found[SETTINGS][0])["schedule"] == "E4"
    # Four blocks, each of two rows; the decoder was not asked for.
    assert bench.networks.calls == [("one_velocity_predictor", 2)] * 4
    assert bench.counts.outcomes == {("one", "ok"): 1}
    assert bench.counts.rows == {"one_velocity_predictor": 8}


def test_a_deadline_is_held_whatever_the_worker_waits_for() -> None:
    with serving() as bench:
        bench.networks.hold.clear()
        reply = bench.ask(timeout_s=0.02)
        assert isinstance(reply.get(), DeadlineError)
        bench.networks.hold.set()
    assert len(bench.networks.calls) == 1  # it stopped at its next call
    assert bench.counts.outcomes == {("one", "deadline"): 1}


def test_deadline_against_finish_gives_one_answer() -> None:
    """Deadlines that fall anywhere within the work: no request is answered twice, or never."""
    with serving(max_inflight=64) as bench:
        replies = [bench.ask(timeout_s=0.0002 * k) for k in range(1, 60)]
        outcomes = [reply.get() for reply in replies]
    kinds = Counter("ok" if isinstance(each, dict) else type(each).__name__ for each in outcomes)
    assert set(kinds) <= {"ok", "DeadlineError", "BusyError"}
    assert bench.counts.outcomes["one", "ok"] == kinds["ok"]
    assert bench.counts.outcomes["one", "deadline"] == kinds["DeadlineError"]


def test_a_caller_that_goes_ends_its_request() -> None:
    with serving() as bench:
        bench.networks.hold.clear()
        reply = bench.ask(schedule="E200")
        assert bench.networks.entered.wait(LONG_S)
        reply.gone = True
        bench.networks.hold.set()
        end = time.monotonic() + LONG_S
        while not reply.answer.done():
            assert time.monotonic() < end
            time.sleep(0.001)
        # 200 calls of this network take a few ms: it may be done before anybody asks.
        found = reply.get()
    assert isinstance(found, CancelledError | dict)


def test_cancel_against_answer_never_asks_after_the_answer() -> None:
    """`Reply.is_cancelled` asserts it, on the thread of a worker."""
    with serving(max_inflight=64) as bench:
        replies = [bench.ask(schedule="E40") for _ in range(30)]
        assert all(isinstance(reply.get(), dict) for reply in replies)


def test_admission() -> None:
    with serving(max_inflight=2) as bench:
        bench.networks.hold.clear()
        first, second = bench.ask(), bench.ask()
        refused = bench.ask()
        assert isinstance(refused.get(), BusyError)
        assert "2 requests in flight, at most 2" in str(refused.get())
        bench.networks.hold.set()
        assert isinstance(first.get(), dict) and isinstance(second.get(), dict)
        # The place was free before the answer was out.
        assert isinstance(bench.ask().get(), dict)
    assert bench.counts.outcomes == {("one", "ok"): 3, ("one", "busy"): 1}


def test_shutdown_while_starting() -> None:
    """The models are still being checked: what was admitted is answered, what comes is refused."""
    checking, go_on = threading.Event(), threading.Event()

    def check() -> None:
        checking.set()
        assert go_on.wait(LONG_S)

    with serving(check=check) as bench, ThreadPoolExecutor(1) as pool:
        admitted = bench.ask()
        assert checking.wait(LONG_S)
        closing = pool.submit(bench.service.close)
        while not isinstance(late := bench.ask(timeout_s=0.5).get(), UnavailableError):
            assert isinstance(late, DeadlineError)  # it came before the service knew
        go_on.set()
        assert isinstance(admitted.get(), dict)
        closing.result(LONG_S)
        bench.service.close = lambda: None  # type: ignore[method-assign]


def test_no_answer_before_the_models_are_checked() -> None:
    def check() -> None:
        raise FlowTurboError("the refiner is off")

    with serving(check=check) as bench:
        assert "the refiner is off" in str(bench.ask().get())
    assert bench.networks.calls == []


def test_an_answer_that_cannot_be_made_is_an_error() -> None:
    reply = Reply()
    reply.fails = True
    with serving() as bench:
        assert isinstance(bench.ask(reply=reply).get(), MemoryError)
    assert bench.counts.outcomes == {("one", "unavailable"): 1}


def test_a_failed_call_reaches_every_request_of_its_batch() -> None:
    with serving() as bench:
        bench.networks.__class__ = type("Broken", (Networks,), {"__call__": _broken})
        replies = [bench.ask() for _ in range(3)]
        assert all("broken pipe" in str(reply.get()) for reply in replies)
    assert bench.counts.outcomes == {("one", "error"): 3}


def _broken(self: Networks, model: str, tensors: Tensors, names: Sequence[str]) -> Any:
    raise FlowTurboError(f"{model}: broken pipe")


def test_refused_by_name() -> None:
    with serving(ONE, TWO, default_pipeline="one") as bench:
        unknown = bench.ask(pipeline="three").get()
        assert str(unknown) == "pipeline 'three' is unknown, known are one, two"
        unfit = bench.ask(label=np.array([5])).get()
        assert str(unfit) == "label must be 0 to 2, got 5"
        assert isinstance(bench.ask(label=np.array([5]), pipeline="two").get(), dict)
        noise = np.zeros((1, 4, 2, 2), np.float32)
        shape = bench.ask(pipeline="two", initial_noise=noise).get()
        assert "initial_noise must have shape [n, 4, 4, 4]" in str(shape)
        assert all(isinstance(error, RequestError) for error in (unknown, unfit, shape))
    assert bench.counts.outcomes == {
        (UNKNOWN, "invalid"): 1,
        ("one", "invalid"): 1,
        ("two", "invalid"): 1,
        ("two", "ok"): 1,
    }


def test_what_is_served_needs_no_input() -> None:
    with serving(ONE, TWO, default_pipeline="two") as bench:
        reply = Reply()
        bench.service.handle(reply, lambda: Asked({}, [PIPELINES]))
        found = json.loads(reply.get()[PIPELINES][0])
        both = bench.ask(LATENT, PIPELINES).get()
        given = bench.ask(PIPELINES).get()
        assert str(given) == "a request for pipelines alone takes no input, got label, schedule"
    assert [each["name"] for each in found] == ["one", "two"]
    assert found[1]["condition"]["num_classes"] == 7
    assert json.loads(both[PIPELINES][0]) == found and both[LATENT].shape == (1, 4, 4, 4)


def test_a_default_pipeline_is_needed_among_several() -> None:
    with pytest.raises(RepositoryError, match="default_pipeline must name one of one, two"):
        Bench(lambda: None, Settings(), ONE, TWO)
    with pytest.raises(RepositoryError, match="'three' is not installed; installed: one"):
        Bench(lambda: None, Settings(default_pipeline="three"), ONE)


def test_two_pipelines_share_the_device_and_each_its_batches() -> None:
    """Many requests of one and few of another: rows of each together, neither starves."""
    with serving(ONE, TWO, default_pipeline="one", max_inflight=64) as bench:
        bench.networks.hold.clear()
        first = bench.ask(schedule="E1")
        assert bench.networks.entered.wait(LONG_S)
        crowd = [bench.ask(schedule="E20") for _ in range(12)]
        few = [bench.ask(schedule="E20", pipeline=TWO.name) for _ in range(3)]
        bench.wait_queued(15)
        bench.networks.hold.set()
        for reply in (first, *crowd, *few):
            assert isinstance(reply.get(), dict)
    one, two = (each.model(Role.PREDICTOR) for each in (ONE, TWO))
    calls = bench.networks.calls[1:]
    # Two rows per request, all requests of a pipeline in each batch.
    assert set(calls) == {(one, 24), (two, 6)}
    assert Counter(calls) == {(one, 24): 20, (two, 6): 20}
    # The few wait for eight turns at most, and for the one before they came.
    longest, run = 0, 0
    for model, _ in calls[: len(calls) - [*reversed(calls)].index((two, 6))]:
        run = run + 1 if model == one else 0
        longest = max(longest, run)
    assert longest <= 9


def test_inputs_of_the_blocks_are_the_contracts() -> None:
    inputs, _ = composed_tensors(Role.PREDICTOR, ONE.condition.block_inputs)
    assert [spec.name for spec in inputs] == ["x", "velocity", "scalars", "pair", "label"]
    assert PIPELINE == "pipeline"


class Titled(ClassLabel):
    """Classes whose names a text encoder reads."""

    def texts(self, value: np.ndarray) -> Tensors:
        return {"ids": np.unique(value)[:, None]}

    async def encode(self, value: np.ndarray, infer: Any = None, *, guided: bool) -> Any:
        await infer(Role.TEXT_ENCODER, self.texts(value))
        return await super().encode(value, guided=guided)


def test_texts_are_planned_once() -> None:
    """The work of a request has its new texts, until they are there."""
    titled = replace(ONE, condition=Titled(3))
    encoder = titled.model(Role.TEXT_ENCODER)

    def planned(bench: Bench) -> list[float | None]:
        with bench.service._batcher.planning() as scheduler:
            return [work.left.get(encoder) for work in scheduler._taken]

    with serving(titled) as bench:
        bench.networks.hold.clear()
        first = bench.ask(label=np.array([0, 1]))
        bench.wait_entered()
        second = bench.ask(label=np.array([1, 2]))  # 1 is on its way
        assert sorted(map(float, filter(None, planned(bench)))) == [1, 2]
        bench.networks.hold.set()
        assert first.get().keys() == second.get().keys()
        bench.networks.hold.clear()
        bench.networks.entered.clear()
        third = bench.ask(label=np.array([0, 2]))
        bench.wait_entered()
        assert planned(bench) == [None]
        bench.networks.hold.set()
        third.get()
        assert bench.counts.texts == {"miss": 3, "hit": 3}
