"""Calls of many requests, gathered into one batch a tick.

Triton's dynamic batcher starts whenever an engine is free, so that requests in a loop fall into
cohorts: some wait while others run, and no batch is ever full. Here a tick waits for the requests
that are just between two calls, a fraction of a millisecond, and then runs the calls of which most
wait: a few ahead wait for the many behind, and cohorts merge. A request alone has nobody to wait
for and never does.

There is no thread of its own between a caller and the models, which would cost a wake-up both ways:
of the callers that wait one leads, which makes the call for all.
"""

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from flowturbo.generate import Infer
from flowturbo.guidance import Tensors

MOST_PASSED_OVER = 8  # about as many turns as a request makes of the predictor

Outputs = tuple[np.ndarray, ...]


@dataclass(eq=False)
class _Pending:
    """A call that waits. It wakes to lead, or with its outputs or the error there."""

    number: int
    tensors: Tensors
    rows: int
    wake: threading.Event = field(default_factory=threading.Event)
    outputs: Outputs | None = None
    error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return self.outputs is not None or self.error is not None


@dataclass(eq=False)
class _Device:
    """What one or more models run on, `free` batches at a time, and the calls that wait for it."""

    free: int
    queues: dict[str, deque[_Pending]] = field(default_factory=dict)
    led: bool = False  # somebody gathers a batch just now
    passed_over: int = 0  # how often in a row the oldest call was

    def oldest(self) -> _Pending | None:
        heads = (queue[0] for queue in self.queues.values() if queue)
        return min(heads, key=lambda pending: pending.number, default=None)

    def most_rows(self) -> int:
        return max(_rows(queue) for queue in self.queues.values())

    def next(self) -> str:
        """The model for which most calls wait; of several, the later one in a program.

        The oldest call's, once that has been passed over too often.
        """
        oldest = self.oldest()
        longest = max(reversed(self.queues), key=lambda model: len(self.queues[model]))
        if oldest is self.queues[longest][0]:
            self.passed_over = 0
            return longest
        self.passed_over += 1
        if self.passed_over <= MOST_PASSED_OVER:
            return longest
        self.passed_over = 0
        return next(model for model, queue in self.queues.items() if queue and queue[0] is oldest)


def _rows(calls: Iterable[_Pending]) -> int:
    return sum(pending.rows for pending in calls)


class Gatherer:
    """Runs `call(model, tensors)` on the joined rows of concurrent callers.

    A batch has at most `max_rows` rows and waits at most `linger_s` for requests that are between
    two calls. With `shared` all models take turns on one device: on a CPU, where two at a time are
    slower than one after the other. Otherwise `instances` batches of each model run at a time, and
    those that are free share what is queued. An exception of `call` reaches every caller in the
    batch.
    """

    def __init__(
        self,
        call: Infer,
        models: tuple[str, ...],
        max_rows: int,
        linger_s: float,
        *,
        instances: int = 1,
        shared: bool = False,
    ) -> None:
        assert not shared or instances == 1  # a leader that evaluates could be asked to lead
        self._call = call
        self._max_rows = max_rows
        self._linger_s = linger_s
        self._between = 0  # requests that are in no call now
        self._count = 0
        self._complete = threading.Condition()  # and the lock of all that is here
        devices = (
            [_Device(instances)] * len(models) if shared else [_Device(instances) for _ in models]
        )
        self._devices = dict(zip(models, devices, strict=True))
        for model, device in self._devices.items():
            device.queues[model] = deque()

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
        device = self._devices[model]
        with self._complete:
            self._count += 1
            pending = _Pending(self._count, tensors, len(next(iter(tensors.values()))))
            self._between -= 1
            device.queues[model].append(pending)
            self._appoint(device)
            if self._is_complete(device):
                self._complete.notify_all()
        while not pending.is_done:
            pending.wake.wait()
            pending.wake.clear()
            if not pending.is_done:
                self._lead(device)
        if pending.error is not None:
            raise pending.error
        assert pending.outputs is not None
        return pending.outputs

    def _appoint(self, device: _Device) -> None:
        """Has the oldest call that waits lead, if the device is free for it."""
        if device.free and not device.led and (leader := device.oldest()):
            device.led = True
            leader.wake.set()

    def _lead(self, device: _Device) -> None:
        """Gathers a batch and evaluates it; the leader's own call need not be in it."""
        with self._complete:
            self._complete.wait_for(lambda: self._is_complete(device), timeout=self._linger_s)
            model = device.next()
            batch = self._take(device.queues[model], device.free)
            device.free -= 1
            device.led = False
            self._appoint(device)
        try:
            results = self._evaluate(model, batch)
            for pending, outputs in zip(batch, results, strict=True):
                pending.outputs = outputs
        except BaseException as error:
            for pending in batch:
                pending.error = error
        with self._complete:
            self._between += len(batch)
            device.free += 1
            self._appoint(device)
        for pending in batch:
            pending.wake.set()

    def _take(self, queue: deque[_Pending], free: int) -> list[_Pending]:
        """One of `free` equal shares of the queue, in order, as far as it fits in one batch."""
        share = math.ceil(_rows(queue) / free)
        batch = [queue.popleft()]
        rows = batch[0].rows
        while queue and rows + queue[0].rows <= min(share, self._max_rows):
            batch.append(queue.popleft())
            rows += batch[-1].rows
        return batch

    def _is_complete(self, device: _Device) -> bool:
        return self._between <= 0 or device.most_rows() >= self._max_rows

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
