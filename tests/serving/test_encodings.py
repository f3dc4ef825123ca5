"""Kept encodings of texts: each text is encoded once, also if requests come together."""

import threading
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from flowturbo.rows import Tensors
from flowturbo.serving.batcher import Batcher
from flowturbo.serving.encodings import Count, Encodings

pytestmark = pytest.mark.unit
MODEL, LONG_S = "sd3_text_encoder", 20.0


class Encoder:
    """A text encoder that doubles ids, and counts its rows; it can be held, or fail."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.hold = threading.Event()
        self.hold.set()
        self.entered = threading.Event()
        self.fails = 0

    def __call__(self, model: str, tensors: Tensors) -> tuple[np.ndarray, ...]:
        (ids,) = tensors.values()
        self.rows.append(len(ids))
        self.entered.set()
        assert self.hold.wait(LONG_S)
        if self.fails:
            self.fails -= 1
            raise RuntimeError("the encoder failed")
        return (2.0 * ids, ids.sum(1, keepdims=True))


class Run:
    """Requests under a batcher."""

    def __init__(self, limit: int = 1 << 20) -> None:
        self.encoder = Encoder()
        self.batcher = Batcher(self.encoder, {MODEL: 64}, shared=[MODEL])
        self.encodings = Encodings(limit, self.batcher.share)

    def ask(self, *texts: int) -> "Future[tuple[tuple[np.ndarray, ...], Count]]":
        """Encodes texts, each one a number."""
        answer: Future[Any] = Future()
        ids = np.array([[text, text + 1] for text in texts])

        async def evaluate(tensors: Tensors) -> tuple[np.ndarray, ...]:
            return await self.batcher.infer(MODEL, tensors)

        def done(result: Any) -> None:
            failed = isinstance(result, BaseException)
            (answer.set_exception if failed else answer.set_result)(result)

        self.batcher.start(self.encodings.infer(MODEL, {"input_ids_1": ids}, evaluate), done)
        return answer

    def get(self, *texts: int) -> Count:
        (doubled, sums), count = self.ask(*texts).result(LONG_S)
        assert doubled.tolist() == [[2 * text, 2 * text + 2] for text in texts]
        assert sums.tolist() == [[2 * text + 1] for text in texts]
        return count


def test_equal_texts_are_encoded_once() -> None:
    run = Run()
    assert run.get(1, 2) == Count(0, 2)
    assert run.get(2, 3, 1) == Count(2, 1)
    assert run.get(5, 5, 5) == Count(2, 1)  # texts of the same tokens within one request
    assert run.encoder.rows == [2, 1, 1]
    run.batcher.close()


def test_requests_that_come_together_share_one_call() -> None:
    run = Run()
    run.encoder.hold.clear()
    first = run.ask(1, 2)
    assert run.encoder.entered.wait(LONG_S)
    others = [run.ask(2, 1), run.ask(1), run.ask(1, 3)]
    run.encoder.hold.set()
    counts = [answer.result(LONG_S)[1] for answer in (first, *others)]
    assert counts == [Count(0, 2), Count(2, 0), Count(1, 0), Count(1, 1)]
    assert run.encoder.rows == [2, 1]
    run.batcher.close()


def test_who_waits_for_a_call_that_fails_makes_its_own() -> None:
    run = Run()
    run.encoder.hold.clear()
    run.encoder.fails = 1
    first = run.ask(1)
    assert run.encoder.entered.wait(LONG_S)
    others = [run.ask(1), run.ask(1)]
    run.encoder.hold.set()
    with pytest.raises(RuntimeError, match="the encoder failed"):
        first.result(LONG_S)
    assert [answer.result(LONG_S)[1] for answer in others] == [Count(0, 1), Count(1, 0)]
    assert run.encoder.rows == [1, 1]
    run.batcher.close()


def test_two_requests_that_wait_for_each_other_both_end() -> None:
    run = Run()
    run.encoder.hold.clear()
    answers = [run.ask(1, 2), run.ask(2, 1, 3), run.ask(3, 4, 1)]
    run.encoder.hold.set()
    for answer in answers:
        answer.result(LONG_S)
    assert sum(run.encoder.rows) == 4
    run.batcher.close()


def test_the_oldest_unused_text_is_dropped_first() -> None:
    """A text takes 24 bytes here: two numbers of 8 bytes, and their sum."""
    run = Run(limit=2 * 24)
    run.get(1)
    run.get(2)
    assert run.get(1) == Count(1, 0)
    assert run.get(3) == Count(0, 1)  # in place of 2
    assert run.get(1) == Count(1, 0)
    assert run.get(2) == Count(0, 1)
    run.batcher.close()


def test_pinned_texts_stay() -> None:
    run = Run(limit=24)
    run.encodings.pin(MODEL, {"input_ids_1": np.array([[0, 1]])})
    run.get(0)
    for text in (1, 2, 3, 4):
        run.get(text)
    assert run.get(0) == Count(1, 0)
    assert run.get(1) == Count(0, 1)
    run.batcher.close()


def test_a_text_that_is_too_large_is_answered_and_not_kept() -> None:
    run = Run(limit=20)
    assert run.get(1) == run.get(1) == Count(0, 1)
    run.batcher.close()


def test_new_texts_are_counted() -> None:
    """Those that are kept, pinned or just encoded for another request are not new."""
    run = Run()

    def new(*texts: int) -> int:
        return run.encodings.new(MODEL, {"input_ids_1": np.array([[t, t + 1] for t in texts])})

    assert new(1, 2, 2) == 2
    run.encodings.pin(MODEL, {"input_ids_1": np.array([[7, 8]])})
    assert new(7) == 1  # pinned, and not encoded yet
    run.get(1, 7)
    assert new(1, 2, 7) == 1
    run.encoder.entered.clear()
    run.encoder.hold.clear()
    coming = run.ask(2)
    assert run.encoder.entered.wait(LONG_S)
    assert new(1, 2, 3) == 1
    run.encoder.hold.set()
    coming.result(LONG_S)
    run.batcher.close()
