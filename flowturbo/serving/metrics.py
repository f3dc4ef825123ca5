"""The orchestrator's own Prometheus metrics, on Triton's metrics port.

Triton's request metrics end when `execute` returns, before a request has run. These cover the whole
request.

They lag by a tenth of a second (flowturbo.serving.updates).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import triton_python_backend_utils as pb_utils

from flowturbo.contract import Role
from flowturbo.pipeline import UNKNOWN, Pipeline
from flowturbo.serving.outcomes import CODES
from flowturbo.serving.updates import Updates

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

        self._updates = Updates()

    def close(self) -> None:
        """Makes the updates that are left."""
        self._updates.close()

    def inflight(self, pipeline: str, count: int) -> None:
        """States how many requests of a pipeline are in flight now."""
        self._updates.level(self._inflight[pipeline], count)

    def executed(self, pipeline: str, rows: Mapping[str, int]) -> None:
        """Counts the rows that each composed model executed for one request."""
        for model, count in rows.items():
            self._updates.count(self._rows[model], count)

    def encoded(self, pipeline: str, hits: int, misses: int) -> None:
        """Counts the texts of one request: kept encodings, and new ones."""
        self._updates.count(self._texts[pipeline, "hit"], hits)
        self._updates.count(self._texts[pipeline, "miss"], misses)

    def finished(self, pipeline: str, outcome: str, seconds: float) -> None:
        """Counts one answered request."""
        self._updates.count(self._requests[pipeline, outcome], 1)
        if outcome == "ok":
            self._updates.observe(self._duration[pipeline], seconds)

    def planned(self, left_s: float, blocks: Mapping[tuple[str, int], float]) -> None:
        """States the work that is left, and the times of calls by model and rows."""
        self._updates.level(self._work, left_s)
        for key, seconds in blocks.items():
            self._updates.run(partial(self._state, key, seconds))

    def _state(self, key: tuple[str, int], seconds: float) -> None:
        if key not in self._blocks:
            labels = {"model": key[0], "rows": str(key[1])}
            self._blocks[key] = self._of_blocks.Metric(labels=labels)
        self._blocks[key].set(seconds)
