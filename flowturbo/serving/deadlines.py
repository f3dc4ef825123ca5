"""Deadlines that hold whatever a worker is waiting for."""

import heapq
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Job = TypeVar("Job")
_LONGEST_WAIT_S = 3600.0  # a caller may name any deadline, a lock no wait of centuries


class Deadlines(Generic[Job]):
    """Calls `expired(job)`, on a thread of its own, for each job that is not done in time.

    `expired` must not raise. Deadlines are times of `clock`, in seconds.
    """

    def __init__(
        self, expired: Callable[[Job], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._expired = expired
        self._clock = clock
        self._jobs: dict[int, Job] = {}
        self._due: list[tuple[float, int]] = []  # a heap; of jobs that are done too
        self._count = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._watch, name="deadlines", daemon=True)
        self._thread.start()

    def add(self, job: Job, deadline: float) -> int:
        """Watches `job` until `deadline`; its ticket for `done`."""
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
        """Stops watching; a job that expires just now is handed back first."""
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
                del job  # nothing of it is kept until the next one

    def _next(self) -> Job | None:
        """Waits for the next deadline; None if nothing is due after all."""
        wait_s = self._due[0][0] - self._clock() if self._due else None
        if wait_s is None or wait_s > 0:
            if not self._closed:
                self._changed.wait(None if wait_s is None else min(wait_s, _LONGEST_WAIT_S))
            return None
        return self._jobs.pop(heapq.heappop(self._due)[1], None)
