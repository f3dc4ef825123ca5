"""Batches the rows of in-flight requests at every step.

Each request is a coroutine that waits for calls of models. Triton's dynamic batcher starts a batch
whenever an engine is free. Requests in a loop then fall into cohorts: some wait while others run,
and no batch is ever full. Here the thread that ran a batch takes all its requests to their next
calls, then looks for the next batch. Those requests stay together, and no thread is woken between
two calls of a request. Which calls are next is the scheduler's choice (scheduling.py).
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flowturbo.contract import SOLVER
from flowturbo.rows import Tensors, row_count
from flowturbo.serving.scheduling import Scheduler, Times, Turns, Work

_CHECK_S = 0.05  # between two looks at what waits
_logger = logging.getLogger(__name__)

Outputs = tuple[np.ndarray, ...]
Evaluate = Callable[[str, Tensors], Outputs]
Key = tuple[Any, ...]  # a model, and what one row of each of its tensors looks like
Request = Coroutine["_Call | Shared", Any, Any]
_Ready = tuple[Request, "Done", Any]  # a request, and what it is given to go on
Done = Callable[[Any], None]  # takes a request's result, or the exception that ended it


@dataclass(frozen=True)
class Owner:
    """The request that a call belongs to: its work, and a check that raises once it is over.

    `scale` is the size of its latents beside that of the default size.
    """

    work: Work
    check: Callable[[], None] = lambda: None
    scale: float = 1.0


@dataclass(eq=False)
class _Call:
    """A call that a request waits for: `model` evaluates `tensors` [rows, ...]."""

    model: str
    tensors: Tensors
    most: int  # rows of a batch of such calls
    owner: Owner | None

    def __await__(self) -> Generator["_Call", Outputs, Outputs]:
        return (yield self)


class Shared:
    """Something that one request makes and others wait for; `finish` wakes them."""

    def __init__(self, batcher: "Batcher") -> None:
        self._batcher = batcher
        self.done = False
        self.waiting: list[_Ready] = []

    def __await__(self) -> Generator["Shared", None, None]:
        yield self

    def finish(self) -> None:
        """Called once, by the request that made it or failed to."""
        self._batcher.wake(self)


@dataclass(eq=False)
class _Waiting:
    """A request that waits for a call (`flowturbo.serving.scheduling.Waiting`)."""

    call: _Call
    request: Request
    done: Done

    def __post_init__(self) -> None:
        self.model = self.call.model
        self.most = self.call.most
        shapes = [value.shape[1:] for value in self.call.tensors.values()]
        # What one execution runs to its end is joined with the same solver only.
        self.solver = tuple(self.call.tensors[SOLVER][0]) if SOLVER in self.call.tensors else ()
        self.key: Key = (self.model, *shapes, *self.solver)
        self.rows = row_count(self.call.tensors)
        self.work = self.call.owner.work if self.call.owner else None
        self.scale = self.call.owner.scale if self.call.owner else 1.0

    def over(self) -> BaseException | None:
        """Why the request need not go on; None if it must."""
        try:
            if self.call.owner:
                self.call.owner.check()
        except BaseException as error:
            return error
        return None


@dataclass(eq=False)
class _Device:
    """A device that one or more models share, and the calls that wait for it.

    It runs `threads` batches at a time. `models` are in the order in which programs call them.
    """

    threads: int
    models: Sequence[str]
    free: int = 0
    waiting: list[_Waiting] = field(default_factory=list)
    turns: Turns = field(default_factory=Turns)
    checked_at: float = -math.inf

    def over(self, now: float) -> dict[_Waiting, BaseException]:
        """The waiting requests that need not go on, and why; looked for from time to time."""
        if now - self.checked_at < _CHECK_S:
            return {}
        self.checked_at = now
        return {each: why for each in self.waiting if (why := each.over()) is not None}


class Batcher:
    """Runs `call(model, tensors)` on the joined rows of concurrent requests.

    `max_rows` are the most rows of a batch, by model, in the order in which programs call them. The
    models in `shared` take turns on one device: on a CPU, where two at a time are slower than one
    after the other. Of each other model `instances` batches run at a time, and those that are free
    share what is queued. An exception of `call` reaches every request in the batch.

    `scheduler` is used under the batcher's lock (`planning`) only. `clock` returns seconds.
    """

    def __init__(
        self,
        call: Evaluate,
        max_rows: Mapping[str, int],
        *,
        shared: Iterable[str] = (),
        instances: int = 1,
        scheduler: Scheduler | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._call = call
        self._max_rows = max_rows
        self._scheduler = scheduler or Scheduler(Times({}))
        self._clock = clock
        self._closed = False
        self._changed = threading.Condition()  # and the lock of all devices
        together = list(shared)
        devices = [_Device(1, together)] if together else []
        devices += [_Device(instances, [model]) for model in max_rows if model not in together]
        self._devices = {model: device for device in devices for model in device.models}
        self._ready: list[_Ready] = []
        self._threads = [
            threading.Thread(target=self._serve, args=(device,), name="batcher", daemon=True)
            for device in devices
            for _ in range(device.threads)
        ]
        for thread in self._threads:
            thread.start()

    @contextmanager
    def planning(self) -> Iterator[Scheduler]:
        """The scheduler, while nobody else uses it."""
        with self._changed:
            yield self._scheduler

    async def infer(
        self, model: str, tensors: Tensors, most: int | None = None, owner: Owner | None = None
    ) -> Outputs:
        """The outputs for `tensors` [rows, ...]; for coroutines given to `start` alone.

        `most` is the most rows of a batch of these shapes, if that is fewer than of others.
        """
        outputs: Outputs = await _Call(model, tensors, most or self._max_rows[model], owner)
        return outputs

    def share(self) -> Shared:
        """Something that several requests can wait for; for coroutines given to `start` alone."""
        return Shared(self)

    def wake(self, shared: Shared) -> None:
        """Lets those who wait for `shared` go on; called within a coroutine given to `start`."""
        with self._changed:
            shared.done = True
            self._ready += shared.waiting
            shared.waiting.clear()

    def start(self, request: Request, done: Done) -> None:
        """Runs `request` up to its first call here, then in turn with others.

        `done` is called with its result, or with the exception that ended it. It runs on the thread
        that ended the request. It must not raise and should not take long.
        """
        self._advance([(request, done, None)])

    def close(self) -> None:
        """Ends the threads; every request must have ended."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _advance(self, requests: Iterable[_Ready]) -> None:
        """Gives each of `requests` the outputs it waited for, and queues their next calls.

        All calls are queued at once: an idle thread would take the first of them alone.
        """
        ready = list(requests)
        while ready:
            calls = [(_step(*request), *request[:2]) for request in ready]
            with self._changed:
                for call, request, done in calls:
                    if isinstance(call, Shared):
                        (self._ready if call.done else call.waiting).append((request, done, None))
                    elif call is not None:
                        waiting = _Waiting(call, request, done)
                        self._devices[call.model].waiting.append(waiting)
                ready, self._ready = self._ready, []
                self._changed.notify_all()

    def _serve(self, device: _Device) -> None:
        while (batch := self._next_batch(device)) is not None:
            started = self._clock()
            results = self._evaluate(batch[0].model, [waiting.call.tensors for waiting in batch])
            self._advance((w.request, w.done, r) for w, r in zip(batch, results, strict=True))
            # With the way to the next calls: that long the device was not free for others.
            self._ran(batch, self._clock() - started)

    def _ran(self, batch: Sequence[_Waiting], seconds: float) -> None:
        with self._changed:
            # Several calls in one execution say little about the time of a call.
            self._scheduler.ran(batch, seconds, batch[0].scale, learn=not batch[0].solver)
            for each in batch:
                if each.work:
                    self._scheduler.progressed(each.work, each.model, each.rows, each.scale)

    def _next_batch(self, device: _Device) -> list[_Waiting] | None:
        """Waits for calls; None once there are none and there will be none."""
        while True:
            with self._changed:
                device.free += 1
                try:
                    self._changed.wait_for(lambda: device.waiting or self._closed)
                    if not device.waiting:
                        return None
                    over = device.over(self._clock())
                    batch: list[_Waiting] = []
                    if len(over) < len(device.waiting):
                        batch = self._scheduler.next_batch(
                            [w for w in device.waiting if w not in over],
                            device.models,
                            device.turns,
                            self._clock(),
                            device.free,
                        )
                    gone = {*batch, *over}
                    device.waiting = [w for w in device.waiting if w not in gone]
                finally:
                    device.free -= 1
            if over:
                self._advance((w.request, w.done, why) for w, why in over.items())
            if batch:
                return batch

    def _evaluate(self, model: str, parts: list[Tensors]) -> list[Outputs] | list[BaseException]:
        """The outputs for each of `parts`, evaluated together, or for each the error."""
        try:
            if len(parts) == 1:
                return [self._call(model, parts[0])]
            joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            ends = np.cumsum([row_count(part) for part in parts])[:-1]
            split = [np.split(output, ends) for output in self._call(model, joined)]
            return list(zip(*split, strict=True))
        except BaseException as error:
            return [error] * len(parts)


def _step(request: Request, done: Done, outputs: Any) -> _Call | Shared | None:
    """Gives a request its outputs; returns what it waits for next, or None once it has ended."""
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
    except BaseException:  # the thread serves other requests too
        _logger.exception("completion callback failed")
    return None
