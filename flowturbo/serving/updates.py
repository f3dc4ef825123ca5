"""Collects updates of metrics and makes them later, on a thread of its own.

An update of one of Triton's metrics is a round trip to the server. It keeps Python's global lock
until the server answers, so all requests of the process wait.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Protocol

_EVERY_S = 0.1
_logger = logging.getLogger(__name__)


class Metric(Protocol):
    """One of Triton's metrics; a counter, a gauge or a histogram has one of these methods."""

    def increment(self, value: float) -> None: ...
    def set(self, value: float) -> None: ...
    def observe(self, value: float) -> None: ...


class Updates:
    """Updates that are made `every_s`, by one thread: counts together, gauges with the last value.

    Updating one metric from two threads at once crashes the server (seen on 24.10). An update that
    fails is logged, the others are made.
    """

    def __init__(self, every_s: float = _EVERY_S) -> None:
        self._every_s = every_s
        self._counts: Counter[Metric] = Counter()
        self._levels: dict[Metric, float] = {}
        self._others: list[Callable[[], object]] = []
        self._changed = threading.Condition()  # and the lock of these
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)
        self._thread.start()

    def count(self, metric: Metric, more: float) -> None:
        """Adds to a counter."""
        with self._changed:
            self._counts[metric] += more  # type: ignore[assignment]
            self._changed.notify()

    def level(self, metric: Metric, value: float) -> None:
        """States the value of a gauge."""
        with self._changed:
            self._levels[metric] = value
            self._changed.notify()

    def observe(self, metric: Metric, value: float) -> None:
        """Adds a value to a histogram."""
        self.run(partial(metric.observe, value))

    def run(self, update: Callable[[], object]) -> None:
        """Makes any update."""
        with self._changed:
            self._others.append(update)
            self._changed.notify()

    def close(self) -> None:
        """Makes the updates that are left, and ends the thread."""
        self._closed.set()
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed.is_set())
                if not self._waiting:
                    return
            self._closed.wait(self._every_s)
            for update in self._taken():
                try:
                    update()
                except Exception:
                    _logger.exception("a metric could not be updated")

    @property
    def _waiting(self) -> bool:
        return bool(self._counts or self._levels or self._others)

    def _taken(self) -> list[Callable[[], object]]:
        with self._changed:
            taken: list[Callable[[], object]] = [
                *(partial(metric.increment, more) for metric, more in self._counts.items()),
                *(partial(metric.set, value) for metric, value in self._levels.items()),
                *self._others,
            ]
            self._counts, self._levels, self._others = Counter(), {}, []
        return taken
