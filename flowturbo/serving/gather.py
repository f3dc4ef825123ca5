"""Calls of many requests to one model, gathered into one batch a tick.

Left to a batcher that starts whenever the engine is free, requests in a loop fall into two cohorts:
one waits while the other runs, and neither batch is ever full. Here a tick waits for the requests
that are just between two calls, a fraction of a millisecond, so that the cohorts merge; a request
alone has nobody to wait for and never does.
"""

import math
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from flowturbo.generate import Infer
from flowturbo.guidance import Tensors

Outputs = tuple[np.ndarray, ...]


@dataclass
class _Pending:
    tensors: Tensors
    rows: int
    result: "Future[Outputs]" = field(default_factory=Future)


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
        self._closed = False
        self._changed = threading.Condition()
        self._queues: dict[str, deque[_Pending]] = {model: deque() for model in models}
        self._free = dict.fromkeys(models, instances)
        self._threads = [
            threading.Thread(target=self._serve, args=(model,), name=f"gather-{model}", daemon=True)
            for model in models
            for _ in range(instances)
        ]
        for thread in self._threads:
            thread.start()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around all calls of one request: tells that it is there to be waited for."""
        self._count_between(1)
        try:
            yield
        finally:
            self._count_between(-1)

    def __call__(self, model: str, tensors: Tensors, timeout_s: float | None = None) -> Outputs:
        """The outputs for `tensors` [rows, ...], evaluated together with other callers' rows.

        Raises TimeoutError after `timeout_s`; rows not yet sent to the model then never are.
        """
        pending = _Pending(tensors, len(next(iter(tensors.values()))))
        with self._changed:
            self._between -= 1
            self._queues[model].append(pending)
            self._changed.notify_all()
        try:
            return pending.result.result(timeout_s)
        except TimeoutError:
            if pending.result.cancel():  # still queued: nobody will count it back
                self._count_between(1)
            raise

    def close(self) -> None:
        """Stops the threads once what is queued is done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _count_between(self, change: int) -> None:
        with self._changed:
            self._between += change
            self._changed.notify_all()

    def _serve(self, model: str) -> None:
        while (batch := self._next_batch(model)) is not None:
            if not batch:
                continue  # all in it have given up
            try:
                results = self._evaluate(model, batch)
            except BaseException as error:
                self._finish(model, batch)
                for pending in batch:
                    pending.result.set_exception(error)
                continue
            self._finish(model, batch)
            for pending, outputs in zip(batch, results, strict=True):
                pending.result.set_result(outputs)

    def _finish(self, model: str, batch: list[_Pending]) -> None:
        with self._changed:
            self._free[model] += 1
            self._between += len(batch)
            self._changed.notify_all()

    def _next_batch(self, model: str) -> list[_Pending] | None:
        """Waits for calls and takes those that fit in one batch, in order; None when closed."""
        queue = self._queues[model]
        with self._changed:
            self._changed.wait_for(lambda: queue or self._closed)
            if not queue:
                return None
            self._changed.wait_for(lambda: self._is_complete(queue), timeout=self._linger_s)
            batch = self._take(queue, self._free[model])
            self._free[model] -= bool(batch)
            return batch

    def _take(self, queue: deque[_Pending], free: int) -> list[_Pending]:
        """One of `free` equal shares of the queue, in order, as far as it fits in one batch."""
        share = math.ceil(sum(pending.rows for pending in queue) / free)
        batch: list[_Pending] = []
        rows = 0
        while queue and (not batch or rows + queue[0].rows <= min(share, self._max_rows)):
            pending = queue.popleft()
            if pending.result.set_running_or_notify_cancel():
                rows += pending.rows
                batch.append(pending)
        return batch

    def _is_complete(self, queue: deque[_Pending]) -> bool:
        full = sum(pending.rows for pending in queue) >= self._max_rows
        return self._between <= 0 or full or self._closed

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
