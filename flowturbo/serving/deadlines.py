"""Deadlines that hold even while a worker waits."""

import heapq
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Job = TypeVar("Job")
_LONGEST_WAIT_S = 3600.0  # callers may set longer deadlines than a lock can wait


class Deadlines(Generic[Job]):
    """Calls `expired(job)`, on its own thread, for each job that is not done in time.

    `expired` must not raise. Deadlines are times of `clock`, in seconds.
    """

    def __init__(
        self, expired: Callable[[Job], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._expired = expired
        self._clock = clock
        self._jobs: dict[int, Job] = {}
        self._due: list[tuple[float, int]] = []  # a heap; finished jobs stay in it
        self._count = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._watch, name="deadlines", daemon=True)
        self._thread.start()

    def add(self, job: Job, deadline: float) -> int:
        """Watches `job` until `deadline`; returns a ticket for `done`."""
        with self._changed:
            self._count += 1
            self._jobs[self._count] = job
            heapq.heappush(self._due, (deadline, self._count))
            if self._due[0][1] == self._count:
                self._changed.notify()
            return self._count

    def done(self, ticket: int) -> bool:
        """Whether the job was done in time; it is no longer watched."""
        with self._changed:
            return self._jobs.pop(ticket, None) is not None

    def close(self) -> None:
        """Stops watching, after the job that is expiring now, if any."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed:
            with self._changed:
                job = self._next()
            if job is not None:
                self._expired(job)
                del job  # frees it before the next wait

    def _next(self) -> Job | None:
        """Waits for the next deadline; None if nothing is due after all."""
        wait_s = self._due[0][0] - self._clock() if self._due else None
        if wait_s is None or wait_s > 0:
            if not self._closed:
                self._changed.wait(None if wait_s is None else min(wait_s, _LONGEST_WAIT_S))
            return None
        return self._jobs.pop(heapq.heappop(self._due)[1], None)
