"""Compares the service with PyTorch and FastAPI on this machine: `python -m bench.compare`.

For a single client the contenders are the service and PyTorch in process, eager and compiled. For
concurrent clients they are the service and FastAPI around the same PyTorch code. In each round one
contender runs at a time; the others idle. A ratio compares two figures of one round. Writes a JSON
file and a plot.
"""

import argparse
import contextlib
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flowturbo_client import FlowTurboClient

from bench.closed_loop import Measured, Work, closed_loop, torch_process
from bench.compare_report import SERVICE, markdown, plot
from bench.observe import hardware, spread
from bench.web import WebClient, running_web
from flowturbo.contract import Role
from flowturbo.errors import RepositoryError
from flowturbo.pipeline import read_pipeline
from flowturbo.presets import BUILT_IN, DEFAULT
from flowturbo.serving.tritonserver import running_server
from flowturbo.settings import Settings

LONE_SHARE = 0.5  # of the window for concurrent clients: latencies of a single client vary less

Measure = Callable[[Work, int, float], Measured]


@dataclass(frozen=True)
class Case:
    """`clients` clients, each of which repeats `work`."""

    work: Work
    clients: int

    @property
    def alone(self) -> bool:
        return self.clients == 1

    def __str__(self) -> str:
        images = "1 image" if self.work.images == 1 else f"{self.work.images} images"
        return f"{self.work.schedule}, {images}, {self.clients} client{'s' * (not self.alone)}"


@dataclass(frozen=True)
class Form:
    """How PyTorch runs: eager or compiled, and the precision."""

    compiled: bool
    precision: str

    def __str__(self) -> str:
        return f"{'compiled' if self.compiled else 'eager'} {self.precision}"


@dataclass(frozen=True)
class Figure:
    """The result of one contender in one case of one round. Latencies are per request.

    For a single client, `ms_per_image` is the median latency divided by the images per request. For
    concurrent clients it is 1000 / `images_per_s`.
    """

    round: int
    case: str
    contender: str
    requests: int
    images_per_s: float
    ms_per_image: float
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True)
class CompareConfig:
    """What is compared. `seconds` is the window for concurrent clients; one client has half."""

    repository: Path
    weights: Path
    rounds: int
    seconds: float
    clients: int
    forms: tuple[Form, ...]
    cases: tuple[Case, ...]
    threads: int

    @classmethod
    def of(
        cls,
        repository: Path,
        rounds: int,
        *,
        weights: Path = Path("weights/glyphs"),
        seconds: float = 10.0,
        clients: int = 8,
        batches: Sequence[int] = (1, 8),
        forms: Sequence[Form] = (),
    ) -> "CompareConfig":
        """`batches` are images per request of a single client, `clients` the concurrent clients.

        `forms` defaults to eager and compiled in float32. A bfloat16 repository adds both in
        bfloat16.

        Raises RepositoryError for a repository that runs on a GPU or has no decoder or refiner.
        """
        pipeline = read_pipeline(repository)
        if pipeline.on_gpu or not (pipeline.has(Role.DECODER) and pipeline.has(Role.REFINER)):
            raise RepositoryError(
                f"{repository} must have a refiner and a decoder, and run on the CPU, like PyTorch"
            )
        settings = Settings.load(repository)
        paper, scale = BUILT_IN[DEFAULT], pipeline.default_guidance_scale(settings)
        precisions = ["fp32"] + ["bf16"] * (pipeline.precision == "bf16")
        usual = [
            Form(compiled, precision) for precision in precisions for compiled in (False, True)
        ]
        works = [Work(schedule, n, scale) for schedule in (paper, "H8") for n in batches]
        return cls(
            repository,
            weights,
            rounds,
            seconds,
            clients,
            tuple(forms or usual),
            (*(Case(work, 1) for work in works), Case(Work(paper, 1, scale), clients)),
            len(os.sched_getaffinity(0)),
        )


def run(repository: Path, rounds: int, **options: Any) -> dict[str, Any]:
    """Compares and returns the report. `options` are those of `CompareConfig.of`.

    `rounds` has every `Figure`. `summary` has the ratio to the service per case and contender, with
    median, min and max over the rounds. Above 1 the service is faster. The ratio compares median
    latency for a single client, and images/s for concurrent clients. `markdown` has both as text.
    """
    plan = CompareConfig.of(repository, rounds, **options)
    figures: list[Figure] = []
    with _contenders(plan) as (alone, together, difference):
        turns = [
            (case, name, measure)
            for case in plan.cases
            for name, measure in (alone if case.alone else together).items()
        ]
        for case, _, measure in turns:
            measure(case.work, case.clients, 0.01)  # compiles, and fills all caches
        for index in range(plan.rounds):
            for case, name, measure in turns:
                seconds = plan.seconds * (LONE_SHARE if case.alone else 1.0)
                found = measure(case.work, case.clients, seconds)
                figures.append(_figure(index, case, name, found))
    report: dict[str, Any] = {
        "settings": _settings(plan) | {"mean_difference_levels": difference},
        "rounds": [asdict(figure) for figure in figures],
        "summary": [_summary(case, name, figures) for case, name, _ in turns],
    }
    return report | {"markdown": markdown(report)}


@contextlib.contextmanager
def _contenders(
    plan: CompareConfig,
) -> Iterator[tuple[dict[str, Measure], dict[str, Measure], float]]:
    """Contenders for one client and for many; the largest mean image difference (levels)."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(running_server(plan.repository)).grpc
        service = stack.enter_context(FlowTurboClient(url, timeout_s=600, retries=0))
        alone: dict[str, Measure] = {SERVICE: _driving(service.generate)}
        together = dict(alone)
        difference = 0.0
        expected = service.generate(*plan.cases[0].work.arguments()).images
        for form in plan.forms:
            how = (plan.weights, plan.threads, form.compiled, form.precision)
            alone[f"PyTorch {form}"] = stack.enter_context(torch_process(*how)).measure
            port = stack.enter_context(running_web(*how))
            web = stack.enter_context(WebClient(port))
            together[f"FastAPI, PyTorch {form}"] = _driving(web.generate)
            found = web.generate(*plan.cases[0].work.arguments())
            assert expected is not None  # images were asked for
            levels = np.abs(found.astype(int) - expected.astype(int)).mean()
            difference = max(difference, float(levels))
        yield alone, together, difference


def _driving(generate: Callable[..., object]) -> Measure:
    """`closed_loop` over a client's `generate`."""

    def measure(work: Work, clients: int, seconds: float) -> Measured:
        wanted = work.arguments()
        return closed_loop(lambda: generate(*wanted), clients, seconds, work.images)

    return measure


def _figure(index: int, case: Case, contender: str, found: Measured) -> Figure:
    p50_ms = found.percentile(50)
    return Figure(
        round=index,
        case=str(case),
        contender=contender,
        requests=len(found.latencies_ms),
        images_per_s=found.images_per_s,
        ms_per_image=p50_ms / case.work.images if case.alone else 1e3 / found.images_per_s,
        p50_ms=p50_ms,
        p95_ms=found.percentile(95),
    )


def _summary(case: Case, contender: str, figures: Sequence[Figure]) -> dict[str, Any]:
    """Medians over the rounds, and ratios to the service, each within one round."""
    mine = [f for f in figures if (f.case, f.contender) == (str(case), contender)]
    service = [f for f in figures if (f.case, f.contender) == (str(case), SERVICE)]
    if case.alone:
        ratios = [m.p50_ms / s.p50_ms for m, s in zip(mine, service, strict=True)]
    else:
        ratios = [s.images_per_s / m.images_per_s for m, s in zip(mine, service, strict=True)]
    medians = {
        key: statistics.median(getattr(figure, key) for figure in mine)
        for key in ("images_per_s", "ms_per_image", "p50_ms", "p95_ms")
    }
    return {
        "case": str(case),
        "contender": contender,
        "compared": "median latency" if case.alone else "images per second",
        "ratio": spread(ratios),
        **medians,
    }


def _settings(plan: CompareConfig) -> dict[str, Any]:
    pipeline = read_pipeline(plan.repository)
    return {
        "processor": hardware()["cpu"],
        "threads": plan.threads,
        "torch": torch.__version__,
        "service_precision": pipeline.precision,
        "guidance_scale": plan.cases[0].work.guidance_scale,
        "rounds": plan.rounds,
        "seconds": plan.seconds,
    }


def main() -> None:
    """Compares, prints the table, and writes report and plot."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--weights", type=Path, default=Path("weights/glyphs"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="measurement window of concurrent clients"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/compare.json"))
    args = parser.parse_args()
    report = run(args.repository, args.rounds, weights=args.weights, seconds=args.seconds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(write(report, args.out))


def write(report: dict[str, Any], path: Path) -> str:
    """Writes the report to `path` (JSON), with text and plot beside it; returns the text."""
    path.write_text(json.dumps(report, indent=1) + "\n")
    plot(report, path.with_suffix(".png"))
    picture = f"![Time per image of one client, throughput of concurrent clients]({path.stem}.png)"
    text = f"# Compared with PyTorch and FastAPI\n\n{report['markdown']}\n{picture}\n"
    path.with_suffix(".md").write_text(text)
    return text


if __name__ == "__main__":
    main()
