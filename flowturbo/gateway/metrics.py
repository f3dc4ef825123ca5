"""What the gateway counts, for /metrics in Prometheus' text format."""

from collections.abc import Callable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one gateway. `kept_bytes` tells how much its files take."""

    def __init__(self, kept_bytes: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        own = {"registry": self._registry}
        self._requests = Counter(
            "flowturbo_gateway_requests", "Answered requests", ["route", "status"], **own
        )
        self._seconds = Histogram(
            "flowturbo_gateway_request_seconds",
            "From the first byte of a request to the last of its answer",
            ["route"],
            buckets=_SECONDS,
            **own,
        )
        self.images = Counter("flowturbo_gateway_images", "Images answered", ["model"], **own)
        self.partial_images = Counter(
            "flowturbo_gateway_partial_images", "Images on the way answered", ["model"], **own
        )
        self.left = Counter(
            "flowturbo_gateway_callers_left", "Requests whose caller left before the answer", **own
        )
        self.running = Gauge("flowturbo_gateway_requests_running", "Requests at the service", **own)
        kept = Gauge("flowturbo_gateway_kept_bytes", "Image files with an address", **own)
        kept.set_function(kept_bytes)

    def answered(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        """An answer is out. `status` 0 is none: the caller left. Unknown paths are one route."""
        route = getattr(scope.get("route"), "path", "other")
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
