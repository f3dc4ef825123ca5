"""Load tests of the service with the real perf_analyzer: `python -m bench.load`.

The scenarios are closed loop, open loop, mixed requests, overload, and time against work. Each
records the server's work too. Writes JSON, a report and plots (bench/load_report.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flowturbo_client import AsyncFlowTurboClient, FlowTurboClient, FlowTurboError, ServerBusyError

from bench import load_report, perf_analyzer
from bench.observe import described, described_server, hardware, observing, orchestration
from bench.perf_analyzer import Entry, Load, PerfAnalyzer, PerfAnalyzerError, entry
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.pipeline import read_pipeline
from flowturbo.serving.tritonserver import running_server
from flowturbo.textfile import read_json
from training.scenes.grammar import scenes

SCHEDULE = "H1P5R3"
HEUN = "H8"
OUTCOMES = ("answered", "refused", "failed")
_PROMPTS = 2000  # of glyph scenes, for a pipeline with prompts
Point = dict[str, Any]
Attempt = tuple[str, float]  # one of OUTCOMES, and its latency in ms


@dataclass(frozen=True)
class LoadConfig:
    """The points to measure. Each takes `seconds`, or `requests` if that is given."""

    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    seconds: float = 15.0
    requests: int | None = None
    heun_concurrency: tuple[int, ...] = (1, 8)
    capacity_shares: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)
    mix_concurrency: tuple[int, ...] = (1, 8)
    mix_images: tuple[int, ...] = (1, 2, 4)
    steps: tuple[int, ...] = (4, 8, 16, 24)
    images: tuple[int, ...] = (1, 2, 4, 8, 16)
    baseline_rounds: int = 5


QUICK = {
    "concurrency": (1, 4),
    "seconds": 2.0,
    "requests": 6,
    "heun_concurrency": (),
    "capacity_shares": (0.5,),
    "mix_concurrency": (1,),
    "mix_images": (1, 2),
    "steps": (2, 4),
    "images": (1, 2),
    "baseline_rounds": 1,
}


@dataclass
class Bench:
    """Measures points of `plan` on the server at `url` (host:port of its gRPC endpoint)."""

    tool: PerfAnalyzer
    url: str
    plan: LoadConfig
    max_inflight: int
    images: Images

    def closed_loop(self) -> list[Point]:
        """One image per request, default guidance."""
        wanted = [(SCHEDULE, n) for n in self.plan.concurrency]
        wanted += [(HEUN, n) for n in self.plan.heun_concurrency]
        return [
            {"schedule": schedule, "concurrency": n}
            | self._measure(
                f"{schedule}, {n} at a time", self.images.entries(1, schedule), concurrency=n
            )
            for schedule, n in wanted
        ]

    def open_loop(self, capacity: float) -> list[Point]:
        """Poisson arrivals at shares of `capacity` (images/s); one image per request."""
        return [
            {"schedule": SCHEDULE, "share": share, "rate": share * capacity}
            | self._measure(
                f"{share:.0%} of capacity",
                self.images.entries(1, SCHEDULE),
                rate=share * capacity,
            )
            for share in self.plan.capacity_shares
        ]

    def mix(self) -> list[Point]:
        """Requests with different schedules, image counts and guidance, in turn."""
        entries = mixed_entries(self.images, self.plan.mix_images)
        return [
            {"concurrency": n, "kinds": len(entries)}
            | self._measure(
                f"{len(entries)} kinds of request, {n} at a time", entries, concurrency=n
            )
            for n in self.plan.mix_concurrency
        ]

    def cost(self) -> dict[str, Any]:
        """A single request's time against its steps and its images, with fitted lines."""
        by_steps: list[Point] = [
            {"schedule": f"P{n}", "steps": n, "images": 1}
            | self._measure(f"P{n}, 1 image", self.images.entries(1, f"P{n}"), concurrency=1)
            for n in self.plan.steps
        ]
        by_images: list[Point] = [
            {"schedule": SCHEDULE, "images": n}
            | self._measure(
                f"{SCHEDULE}, {n} images", self.images.entries(n, SCHEDULE), concurrency=1
            )
            for n in self.plan.images
        ]
        return {
            variable: {
                "points": points,
                "line": fitted_line(
                    [p[variable] for p in points], [p["latency_ms"]["p50"] for p in points]
                ),
            }
            for variable, points in {"steps": by_steps, "images": by_images}.items()
        }

    def overload(self, capacity: float) -> Point:
        """Twice `capacity` (images/s), or more if a short run would not fill the server."""
        seconds, places = self.plan.seconds, self.max_inflight
        rate = 2 * capacity
        if capacity * seconds < 2 * places:
            rate += 2 * places / seconds
        if self.plan.requests is None:  # fill the server once: then memory grows only by leaks
            asyncio.run(offer(self.url, self.images, 1e3, places / 1e3))
        with observing(self.url, self.images.pipeline) as observer:
            attempts = asyncio.run(offer(self.url, self.images, rate, seconds))
        point: Point = {"schedule": SCHEDULE, "rate": rate, "seconds": seconds}
        point |= _outcomes(attempts) | {"capacity": capacity}
        point["server"] = described(observer.observation)
        memory = observer.observation.memory
        point["memory"] = [{"at_s": m.at_s, "resident_mib": m.resident / 2**20} for m in memory]
        print(f"overload, {rate:.1f} requests/s: {point['requests']}", flush=True)
        return point

    def _measure(self, name: str, entries: Sequence[Entry], **asked: Any) -> Point:
        load = Load(**asked, seconds=self.plan.seconds, requests=self.plan.requests)
        with observing(self.url, self.images.pipeline) as observer:
            result = perf_analyzer.run(self.tool, self.url, entries, load)
        point: Point = {"error": result.error, "requests": len(result.answers)}
        point["server"] = described(observer.observation)
        if not result.error:
            point["images_per_s"] = result.images_per_s()
            point["latency_ms"] = summary(result.latencies_ms)
            if load.concurrency == 1:
                mean_ms = point["latency_ms"]["mean"]
                point["orchestration"] = orchestration(observer.observation, mean_ms)
        print(f"{name}: {load_report.in_words(point)}", flush=True)
        return point


@dataclass(frozen=True)
class Images:
    """What requests to `pipeline` ask for: the first classes, or `prompts` that all differ."""

    pipeline: str
    prompts: tuple[str, ...] = ()

    @classmethod
    def of(cls, repository: Path, name: str | None) -> Images:
        """For pipeline `name` of `repository`; one with prompts gets those of glyph scenes."""
        pipeline = read_pipeline(repository, name)
        if isinstance(pipeline.condition, ClassLabel):
            return cls(pipeline.name)
        return cls(pipeline.name, tuple(scene.prompt() for scene in scenes(_PROMPTS, 13)))

    def entries(self, count: int, schedule: str, scale: float | None = None) -> list[Entry]:
        """Requests of `count` images each, to take turns."""
        if not self.prompts:
            return [entry(list(range(count)), schedule, scale, pipeline=self.pipeline)]
        starts = range(0, len(self.prompts) - count + 1, count)
        return [
            entry(self.prompts[k : k + count], schedule, scale, pipeline=self.pipeline)
            for k in starts
        ]

    def arguments(self, number: int, count: int = 1) -> dict[str, Any]:
        """Arguments of `generate` for request number `number`."""
        wanted: dict[str, Any] = {"pipeline": self.pipeline, "schedule": SCHEDULE}
        seeds = list(range(number, number + count))
        if not self.prompts:
            return {**wanted, "labels": list(range(count)), "seeds": seeds}
        texts = [self.prompts[seed % len(self.prompts)] for seed in seeds]
        return {**wanted, "prompts": texts, "seeds": seeds}


def mixed_entries(images: Images, image_counts: Sequence[int]) -> list[Entry]:
    """All combinations of three schedules, the image counts, and guidance off and on."""
    kinds = itertools.product((SCHEDULE, "H2P4R2", HEUN), image_counts, (1.0, 3.0))
    return [images.entries(n, schedule, scale)[0] for schedule, n, scale in kinds]


def summary(values: np.ndarray) -> dict[str, float]:
    """Mean, percentiles and maximum."""
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    found = {"mean": values.mean(), "p50": p50, "p95": p95, "p99": p99, "max": values.max()}
    return {name: float(value) for name, value in found.items()}


def fitted_line(counts: Sequence[float], times_ms: Sequence[float]) -> dict[str, float]:
    """Least-squares line: ms per unit, ms at zero, and the largest relative error."""
    x, y = np.array(counts, dtype=float), np.array(times_ms)
    slope, intercept = np.polyfit(x, y, 1)
    left = np.abs(y - np.polyval([slope, intercept], x)) / y
    return {
        "slope_ms": float(slope),
        "intercept_ms": float(intercept),
        "largest_relative_error": float(left.max()),
    }


async def offer(url: str, images: Images, rate: float, seconds: float) -> list[Attempt]:
    """Poisson arrivals at `rate` requests/s for `seconds`, without retries."""
    gaps = np.random.default_rng(0).exponential(1 / rate, max(1, round(rate * seconds)))
    async with AsyncFlowTurboClient(url, retries=0, timeout_s=120) as client:
        began_s = time.perf_counter()
        tasks = []
        for k, due_s in enumerate(np.cumsum(gaps)):
            await asyncio.sleep(max(0.0, began_s + due_s - time.perf_counter()))
            tasks.append(asyncio.create_task(_attempt(client, images.arguments(k))))
        return list(await asyncio.gather(*tasks))


async def _attempt(client: AsyncFlowTurboClient, wanted: dict[str, Any]) -> Attempt:
    started_s = time.perf_counter()
    outcome = "answered"
    try:
        await client.generate(**wanted)
    except ServerBusyError:
        outcome = "refused"
    except FlowTurboError:
        outcome = "failed"
    return outcome, 1e3 * (time.perf_counter() - started_s)


def _outcomes(attempts: Sequence[Attempt]) -> Point:
    latencies = {
        name: np.array([latency_ms for outcome, latency_ms in attempts if outcome == name])
        for name in OUTCOMES
    }
    return {
        "requests": {name: len(found) for name, found in latencies.items()},
        "latency_ms": {name: summary(found) for name, found in latencies.items() if len(found)},
    }


def measure(
    url: str, repository: Path, plan: LoadConfig, name: str | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the report several times, each time with more scenarios."""
    server, images = described_server(url, repository, name), Images.of(repository, name)
    tool = perf_analyzer.find_perf_analyzer()
    bench = Bench(tool, url, plan, int(server["settings"]["max_inflight"]), images)
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "server": server,
        "plan": asdict(plan),
        "pipeline": images.pipeline,
    }
    _warm_up(url, images)
    report["closed_loop"] = bench.closed_loop()
    report["capacity_images_per_s"] = capacity = _capacity(report["closed_loop"])
    yield report
    report["open_loop"] = bench.open_loop(capacity)
    report["mix"] = bench.mix()
    report["overload"] = bench.overload(capacity)
    yield report
    report["cost"] = bench.cost()
    yield report


def _capacity(points: Sequence[Point]) -> float:
    rates = [p["images_per_s"] for p in points if p["schedule"] == SCHEDULE and not p["error"]]
    if not rates:
        raise PerfAnalyzerError(f"no load point was answered: {points[0]['error']}")
    return float(max(rates))


def _warm_up(url: str, images: Images) -> None:
    with FlowTurboClient(url) as client:
        for count in (1, 2, 4, 8, 1, 1, 1):
            client.generate(**images.arguments(0, count))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--pipeline", help="pipeline of the repository (default: its default)")
    parser.add_argument("--url", help="gRPC endpoint of a running server of --repository")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/load.json"))
    parser.add_argument("--concurrency", type=int, nargs="+", help="default: 1 2 4 8 16 32")
    parser.add_argument("--seconds", type=float, help="per point (default: 15)")
    parser.add_argument("--quick", action="store_true", help="few points, few requests")
    parser.add_argument("--baseline", action="store_true", help="also compare with PyTorch")
    parser.add_argument(
        "--report-only", action="store_true", help="only write the report, from --out"
    )
    return parser.parse_args()


def _plan(args: argparse.Namespace) -> LoadConfig:
    chosen: dict[str, Any] = dict(QUICK) if args.quick else {}
    if args.concurrency:
        chosen["concurrency"] = tuple(args.concurrency)
    if args.seconds:
        chosen |= {"seconds": args.seconds, "requests": None}
    return LoadConfig(**chosen)


def main() -> None:
    """Measures and writes the report; with --report-only, only writes the report."""
    args = _arguments()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not args.report_only:
        plan = _plan(args)
        with contextlib.ExitStack() as stack:
            url = args.url or stack.enter_context(running_server(args.repository)).grpc
            for report in measure(url, args.repository, plan, args.pipeline):
                _write(args.out, report)
        if args.baseline:  # only this comparison needs PyTorch
            from bench import compare

            report["baseline"] = compare.run(args.repository, plan.baseline_rounds)
            compare.write(report["baseline"], args.out.with_name("compare.json"))
            _write(args.out, report)
    print(load_report.write(read_json(args.out), args.out))


def _write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
