"""The load that one device carries, the devices that a rate needs, and the plan's check."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bench.capacity.replica import Replica
from bench.capacity.simulation import Point, closed_loop, open_loop

LOADS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.2)  # of the saturation throughput
BISECTIONS = 9


@dataclass(frozen=True)
class FleetPlan:
    """The load of one GPU within `slo_p95_ms`, and the fleet for a rate.

    `limit` is the largest load at which 95% of the requests are answered within `slo_p95_ms`;
    `points` are other loads. `saturation_*` describes the best batch, `full_*` the fullest batch.
    `gpus` GPUs carry `rate` images/s. `fleets` has that number and larger ones, at the same rate.
    """

    slo_p95_ms: float
    lone_ms: float
    saturation_per_s: float
    saturation_images: int
    full_per_s: float
    full_images: int
    limit: Point
    points: tuple[Point, ...]
    rate: float | None = None
    gpus: int | None = None
    fleets: tuple[tuple[int, Point], ...] = ()


def largest_load(replica: Replica, slo_p95_ms: float, requests: int = 4000) -> Point:
    """The largest Poisson load, at most saturation, whose p95 is within the SLO; by bisection.

    Raises ValueError if there is none.
    """
    lone = replica.lone_ms()
    if not slo_p95_ms > lone:
        raise ValueError(
            f"the SLO of {slo_p95_ms:g} ms is not above the {lone:.1f} ms of a single request: "
            "more GPUs cannot help; allow more time or use a shorter schedule"
        )
    low, high = 0.0, replica.saturation()[0]
    point = found = open_loop(replica, high, requests)
    for _ in range(BISECTIONS if point.p95_ms > slo_p95_ms else 0):
        point = open_loop(replica, (low + high) / 2, requests)
        if point.p95_ms <= slo_p95_ms:
            low, found = point.load, point
        else:
            high = point.load
    if found.p95_ms > slo_p95_ms:
        raise ValueError(
            f"the SLO of {slo_p95_ms:g} ms is too close to the {lone:.1f} ms of a single request: "
            f"p95 is {point.p95_ms:.1f} ms at {point.load:.3g} images/s"
        )
    return found


def plan(
    replica: Replica, slo_p95_ms: float, rate: float | None = None, requests: int = 4000
) -> FleetPlan:
    """The load that one device carries within the SLO, and how many devices carry `rate`."""
    if rate is not None and not 0 < rate < math.inf:
        raise ValueError(f"the rate must be above 0 images/s, got {rate}")
    limit = largest_load(replica, slo_p95_ms, requests)
    saturation, images = replica.saturation()
    points = [open_loop(replica, saturation * load, requests) for load in LOADS]
    found = FleetPlan(
        slo_p95_ms,
        replica.lone_ms(),
        saturation,
        images,
        1e3 / replica.image_ms(replica.full()),
        replica.full(),
        limit,
        tuple(points),
    )
    if rate is None:
        return found
    gpus = math.ceil(rate / limit.load)
    sizes = (gpus, gpus + 1, 2 * gpus, 4 * gpus)
    fleets = tuple((n, open_loop(replica, rate / n, requests)) for n in sizes)
    return replace(found, rate=rate, gpus=gpus, fleets=fleets)


@dataclass(frozen=True)
class Checked:
    """A measured point of a load curve and its prediction; errors are predicted / measured - 1."""

    schedule: str
    load: str
    images_per_s: float
    predicted_per_s: float
    p95_ms: float
    predicted_p95_ms: float

    @property
    def rate_error(self) -> float:
        return self.predicted_per_s / self.images_per_s - 1

    @property
    def p95_error(self) -> float:
        return self.predicted_p95_ms / self.p95_ms - 1


def check(report: Mapping[str, Any], replica_of: Callable[[str], Replica]) -> list[Checked]:
    """Predicts every closed- and open-loop point that bench.load measured without an error.

    `replica_of` makes the replica of a schedule. Raises ValueError if there is no point.
    """
    found = []
    for point in (p for p in report.get("closed_loop", ()) if not p.get("error")):
        predicted = closed_loop(replica_of(point["schedule"]), point["concurrency"])
        found.append(_beside(point, f"{point['concurrency']} clients", predicted))
    for point in (p for p in report.get("open_loop", ()) if not p.get("error")):
        predicted = open_loop(replica_of(point["schedule"]), point["rate"])
        found.append(_beside(point, f"{point['rate']:.2f} images/s", predicted))
    if not found:
        raise ValueError("the load curve has no point in closed_loop or open_loop")
    return found


def _beside(measured: Mapping[str, Any], load: str, predicted: Point) -> Checked:
    return Checked(
        measured["schedule"],
        load,
        measured["images_per_s"],
        predicted.images_per_s,
        measured["latency_ms"]["p95"],
        predicted.p95_ms,
    )
