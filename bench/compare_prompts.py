"""Compares the service with diffusers' pipeline behind FastAPI: `python -m bench.compare_prompts`.

Both have the same weights, the same number of predictor evaluations, guidance scale, text length
and noise. Clients send their next request as soon as they have their answer. In each round one
contender runs at a time; the other idles. A ratio compares two figures of one round. Prompts are
all different, or all from a small set. Writes a JSON file and a table.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flowturbo_client import FlowTurboClient

from bench.closed_loop import Measured, closed_loop
from bench.compare_report import SERVICE, faster
from bench.observe import hardware, spread, write_json
from bench.web import WebClient, running_web
from flowturbo.command import run_command
from flowturbo.errors import FlowTurboError, RepositoryError
from flowturbo.pipeline import read_pipeline
from flowturbo.serving.tritonserver import running_server
from flowturbo.settings import Settings
from flowturbo.solver.calls import Network
from flowturbo.solver.program import compile_program
from flowturbo.solver.schedule import Schedule
from training.scenes.grammar import scenes

_SET = 16  # prompts of the small set
_PROMPTS = 50_000  # more than a run asks for
Ask = Callable[[str, int], np.ndarray]  # a prompt and a seed to images [1, H, W, 3]


@dataclass(frozen=True)
class Figure:
    """The result of one contender in one round."""

    round: int
    prompts: str
    contender: str
    images_per_s: float
    p50_ms: float
    p95_ms: float


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare_prompts", description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--pipeline", default="scenes", help="pipeline of the repository")
    parser.add_argument("--folder", type=Path, default=Path("weights/scenes/model"))
    parser.add_argument("--schedule", default="A8", help="schedule of the service")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="window per measurement")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], help="of diffusers")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/compare_prompts.json"))
    args = parser.parse_args(argv)
    return run_command("compare_prompts", lambda: _run(args), (FlowTurboError, OSError))


def _run(args: argparse.Namespace) -> None:
    report = compare(args)
    write_json(report, args.out)
    text = f"# Compared with diffusers behind FastAPI\n\n{table(report)}"
    args.out.with_suffix(".md").write_text(text)
    print(text)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all contenders in turns; returns the report."""
    pipeline = read_pipeline(args.repository, args.pipeline)
    if pipeline.on_gpu:
        raise RepositoryError(f"{args.repository} must run on the CPU, like PyTorch")
    scale = pipeline.default_guidance_scale(Settings.load(args.repository))
    steps = compile_program(Schedule.parse(args.schedule)).evaluations(Network.PREDICTOR)
    every = [scene.prompt() for scene in scenes(_PROMPTS, 11)]
    kinds = {"different": every, "repeated": every[:_SET]}
    figures: list[Figure] = []
    with _contenders(args, steps, scale) as (contenders, difference):
        for ask in contenders.values():
            _measure(ask, every[-50:], args.clients, 0.5)  # fills all caches
        for index in range(args.rounds):
            for (kind, prompts), (name, ask) in itertools.product(
                kinds.items(), contenders.items()
            ):
                # Other prompts in each round: a text that was encoded before is not encoded again.
                start = index * _PROMPTS // args.rounds if kind == "different" else 0
                found = _measure(ask, prompts[start:], args.clients, args.seconds)
                figures.append(
                    Figure(
                        index,
                        kind,
                        name,
                        found.images_per_s,
                        found.percentile(50),
                        found.percentile(95),
                    )
                )
                print(f"{index + 1}/{args.rounds} {kind} {name}: {found.images_per_s:.1f}/s")
    return {
        "settings": {
            "processor": hardware()["cpu"],
            "threads": len(os.sched_getaffinity(0)),
            "torch": torch.__version__,
            "service_precision": pipeline.precision,
            "schedule": args.schedule,
            "evaluations": steps,
            "guidance_scale": scale,
            "clients": args.clients,
            "rounds": args.rounds,
            "seconds": args.seconds,
            "mean_difference_levels": difference,
        },
        "rounds": [vars(figure) for figure in figures],
        "summary": [_summary(kind, name, figures) for kind in kinds for name in contenders],
    }


@contextlib.contextmanager
def _contenders(
    args: argparse.Namespace, steps: int, scale: float
) -> Iterator[tuple[dict[str, Ask], float]]:
    """What answers a prompt, by name; the largest mean image difference with Euler (levels)."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(running_server(args.repository)).grpc
        service = stack.enter_context(FlowTurboClient(url, timeout_s=600, retries=0))

        def served(prompt: str, seed: int, schedule: str = args.schedule) -> np.ndarray:
            images = service.generate(
                None, [seed], schedule, scale, prompts=[prompt], pipeline=args.pipeline
            ).images
            assert images is not None  # asked for by default
            return images

        found: dict[str, Ask] = {SERVICE: served}
        difference = 0.0
        for precision in args.precision:
            threads = len(os.sched_getaffinity(0))
            how = (args.folder, threads, False, precision)
            port = stack.enter_context(running_web(*how, diffusers=True))
            web = stack.enter_context(WebClient(port))

            def asked(prompt: str, seed: int, web: WebClient = web) -> np.ndarray:
                wanted = {"prompts": [prompt], "seeds": [seed], "steps": steps}
                return web.post(**wanted, guidance_scale=scale)

            found[f"FastAPI, diffusers {precision}"] = asked
            for k, scene in enumerate(scenes(8, 12)):
                one, other = asked(scene.prompt(), k), served(scene.prompt(), k, f"E{steps}@1")
                apart = float(np.abs(one.astype(int) - other.astype(int)).mean())
                difference = max(difference, apart)
        yield found, difference


def _measure(ask: Ask, prompts: Sequence[str], clients: int, seconds: float) -> Measured:
    numbers = itertools.count()

    def call() -> object:
        number = next(numbers)
        return ask(prompts[number % len(prompts)], number)

    return closed_loop(call, clients, seconds)


def _summary(kind: str, name: str, figures: Sequence[Figure]) -> dict[str, Any]:
    """Medians over the rounds, and the ratio of the service to it, each within one round."""
    mine = [f for f in figures if (f.prompts, f.contender) == (kind, name)]
    service = [f for f in figures if (f.prompts, f.contender) == (kind, SERVICE)]
    ratios = [s.images_per_s / m.images_per_s for m, s in zip(mine, service, strict=True)]
    medians = {
        key: statistics.median(getattr(figure, key) for figure in mine)
        for key in ("images_per_s", "p50_ms", "p95_ms")
    }
    return {"prompts": kind, "contender": name, "ratio": spread(ratios), **medians}


def table(report: dict[str, Any]) -> str:
    """The summary as a table, after a paragraph on hardware and settings."""
    s = report["settings"]
    lines = [
        f"{s['clients']} clients, {s['threads']} cores of {s['processor']}, PyTorch {s['torch']}, "
        f"the service in {s['service_precision']}. The service runs {s['schedule']}, diffusers "
        f"Euler: both evaluate the predictor {s['evaluations']} times at guidance "
        f"{s['guidance_scale']:g}. Medians of {s['rounds']} rounds of {s['seconds']:g} s. Every "
        "contender has all cores while it runs. With Euler's steps the service makes the same "
        f"images: they differ by at most {s['mean_difference_levels']:.2f} of 255 levels (mean).",
        "",
        "| prompts | contender | images/s | p50 ms | p95 ms | service is faster by |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["summary"]:
        lines.append(
            f"| {row['prompts']} | {row['contender']} | {row['images_per_s']:.1f} "
            f"| {row['p50_ms']:.0f} | {row['p95_ms']:.0f} "
            f"| {faster(row)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
