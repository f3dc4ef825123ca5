"""The orchestrator's own Prometheus metrics, on Triton's metrics port.

Triton's request metrics end when `execute` returns, before a request has run. These cover the whole
request.

Each update of a metric is a round trip to the server, and all of Python waits for it. So updates
are collected, and a thread of their own passes them on. A tenth of a second later they can be read.
"""

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from flowturbo.contract import Role
from flowturbo.pipeline import UNKNOWN, Pipeline
from flowturbo.serving.outcomes import CODES

_EVERY_S = 0.1  # between two times that updates are passed on
_logger = logging.getLogger(__name__)
LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class TritonMetrics:
    """By pipeline: requests in flight, their latency and outcome, and the rows of each model.

    The names of the families start with that of the `orchestrator`.
    """

    def __init__(self, pipelines: Mapping[str, Pipeline], orchestrator: str) -> None:
        family, counter = pb_utils.MetricFamily, pb_utils.MetricFamily.COUNTER
        # A family must outlive its metrics.
        self._families = [
            family(f"{orchestrator}_requests_in_flight", "Requests being worked on", family.GAUGE),
            family(f"{orchestrator}_requests_total", "Requests by outcome", counter),
            family(f"{orchestrator}_rows_total", "Rows executed by model", counter),
            family(
                f"{orchestrator}_texts_total", "Texts by whether their encoding was kept", counter
            ),
            family(
                f"{orchestrator}_request_duration_seconds",
                "Time from arrival to answer of requests that succeeded",
                family.HISTOGRAM,
            ),
            family(
                f"{orchestrator}_work_seconds",
                "Device time that the requests in flight still need",
                family.GAUGE,
            ),
            family(
                f"{orchestrator}_block_seconds", "Time of a call by model and rows", family.GAUGE
            ),
        ]
        inflight, requests, rows, texts, duration, work, self._of_blocks = self._families
        self._work = work.Metric(labels={})
        self._blocks: dict[tuple[str, int], Any] = {}
        self._inflight = {p: inflight.Metric(labels={"pipeline": p}) for p in pipelines}
        self._requests = {
            (pipeline, outcome): requests.Metric(labels={"pipeline": pipeline, "outcome": outcome})
            for pipeline in (*pipelines, UNKNOWN)
            for outcome in ("ok", *CODES)
        }
        self._rows = {
            model: rows.Metric(labels={"pipeline": name, "model": model})
            for name, pipeline in pipelines.items()
            for model in map(pipeline.model, pipeline.models)
        }
        self._texts = {
            (name, result): texts.Metric(labels={"pipeline": name, "result": result})
            for name, pipeline in pipelines.items()
            for result in ("hit", "miss")
            if pipeline.has(Role.TEXT_ENCODER)
        }
        buckets = list(LATENCY_BUCKETS_S)
        self._duration = {
            p: duration.Metric(labels={"pipeline": p}, buckets=buckets)
            for p in (*pipelines, UNKNOWN)
        }

        # What was not passed on yet, by metric.
        self._levels: dict[Any, float] = {}
        self._counts: Counter[Any] = Counter()
        self._durations: list[tuple[Any, float]] = []
        self._block_seconds: dict[tuple[str, int], float] = {}
        self._changed = threading.Condition()  # and the lock of all these
        self._closed = threading.Event()
        # Updating one metric from two threads at once crashes the server (seen on 24.10).
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Passes on what is left, and ends the thread."""
        self._closed.set()
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def inflight(self, pipeline: str, count: int) -> None:
        """States how many requests of a pipeline are in flight now."""
        with self._changed:
            self._levels[self._inflight[pipeline]] = count
            self._changed.notify()

    def executed(self, pipeline: str, rows: Mapping[str, int]) -> None:
        """Counts the rows that each composed model executed for one request."""
        self._count({self._rows[model]: count for model, count in rows.items()})

    def encoded(self, pipeline: str, hits: int, misses: int) -> None:
        """Counts the texts of one request: kept encodings, and new ones."""
        self._count({self._texts[pipeline, "hit"]: hits, self._texts[pipeline, "miss"]: misses})

    def finished(self, pipeline: str, outcome: str, seconds: float) -> None:
        """Counts one answered request."""
        with self._changed:
            if outcome == "ok":
                self._durations.append((self._duration[pipeline], seconds))
        self._count({self._requests[pipeline, outcome]: 1})

    def planned(self, left_s: float, blocks: Mapping[tuple[str, int], float]) -> None:
        """States the work that is left, and the times of calls by model and rows."""
        with self._changed:
            self._levels[self._work] = left_s
            self._block_seconds.update(blocks)
            self._changed.notify()

    def _count(self, more: Mapping[Any, int]) -> None:
        with self._changed:
            self._counts.update(more)
            self._changed.notify()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_waiting or self._closed.is_set())
                if not self._is_waiting:
                    return
            self._closed.wait(_EVERY_S)
            try:
                self._pass_on()
            except Exception:
                _logger.exception("metrics could not be updated")

    @property
    def _is_waiting(self) -> bool:
        return bool(self._levels or self._counts or self._durations or self._block_seconds)

    def _pass_on(self) -> None:
        with self._changed:
            levels, self._levels = self._levels, {}
            counts, self._counts = self._counts, Counter()
            durations, self._durations = self._durations, []
            blocks, self._block_seconds = self._block_seconds, {}
        for metric, count in counts.items():
            metric.increment(count)
        for metric, seconds in durations:
            metric.observe(seconds)
        for (model, rows), seconds in blocks.items():
            if (model, rows) not in self._blocks:
                labels = {"model": model, "rows": str(rows)}
                self._blocks[model, rows] = self._of_blocks.Metric(labels=labels)
            self._blocks[model, rows].set(seconds)
        for metric, level in levels.items():
            metric.set(level)
