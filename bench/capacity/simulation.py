"""Event simulation of a replica under load; docs/sizing.md has the model."""

import heapq
import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from bench.capacity.replica import Replica
from flowturbo.contract import Role

WARM_UP = 0.1  # share of the requests that are not counted


@dataclass(frozen=True)
class Point:
    """One simulated load. `load` is offered images/s, or the clients of a closed loop.

    `rows` is the mean per predictor execution, `busy` the share of time in which the device is
    busy. Percentiles count a refused request as one that never ends.
    """

    load: float
    images_per_s: float
    rows: float
    busy: float
    refused: float
    mean_ms: float
    p50_ms: float
    p95_ms: float


@dataclass(slots=True)
class _Request:
    arrived: float
    done: int = 0  # calls


@dataclass(slots=True)
class _Execution:
    batch: list[_Request]
    left_ms: float  # if it has the device for itself


@dataclass
class _Simulation:
    """The state of a replica between two events; times are in milliseconds."""

    replica: Replica
    on_done: Callable[[], None] = lambda: None
    now: float = 0.0
    inflight: int = 0
    busy_ms: float = 0.0
    refused: list[float] = field(default_factory=list)  # arrival times
    answered: list[tuple[float, float]] = field(default_factory=list)  # (arrival, end)
    batches: list[tuple[str, float, int]] = field(default_factory=list)  # (model, start, rows)

    def __post_init__(self) -> None:
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._running: dict[str, _Execution] = {}
        self._queues: dict[str, deque[_Request]] = {m: deque() for m in self.replica.times_ms}
        self._taken: set[str] = set()  # models whose batch is being sent or running
        self._rows = dict(self.replica.calls)

    def at(self, when: float, event: Callable[[], None]) -> None:
        """Schedules `event` for the time `when`."""
        self._count += 1
        heapq.heappush(self._events, (when, self._count, event))

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Runs until `until` returns true or no event is left."""
        while (self._events or self._running) and not until():
            end = self.now + len(self._running) * min(
                (e.left_ms for e in self._running.values()), default=math.inf
            )  # fmt: skip
            if not self._events or (self._running and end <= self._events[0][0]):
                self._advance(end)
                self._finish(min(self._running, key=lambda m: self._running[m].left_ms))
            else:
                when, _, event = heapq.heappop(self._events)
                self._advance(when)
                event()
            if self.replica.turns:
                self._take_turn()
            else:
                for model in self._queues:
                    self._start(model)

    def arrive(self) -> None:
        """A request arrives; it is refused if `max_inflight` requests are in flight."""
        if self.inflight >= self.replica.max_inflight:
            self.refused.append(self.now)
            return
        self.inflight += 1
        self._next_call(_Request(self.now))

    def _advance(self, when: float) -> None:
        """Moves the time to `when`. k executions share the device, each at 1/k of its speed."""
        passed = when - self.now
        self.now = when
        if self._running:
            self.busy_ms += passed
            for execution in self._running.values():
                execution.left_ms -= passed / len(self._running)

    def _next_call(self, request: _Request) -> None:
        self._queues[self.replica.calls[request.done][0]].append(request)

    def _take_turn(self) -> None:
        """Starts the model with most waiting calls, if none runs; on a tie, the later model."""
        if not self._taken:  # without fairness: starvation hardly occurs with one schedule
            self._start(max(reversed(self._queues), key=lambda model: len(self._queues[model])))

    def _start(self, model: str) -> None:
        """Batches the waiting calls that fit; the device starts after the call's overhead."""
        queue, fit = self._queues[model], self.replica.max_rows // self._rows[model]
        if not queue or model in self._taken:
            return
        self._taken.add(model)
        batch = [queue.popleft() for _ in range(min(fit, len(queue)))]
        self.at(self.now + self.replica.overhead_ms, partial(self._execute, model, batch))

    def _execute(self, model: str, batch: list[_Request]) -> None:
        rows = len(batch) * self._rows[model]
        self._running[model] = _Execution(batch, self.replica.times_ms[model][rows])
        self.batches.append((model, self.now, rows))

    def _finish(self, model: str) -> None:
        self._taken.remove(model)
        for request in self._running.pop(model).batch:
            request.done += 1
            if request.done < len(self.replica.calls):
                self._next_call(request)
                continue
            self.inflight -= 1
            self.answered.append((request.arrived, self.now))
            self.on_done()

    def point(self, load: float, start: float, end: float) -> Point:
        """Figures from `start` to `end`: throughput by end, latencies by arrival."""
        waits = [done - came for came, done in self.answered if start <= came <= end]
        lost = sum(start <= came <= end for came in self.refused)
        sizes = [rows for m, at, rows in self.batches if m == Role.PREDICTOR and start <= at <= end]
        made = sum(start < done <= end for _, done in self.answered)
        p50, p95 = np.percentile(waits + [math.inf] * lost, [50, 95], method="higher")
        return Point(
            load,
            made / (end - start) * 1e3,
            statistics.mean(sizes),
            self.busy_ms / self.now,
            lost / (lost + len(waits)),
            statistics.mean(waits),
            float(p50),
            float(p95),
        )


def open_loop(replica: Replica, rate: float, requests: int = 4000, seed: int = 0) -> Point:
    """Requests of one image with Poisson arrivals, `rate` per second."""
    gaps = np.random.default_rng(seed).exponential(1e3 / rate, requests)
    arrivals = np.cumsum(gaps)
    simulation = _Simulation(replica)
    for when in arrivals:
        simulation.at(float(when), simulation.arrive)
    simulation.run()
    return simulation.point(rate, arrivals[int(requests * WARM_UP)], arrivals[-1])


def closed_loop(replica: Replica, clients: int, requests: int = 4000, seed: int = 0) -> Point:
    """`clients` clients that send when they have their answer, with random starts."""
    if not 1 <= clients <= replica.max_inflight:
        raise ValueError(
            f"{clients} clients in a closed loop, allowed are 1 to {replica.max_inflight} "
            "(max_inflight)"
        )
    simulation = _Simulation(replica)
    simulation.on_done = lambda: simulation.arrive()
    for when in np.random.default_rng(seed).uniform(0, replica.lone_ms(), clients):
        simulation.at(float(when), simulation.arrive)
    simulation.run(lambda: len(simulation.answered) >= int(requests * WARM_UP))
    start = simulation.now
    simulation.run(lambda: len(simulation.answered) >= requests)
    return simulation.point(clients, start, simulation.now)
