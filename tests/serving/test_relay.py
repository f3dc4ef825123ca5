"""Streams on their way between two processes: everything arrives, and nothing hangs."""

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowturbo.errors import (
    CancelledError,
    FlowTurboError,
    RepositoryError,
    RequestError,
    UnavailableError,
)
from flowturbo.rows import Tensors
from flowturbo.serving import relay
from flowturbo.serving.endpoint import drain
from flowturbo.serving.outcomes import as_told
from flowturbo.serving.relay import Endpoint, Relay, Reply
from flowturbo.serving.service import Asked

WAIT_S = 20
IMAGES = np.arange(2 * 300 * 300 * 3, dtype=np.uint8).reshape(2, 300, 300, 3)  # above a buffer
ASKED = Asked({"label": np.array([1, 2]), "file": np.array([b"\0a"], object)}, ["image"], 60.0)


class Caller:
    """A caller; `got` has all that was sent to it, and whether that was the answer."""

    def __init__(self) -> None:
        self.got: queue.Queue[tuple[Any, bool]] = queue.Queue()
        self.left = False

    def response(self, result: Tensors | BaseException) -> Any:
        return result

    def preview(self, response: Any) -> None:
        self.got.put((response, False))

    def send(self, response: Any) -> None:
        self.got.put((response, True))

    def is_cancelled(self) -> bool:
        return self.left

    def answer(self) -> Any:
        result, final = self.got.get(timeout=WAIT_S)
        assert final and self.got.empty()
        return result


Handle = Callable[[Asked, Reply], None]


class Both:
    """The two ends. Each request goes to `handle`; `replies` has their senders."""

    def __init__(self, path: Path, handle: Handle) -> None:
        self.replies: queue.Queue[Reply] = queue.Queue()

        def take(asked: Asked, post: Callable[[bytes], None]) -> Reply:
            reply = Reply(post, as_told)
            handle(asked, reply)
            self.replies.put(reply)
            return reply

        self.released = threading.Event()
        self.endpoint = Endpoint(path, take, lambda: bool(self.released.wait(WAIT_S)))
        self.relay = Relay(path)

    def ask(self, asked: Asked = ASKED) -> Caller:
        caller = Caller()
        self.relay.start(asked, caller)
        return caller

    def close(self) -> None:
        self.relay.close()
        self.endpoint.close()


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Callable[[Handle], Both]]:
    made = []

    def make(handle: Handle) -> Both:
        made.append(Both(tmp_path / "private" / "socket", handle))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_previews_and_the_answer_arrive_in_order(both: Callable[[Handle], Both]) -> None:
    def handle(asked: Asked, reply: Reply) -> None:
        def work() -> None:
            for step in range(5):
                reply.preview(reply.response({"step": np.array([step]), "image": IMAGES + step}))
            reply.send(reply.response(dict(asked.tensors)))

        threading.Thread(target=work).start()

    caller = both(handle).ask()
    for step in range(5):
        shown, final = caller.got.get(timeout=WAIT_S)
        assert not final and shown["step"] == step
        np.testing.assert_array_equal(shown["image"], IMAGES + step)
    answer = caller.answer()
    assert {name: of.tolist() for name, of in answer.items()} == {"label": [1, 2], "file": [b"\0a"]}


@pytest.mark.parametrize(
    ("raised", "kind"), [(RequestError("no"), RequestError), (KeyError("no"), FlowTurboError)]
)
def test_errors_keep_their_kind(
    both: Callable[[Handle], Both], raised: Exception, kind: type[Exception]
) -> None:
    answer = both(lambda _, reply: reply.send(reply.response(raised))).ask().answer()
    assert type(answer) is kind and "no" in str(answer)


def test_many_at_once_get_their_own(both: Callable[[Handle], Both]) -> None:
    made = both(lambda asked, reply: reply.send(dict(asked.tensors)))
    callers = [made.ask(Asked({"seed": np.array([k])}, ["seed"], 60.0)) for k in range(300)]
    assert [int(caller.answer()["seed"][0]) for caller in callers] == list(range(300))


def test_a_caller_that_leaves_is_seen(both: Callable[[Handle], Both]) -> None:
    made = both(lambda _, __: None)
    caller = made.ask()
    reply = made.replies.get(timeout=WAIT_S)
    assert not reply.is_cancelled()
    caller.left = True
    assert isinstance(caller.answer(), CancelledError)
    end = threading.Event()
    while not reply.is_cancelled():
        assert not end.wait(0.01)


def test_an_end_that_dies_or_hangs(
    both: Callable[[Handle], Both], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone = Relay(tmp_path / "nobody")
    caller = Caller()
    alone.start(ASKED, caller)
    assert isinstance(caller.answer(), UnavailableError)
    alone.close()
    monkeypatch.setattr(relay, "_LATE_S", 0.05)
    made = both(lambda _, __: None)
    answer = made.ask(Asked({}, [], 0.05)).answer()
    assert isinstance(answer, UnavailableError) and "does not answer" in str(answer)


def test_answers_are_delivered_before_the_end(tmp_path: Path) -> None:
    released = threading.Event()

    def handle(asked: Asked, reply: Reply) -> None:
        threading.Thread(target=lambda: (released.wait(), reply.send({"image": IMAGES}))).start()

    made = Both(tmp_path / "private" / "socket", handle)
    callers = [made.ask() for _ in range(10)]
    for _ in callers:
        made.replies.get(timeout=WAIT_S)
    released.set()
    made.close()
    assert all(caller.answer()["image"].shape == IMAGES.shape for caller in callers)
    assert not (tmp_path / "private").exists()


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    def replying(_: Asked, post: Callable[[bytes], None]) -> Reply:
        return Reply(post, as_told)

    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(RepositoryError, match="must be a folder of this user alone"):
        Endpoint(tmp_path / "open" / "socket", replying, lambda: None)
    with pytest.raises(RepositoryError, match="set TMPDIR"):
        Endpoint(
            tmp_path / ("x" * 120) / "socket", lambda _, post: Reply(post, as_told), lambda: None
        )


def test_a_drain_waits_until_all_requests_are_answered(both: Callable[[Handle], Both]) -> None:
    made, ended = both(lambda asked, reply: None), threading.Event()
    path = made.endpoint._path

    def ask() -> None:
        drain(path, lambda: False)
        ended.set()

    waiting = threading.Thread(target=ask)
    waiting.start()
    asked: list[bool] = []
    drain(path, lambda: len(asked) > 1 or bool(asked.append(True)))  # gives up
    assert not ended.is_set()
    made.released.set()
    waiting.join(WAIT_S)
    assert ended.is_set()


def test_a_drain_does_not_wait_where_nobody_listens(tmp_path: Path) -> None:
    drain(tmp_path / "socket", lambda: False)
