"""Computes the GPUs that a rate needs: `python -m bench.capacity --slo-p95-ms 500 --rate 2000`.

The times of each block at each batch size are measured here or read from a file. The program then
simulates one replica: an orchestrator that batches the calls of all in-flight requests, on one
device. docs/sizing.md has the model, its assumptions, and where they break.
"""

import argparse
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.capacity.block_times import BlockTimes, measure
from bench.capacity.plan import check, plan
from bench.capacity.replica import Replica
from bench.capacity.report import plot, print_check, print_plan
from flowturbo.errors import FlowTurboError
from flowturbo.pipeline import read_pipeline
from flowturbo.presets import BUILT_IN, DEFAULT
from flowturbo.settings import Settings
from flowturbo.textfile import read_json


def main() -> None:
    """Prints the plan, the comparison with a measured load curve, or both."""
    parser = _parser()
    args = parser.parse_args()
    if args.slo_p95_ms is None and args.check is None:
        parser.error("--slo-p95-ms or --check is needed")
    try:
        report = _report(args)
    except KeyError as error:
        parser.error(f"{args.check or args.times} lacks {error}")
    except (FlowTurboError, ValueError, OSError) as error:
        parser.error(str(error))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        # JSON has no infinity; a percentile is infinite if too many requests are refused.
        finite = json.loads(json.dumps(report), parse_constant=lambda _: None)
        args.json.write_text(json.dumps(finite, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.capacity", description=__doc__)
    parser.add_argument("--slo-p95-ms", type=float, help="latency limit for 95%% of the requests")
    parser.add_argument("--rate", type=float, help="images/s that the fleet must make")
    parser.add_argument(
        "--schedule", help="default: the repository's, or with --times the paper's H1P5R3"
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        help="default: the repository's, or 1.5 with --times",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--repository", type=Path, default=Path("model_repository"))
    source.add_argument("--times", type=Path, help="block times, or a report of bench.gpu_check")
    parser.add_argument("--engine", help="engine to read from the report")
    parser.add_argument("--precision", help="precision to read from the report")
    parser.add_argument("--overhead-ms", type=float, help="per call, outside the device")
    parser.add_argument("--max-rows", type=int, help="default: the repository's, or all measured")
    parser.add_argument(
        "--turns", action="store_true", help="with --times: models take turns, as on a CPU"
    )
    parser.add_argument("--requests", type=int, default=4000, help="per simulated load")
    parser.add_argument("--check", type=Path, help="compare with this load curve of bench.load")
    parser.add_argument("--json", type=Path, help="write everything here, and a plot beside it")
    return parser


def _report(args: argparse.Namespace) -> dict[str, Any]:
    settings = Settings() if args.times else Settings.load(args.repository)
    times = _times(args)
    guidance, schedule = settings.default_guidance_scale, BUILT_IN[DEFAULT]
    if not args.times:
        pipeline = read_pipeline(args.repository)
        guidance = pipeline.default_guidance_scale(settings)
        schedule = str(pipeline.default_schedule(settings))
    replica_of = partial(
        Replica.of,
        times,
        guidance_scale=guidance if args.guidance_scale is None else args.guidance_scale,
        max_rows=args.max_rows or min(times.max_rows, 64),
        max_inflight=settings.max_inflight,
        turns=args.turns or not (args.times or read_pipeline(args.repository).on_gpu),
    )
    # In the form of --times: a report can be the input of another run.
    report: dict[str, Any] = asdict(times)
    if args.slo_p95_ms is not None:
        schedule = args.schedule or schedule
        found = plan(replica_of(schedule), args.slo_p95_ms, args.rate, args.requests)
        report |= {"schedule": schedule, "plan": asdict(found)}
        print_plan(found, schedule)
        if args.json:
            plot(found, schedule, args.json.with_suffix(".png"))
    if args.check:
        checked = check(read_json(args.check), replica_of)
        report["check"] = [asdict(c) for c in checked]
        print_check(checked)
    return report


def _times(args: argparse.Namespace) -> BlockTimes:
    if args.times:
        times = BlockTimes.read(args.times, args.engine, args.precision)
    else:
        times = BlockTimes(measure(args.repository))
    if args.overhead_ms is not None:
        times = replace(times, overhead_ms=args.overhead_ms)
    return times


if __name__ == "__main__":
    main()
