"""Calls of many requests to one model, gathered into one batch a tick.

Triton's dynamic batcher starts whenever the engine is free, so that requests in a loop fall into
two cohorts: one waits while the other runs, and neither batch is ever full. Here a tick waits for
the requests that are just between two calls, a fraction of a millisecond, so that the cohorts
merge; a request alone has nobody to wait for and never does.

There is no thread of its own between a caller and the model, each of which costs a wake-up both
ways: of the callers that wait for a model one leads, which makes the call for all.
"""

import math
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from flowturbo.generate import Infer
from flowturbo.guidance import Tensors

Outputs = tuple[np.ndarray, ...]


@dataclass(eq=False)
class _Pending:
    """A call that waits. It wakes to lead, or with its outputs or the error there."""

    tensors: Tensors
    rows: int
    wake: threading.Event = field(default_factory=threading.Event)
    outputs: Outputs | None = None
    error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return self.outputs is not None or self.error is not None


@dataclass(eq=False)
class _Queue:
    """The calls that wait for one model, and how many of its instances are `free`."""

    free: int
    pending: deque[_Pending] = field(default_factory=deque)
    led: bool = False  # somebody gathers a batch just now

    def rows(self) -> int:
        return sum(pending.rows for pending in self.pending)


class Gatherer:
    """Runs `call(model, tensors)` on the joined rows of concurrent callers.

    A batch has at most `max_rows` rows and waits at most `linger_s` for requests that are between
    two calls. `instances` batches of one model run at a time, and those that are free share what is
    queued. An exception of `call` reaches every caller in the batch.
    """

    def __init__(
        self,
        call: Infer,
        models: tuple[str, ...],
        max_rows: int,
        linger_s: float,
        instances: int = 1,
    ) -> None:
        self._call = call
        self._max_rows = max_rows
        self._linger_s = linger_s
        self._between = 0  # requests that are in no call now
        self._complete = threading.Condition()  # and the lock of all that is here
        self._queues = {model: _Queue(instances) for model in models}

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around all calls of one request: tells that it is there to be waited for."""
        with self._complete:
            self._between += 1
        try:
            yield
        finally:
            with self._complete:
                self._between -= 1
                self._complete.notify_all()

    def __call__(self, model: str, tensors: Tensors) -> Outputs:
        """The outputs for `tensors` [rows, ...], evaluated together with other callers' rows."""
        queue = self._queues[model]
        pending = _Pending(tensors, len(next(iter(tensors.values()))))
        with self._complete:
            self._between -= 1
            queue.pending.append(pending)
            self._appoint(queue)
            if self._between <= 0 or queue.rows() >= self._max_rows:
                self._complete.notify_all()
        while not pending.is_done:
            pending.wake.wait()
            if not pending.is_done:
                self._lead(model, queue, pending)
        if pending.error is not None:
            raise pending.error
        assert pending.outputs is not None
        return pending.outputs

    def _appoint(self, queue: _Queue) -> None:
        """Has the first call in the queue lead, if there is an instance for it to use."""
        if queue.pending and queue.free and not queue.led:
            queue.led = True
            queue.pending[0].wake.set()

    def _lead(self, model: str, queue: _Queue, leader: _Pending) -> None:
        """Gathers a batch and evaluates it; the leader, first in the queue, is always in it."""
        with self._complete:
            self._complete.wait_for(lambda: self._is_complete(queue), timeout=self._linger_s)
            batch = self._take(queue)
            queue.free -= 1
            queue.led = False
            self._appoint(queue)
        try:
            results = self._evaluate(model, batch)
            for pending, outputs in zip(batch, results, strict=True):
                pending.outputs = outputs
        except BaseException as error:
            for pending in batch:
                pending.error = error
        with self._complete:
            self._between += len(batch)
            queue.free += 1
            self._appoint(queue)
        for pending in batch:
            pending.wake.set()

    def _take(self, queue: _Queue) -> list[_Pending]:
        """An equal share for each free instance, in order, as far as it fits in one batch."""
        share = math.ceil(queue.rows() / queue.free)
        batch = [queue.pending.popleft()]
        rows = batch[0].rows
        while queue.pending and rows + queue.pending[0].rows <= min(share, self._max_rows):
            batch.append(queue.pending.popleft())
            rows += batch[-1].rows
        return batch

    def _is_complete(self, queue: _Queue) -> bool:
        return self._between <= 0 or queue.rows() >= self._max_rows

    def _evaluate(self, model: str, batch: list[_Pending]) -> list[Outputs]:
        if len(batch) == 1:
            return [self._call(model, batch[0].tensors)]
        joined = {
            name: np.concatenate([pending.tensors[name] for pending in batch])
            for name in batch[0].tensors
        }
        ends = np.cumsum([pending.rows for pending in batch])[:-1]
        split = [np.split(output, ends) for output in self._call(model, joined)]
        return list(zip(*split, strict=True))
