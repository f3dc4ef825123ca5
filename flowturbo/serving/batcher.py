"""Requests as coroutines, whose calls are gathered into one batch a tick.

Triton's dynamic batcher starts whenever an engine is free, so that requests in a loop fall into
cohorts: some wait while others run, and no batch is ever full. Here the thread that evaluated a
batch takes all its requests on to their next calls before it looks for the next batch: those stay
together, and no thread is woken between two calls of a request. On a device that models share, the
calls of which most wait go first: a few ahead wait for the many behind, and cohorts merge.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flowturbo.generate import Infer
from flowturbo.solver.guidance import Tensors

_logger = logging.getLogger(__name__)
MAX_SKIPPED = 8  # about as many turns as a request makes of the predictor

Outputs = tuple[np.ndarray, ...]
Request = Coroutine["_Call", Outputs, Any]
Done = Callable[[Any], None]  # takes a request's result, or the exception that ended it


@dataclass(eq=False)
class _Call:
    """What a request waits for: to have `tensors` [rows, ...] evaluated by `model`."""

    model: str
    tensors: Tensors

    def __await__(self) -> Generator["_Call", Outputs, Outputs]:
        return (yield self)


@dataclass(eq=False)
class _Waiting:
    """A request at a call, the `number`th of all."""

    number: int
    call: _Call
    request: Request
    done: Done

    @property
    def rows(self) -> int:
        return len(next(iter(self.call.tensors.values())))


@dataclass(eq=False)
class _Device:
    """What one or more models run on, `threads` batches at a time, and the calls that wait."""

    threads: int
    free: int = 0
    queues: dict[str, deque[_Waiting]] = field(default_factory=dict)
    skipped: int = 0  # how often in a row the oldest call was

    def next(self) -> str:
        """The model for which most calls wait; of several, the later one in a program.

        The oldest call's, once that has been passed over too often.
        """
        longest = max(reversed(self.queues), key=lambda model: len(self.queues[model]))
        waiting = [model for model, queue in self.queues.items() if queue]
        oldest = min(waiting, key=lambda model: self.queues[model][0].number)
        if oldest != longest and self.skipped < MAX_SKIPPED:
            self.skipped += 1
            return longest
        self.skipped = 0
        return oldest

    def take(self, max_rows: int) -> tuple[str, list[_Waiting]]:
        """A model and one of `free` equal shares of its calls, in order, up to `max_rows` rows."""
        model = self.next()
        queue = self.queues[model]
        share = min(max_rows, math.ceil(sum(waiting.rows for waiting in queue) / self.free))
        batch = [queue.popleft()]
        rows = batch[0].rows
        while queue and rows + queue[0].rows <= share:
            batch.append(queue.popleft())
            rows += batch[-1].rows
        return model, batch


class Batcher:
    """Runs `call(model, tensors)` on the joined rows of concurrent requests.

    A batch has at most `max_rows` rows. With `shared` all models take turns on one device: on a
    CPU, where two at a time are slower than one after the other. Otherwise `instances` batches of
    each model run at a time, and those that are free share what is queued. An exception of `call`
    reaches every request in the batch.
    """

    def __init__(
        self,
        call: Infer,
        models: tuple[str, ...],
        max_rows: int,
        *,
        instances: int = 1,
        shared: bool = False,
    ) -> None:
        self._call = call
        self._max_rows = max_rows
        self._count = 0
        self._closed = False
        self._changed = threading.Condition()  # and the lock of all devices
        devices = [_Device(instances) for _ in models[: 1 if shared else None]]
        self._devices = {m: devices[0 if shared else k] for k, m in enumerate(models)}
        for model, device in self._devices.items():
            device.queues[model] = deque()
        self._threads = [
            threading.Thread(target=self._serve, args=(device,), name="gather", daemon=True)
            for device in devices
            for _ in range(device.threads)
        ]
        for thread in self._threads:
            thread.start()

    async def infer(self, model: str, tensors: Tensors) -> Outputs:
        """The outputs for `tensors` [rows, ...]; for coroutines given to `start` alone."""
        return await _Call(model, tensors)

    def start(self, request: Request, done: Done) -> None:
        """Runs `request` up to its first call here, then in turn with others.

        `done` is called with its result, or with the exception that ended it, on whatever thread
        that happens; it must not raise and should not take long.
        """
        self._advance([(request, done, None)])

    def close(self) -> None:
        """Ends the threads; every request must have ended."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _advance(self, requests: Iterable[tuple[Request, Done, Any]]) -> None:
        """Gives each of `requests` what it waited for, and has their next calls wait.

        All at once: an idle thread would take the first of them alone.
        """
        calls = [(_step(*request), *request[:2]) for request in requests]
        with self._changed:
            for call, request, done in calls:
                if call is not None:
                    self._count += 1
                    waiting = _Waiting(self._count, call, request, done)
                    self._devices[call.model].queues[call.model].append(waiting)
            self._changed.notify_all()

    def _serve(self, device: _Device) -> None:
        while taken := self._next_batch(device):
            model, batch = taken
            results = self._evaluate(model, [waiting.call.tensors for waiting in batch])
            self._advance((w.request, w.done, r) for w, r in zip(batch, results, strict=True))

    def _next_batch(self, device: _Device) -> tuple[str, list[_Waiting]] | None:
        with self._changed:
            device.free += 1
            try:
                self._changed.wait_for(lambda: any(device.queues.values()) or self._closed)
                return device.take(self._max_rows) if any(device.queues.values()) else None
            finally:
                device.free -= 1

    def _evaluate(self, model: str, parts: list[Tensors]) -> list[Outputs] | list[BaseException]:
        """The outputs for each of `parts`, evaluated together, or for each the error."""
        try:
            if len(parts) == 1:
                return [self._call(model, parts[0])]
            joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            ends = np.cumsum([len(next(iter(part.values()))) for part in parts])[:-1]
            split = [np.split(output, ends) for output in self._call(model, joined)]
            return list(zip(*split, strict=True))
        except BaseException as error:
            return [error] * len(parts)


def _step(request: Request, done: Done, outputs: Any) -> _Call | None:
    """Gives a request what it waited for; its next call, or None once it has ended."""
    try:
        if isinstance(outputs, BaseException):
            return request.throw(outputs)
        return request.send(outputs)
    except StopIteration as end:
        result = end.value
    except BaseException as error:
        result = error
    try:
        done(result)
    except BaseException:  # the thread has others to serve
        _logger.exception("completion callback failed")
    return None
