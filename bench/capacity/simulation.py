"""Event simulation of a replica under load, with the service's own scheduler.

docs/sizing.md has the model.
"""

import heapq
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from bench.capacity.replica import Replica
from flowturbo.contract import Role
from flowturbo.errors import BusyError, DeadlineError
from flowturbo.serving.scheduling import Need, Scheduler, Times, Turns, Work, stated_rows
from flowturbo.settings import Settings

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


@dataclass(frozen=True)
class Arrival:
    """A simulated request: its images, seconds until its deadline, and its caller."""

    images: int = 1
    timeout_s: float = Settings.default_timeout_s
    caller: str = ""


@dataclass(slots=True, eq=False)
class _Request:
    """A request on its way. `left` are the calls that remain: a model and rows, the next one last.

    A large call is made in parts, as in the service.
    """

    arrived: float
    asked: Arrival
    work: Work
    left: list[tuple[str, int]]


@dataclass(slots=True, eq=False)
class _Waiting:
    """A call that waits for a device (`flowturbo.serving.scheduling.Waiting`)."""

    request: _Request
    model: str
    rows: int
    most: int
    work: Work
    key: str


@dataclass(slots=True)
class _Execution:
    batch: list[_Waiting]
    left_ms: float  # if it has the device for itself


@dataclass(slots=True)
class _Device:
    """Models that take turns, and what waits for them; `taken` while a batch is sent or runs."""

    models: list[str]
    waiting: list[_Waiting] = field(default_factory=list)
    turns: Turns = field(default_factory=Turns)
    taken: bool = False


@dataclass
class Simulation:
    """The state of a replica between two events; times are in milliseconds."""

    replica: Replica
    on_done: Callable[[], None] = lambda: None
    now: float = 0.0
    inflight: int = 0
    busy_ms: float = 0.0
    weights: Mapping[str, float] = field(default_factory=dict)
    refused: list[tuple[float, Arrival]] = field(default_factory=list)  # when
    answered: list[tuple[float, float, Arrival]] = field(default_factory=list)  # arrival, end
    batches: list[tuple[str, float, int]] = field(default_factory=list)  # (model, start, rows)

    def __post_init__(self) -> None:
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._running: dict[str, _Execution] = {}
        self._since: dict[str, float] = {}  # when the batch of a model was sent
        models = list(self.replica.times_ms)
        groups = [models] if self.replica.turns else [[model] for model in models]
        self._devices = [_Device(group) for group in groups]
        self._device_of = {model: each for each in self._devices for model in each.models}
        times = Times(
            {
                model: {
                    rows: (table[rows] + self.replica.overhead_ms) / 1e3
                    for rows in stated_rows(self.replica.max_rows)
                }
                for model, table in self.replica.times_ms.items()
            }
        )
        self._scheduler = Scheduler(times, weights=self.weights)

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
            for device in self._devices:
                self._start(device)

    def arrive(self, asked: Arrival = Arrival()) -> None:
        """A request arrives; it is refused as the service would refuse it."""
        if self.inflight >= self.replica.max_inflight:
            self.refused.append((self.now, asked))
            return
        most, count = self.replica.max_rows, asked.images
        needs = [Need(model, rows * count, most) for model, rows in self.replica.calls]
        now_s = self.now / 1e3
        try:
            work = self._scheduler.take(needs, count, now_s + asked.timeout_s, now_s, asked.caller)
        except (BusyError, DeadlineError):
            self.refused.append((self.now, asked))
            return
        self.inflight += 1
        parts = [(need.model, rows) for need in needs for rows in self._parts(need)]
        self._next_call(_Request(self.now, asked, work, parts[::-1]))

    def _parts(self, need: Need) -> list[int]:
        size = self._scheduler.chunk(need)
        return [min(size, need.rows - k) for k in range(0, need.rows, size)]

    def _advance(self, when: float) -> None:
        """Moves the time to `when`. k executions share the device, each at 1/k of its speed."""
        passed = when - self.now
        self.now = when
        if self._running:
            self.busy_ms += passed
            for execution in self._running.values():
                execution.left_ms -= passed / len(self._running)

    def _next_call(self, request: _Request) -> None:
        model, rows = request.left.pop()
        most = self.replica.max_rows
        call = _Waiting(request, model, rows, most, request.work, model)
        self._device_of[model].waiting.append(call)

    def _start(self, device: _Device) -> None:
        """Batches waiting calls if the device is free; it starts after the call's overhead."""
        if not device.waiting or device.taken:
            return
        device.taken = True
        batch = self._scheduler.next_batch(
            device.waiting, device.models, device.turns, self.now / 1e3
        )
        chosen = set(batch)
        device.waiting = [call for call in device.waiting if call not in chosen]
        self.at(self.now + self.replica.overhead_ms, partial(self._execute, batch, self.now))

    def _execute(self, batch: list[_Waiting], since: float) -> None:
        model, rows = batch[0].model, sum(call.rows for call in batch)
        self._running[model] = _Execution(batch, self.replica.times_ms[model][rows])
        self._since[model] = since
        self.batches.append((model, self.now, rows))

    def _finish(self, model: str) -> None:
        self._device_of[model].taken = False
        batch = self._running.pop(model).batch
        self._scheduler.ran(batch, (self.now - self._since[model]) / 1e3)
        for call in batch:
            self._scheduler.progressed(call.work, model, call.rows)
            request = call.request
            if request.left:
                self._next_call(request)
                continue
            self._scheduler.leave(request.work)
            self.inflight -= 1
            self.answered.append((request.arrived, self.now, request.asked))
            self.on_done()

    def point(self, load: float, start: float, end: float) -> Point:
        """Figures from `start` to `end`: throughput by end, latencies by arrival."""
        waits = [done - came for came, done, _ in self.answered if start <= came <= end]
        lost = sum(start <= came <= end for came, _ in self.refused)
        sizes = [rows for m, at, rows in self.batches if m == Role.PREDICTOR and start <= at <= end]
        made = sum(start < done <= end for _, done, _ in self.answered)
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
    simulation = Simulation(replica)
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
    simulation = Simulation(replica)
    simulation.on_done = lambda: simulation.arrive()
    for when in np.random.default_rng(seed).uniform(0, replica.lone_ms(), clients):
        simulation.at(float(when), simulation.arrive)
    simulation.run(lambda: len(simulation.answered) >= int(requests * WARM_UP))
    start = simulation.now
    simulation.run(lambda: len(simulation.answered) >= requests)
    return simulation.point(clients, start, simulation.now)
