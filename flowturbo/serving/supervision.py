"""Keeps a server running: what is wrong with one, and when to start another."""

import random
import time
from collections.abc import Callable

from flowturbo.serving.tritonserver import TritonServer

STOPPED_S = 1.0  # a process that a signal has stopped for so long is as good as dead
STABLE_S = 10.0  # a server that ran for so long did not die at once
_FIRST_DELAY_S, _MAX_DELAY_S = 0.25, 30.0


class Watch:
    """Looks for what is wrong with a server that was ready. Calls' durations say nothing."""

    def __init__(self, server: TritonServer, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._models = server.model_processes()
        self._clock_s = clock_s
        self._stopped_since_s: dict[int, float] = {}

    def fault(self) -> str | None:
        """What is wrong, in words; None if nothing is."""
        server, now_s = self._server, self._clock_s()
        if server.exit_code is not None:
            return f"tritonserver {server.ending}"
        if lost := self._models.keys() - server.living(self._models):
            return f"the process of {self._models[min(lost)]} died ({min(lost)})"
        stopped = server.stopped(self._models)
        since_s = {pid: self._stopped_since_s.get(pid, now_s) for pid in stopped}
        self._stopped_since_s = since_s
        if long := [pid for pid, since in since_s.items() if now_s - since >= STOPPED_S]:
            name = self._models.get(long[0], "tritonserver")
            return f"the process of {name} was stopped by a signal ({long[0]})"
        return None


class Restarts:
    """When a dead server is started again: later after each death that came quickly.

    After `most` quick deaths in a row it is given up.
    """

    def __init__(
        self,
        most: int,
        clock_s: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._most = most
        self._clock_s = clock_s
        self._uniform = uniform
        self._started_s = clock_s()
        self._quick = 0

    def started(self) -> None:
        """To be told at each start."""
        self._started_s = self._clock_s()

    def delay_s(self) -> float | None:
        """Seconds until the next start, exponential with jitter; None to give up."""
        if self._clock_s() - self._started_s >= STABLE_S:
            self._quick = 0
        self._quick += 1
        if self._quick > self._most:
            return None
        longest_s = min(_FIRST_DELAY_S * 2 ** (self._quick - 1), _MAX_DELAY_S)
        return self._uniform(longest_s / 2, longest_s)
