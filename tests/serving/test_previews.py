"""Which previews are sent, without a server."""

from typing import Any

import numpy as np
import pytest

from flowturbo.contract import FINAL, IMAGE, STEP
from flowturbo.errors import NotFiniteError
from flowturbo.rows import Tensors
from flowturbo.serving import previews
from flowturbo.serving.previews import Previews
from flowturbo.solver.sampler import run_sync

pytestmark = pytest.mark.unit

LATENT = np.zeros((1, 4, 2, 2), np.float32)


class Stage:
    """A decoder and a way back; `waiting` are the previews on their way."""

    def __init__(self, every: int, size: int = 10) -> None:
        self.size, self.decoded = size, 0
        self.sent: list[Tensors] = []
        self.waiting: list[tuple[Any, ...]] = []
        self.fails = self.overflows = False
        self.previews = Previews(
            every, self.decode, self.finish, lambda *task: self.waiting.append(task), self.send
        )

    async def decode(self, latent: np.ndarray) -> np.ndarray:
        self.decoded += 1
        if self.overflows:
            raise NotFiniteError("the image of image 1 of 1 is not finite")
        return np.zeros(self.size, np.uint8)

    def finish(self, made: Tensors) -> Tensors:
        return made

    def send(self, made: Tensors) -> None:
        if self.fails:
            raise RuntimeError("the caller has gone")
        self.sent.append(made)

    def show(self, *steps: int, deliver: bool = True) -> list[int]:
        for step in steps:
            run_sync(self.previews.show(step, LATENT))
            if deliver:
                self.deliver()
        return [int(each[STEP][0]) for each in self.sent]

    def deliver(self) -> None:
        while self.waiting:
            task, *arguments = self.waiting.pop(0)
            task(*arguments)


def test_every_so_many_steps() -> None:
    stage = Stage(3)
    assert stage.show(*range(1, 10)) == [3, 6, 9]
    assert all(not made[FINAL][0] and made[IMAGE].shape == (10,) for made in stage.sent)


def test_a_call_may_take_several_steps() -> None:
    assert Stage(2).show(1, 3, 7, 8) == [3, 7, 8]


def test_one_at_a_time() -> None:
    """While a preview is on its way no other is decoded."""
    stage = Stage(1)
    stage.show(1, 2, 3, deliver=False)
    assert stage.decoded == 1
    stage.deliver()
    assert stage.show(4) == [1, 4]


def test_bytes_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(previews, "MOST_BYTES", 35)
    stage = Stage(1, size=10)
    assert stage.show(*range(1, 9)) == [1, 2, 3]
    assert stage.decoded == 4


def test_a_preview_that_cannot_be_sent_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage(1)
    stage.fails = True
    assert stage.show(1) == []
    assert "a preview could not be sent" in caplog.text
    stage.fails = False
    assert stage.show(2) == [2]


def test_a_preview_that_is_not_finite_is_left_out() -> None:
    """An early state may be beyond the decoder's range, and the image not."""
    stage = Stage(1)
    stage.overflows = True
    assert stage.show(1) == []
    stage.overflows = False
    assert stage.show(2) == [2]
