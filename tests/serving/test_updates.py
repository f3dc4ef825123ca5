"""Updates of metrics are collected; each metric stands for one of Triton's."""

import logging
import threading

import pytest

from flowturbo.serving.updates import Updates

pytestmark = pytest.mark.unit


class Metric:
    def __init__(self, *, broken: bool = False) -> None:
        self.made: list[tuple[str, float]] = []
        self.threads: set[int] = set()
        self._broken = broken

    def _make(self, kind: str, value: float) -> None:
        self.threads.add(threading.get_ident())
        if self._broken:
            raise RuntimeError("gone")
        self.made.append((kind, value))

    def increment(self, value: float) -> None:
        self._make("increment", value)

    def set(self, value: float) -> None:
        self._make("set", value)

    def observe(self, value: float) -> None:
        self._make("observe", value)


def test_updates_are_made_together_by_one_thread() -> None:
    updates = Updates(every_s=3600)  # closing makes what is left
    counter, gauge, histogram = Metric(), Metric(), Metric()
    for k in range(1, 4):
        updates.count(counter, k)
        updates.level(gauge, k)
        updates.observe(histogram, k)
    updates.run(lambda: gauge.set(9))
    assert counter.made == gauge.made == histogram.made == []
    updates.close()
    assert counter.made == [("increment", 6)]
    assert gauge.made == [("set", 3), ("set", 9)]
    assert histogram.made == [("observe", 1), ("observe", 2), ("observe", 3)]
    (thread,) = counter.threads | gauge.threads | histogram.threads
    assert thread != threading.get_ident()


def test_an_update_that_fails_is_logged_and_the_others_are_made(
    caplog: pytest.LogCaptureFixture,
) -> None:
    updates = Updates(every_s=0.01)
    broken, counter, made = Metric(broken=True), Metric(), threading.Event()
    with caplog.at_level(logging.ERROR):
        updates.count(broken, 1)
        updates.count(counter, 1)
        updates.run(made.set)
        assert made.wait(60)
        updates.count(counter, 2)  # the thread goes on
        updates.close()
    assert sum(value for _, value in counter.made) == 3
    assert "a metric could not be updated" in caplog.text


def test_closing_without_updates() -> None:
    Updates(every_s=3600).close()
