"""Finds the best schedules for a deployed model: `python -m tuning`.

Times are those of a single request, computed from block times. These are measured here, or read
from a report of bench.gpu_check (`--times`) for TensorRT and GPUs. The figure is the distance to
the exact solution of the flow: the RMS per latent, averaged over latents. With `--metric frechet`
the remaining schedules are rated by the Fréchet distance of their images. Latents and images always
come from the ONNX files, run in this process. Writes presets for `python -m export --presets`.
"""

import argparse
import datetime
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.capacity.block_times import BlockTimes
from bench.observe import hardware, write_json
from flowturbo.command import run_command
from flowturbo.contract import Role
from flowturbo.errors import FlowTurboError
from flowturbo.presets import DEFAULT, built_in
from flowturbo.settings import Settings
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.schedule import Schedule
from research.quality.engine import Engine, SamplingSpec, check_decoder
from research.quality.evaluate import Evaluator, Local, described, digests, models_digest
from research.quality.images import ImageFolder
from research.quality.metrics import BLOCKS
from tuning import choice, report
from tuning.candidates import Cost, candidates, check_images, measured
from tuning.choice import Rated
from tuning.scores import Distances, Score, solve
from tuning.search import finalists, search

CAP = 3  # times the paper's fast schedule: the time limit if no latency is given
MIN_LATENTS = 5 * BLOCKS  # the first stage uses a fifth of the latents
_ROUNDS = 5  # of timing; the front's schedules take turns


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    args = _parser().parse_args(argv)
    errors = (FlowTurboError, OSError, ValueError)
    return run_command("tune", lambda: print(_tune(args)), errors)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tuning", description=__doc__)
    add = parser.add_argument
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--latency-ms", type=float, help="maximum time per request")
    target.add_argument("--quality", type=float, help="figure to reach (lower is better)")
    add("--repository", type=Path, default=Path("model_repository"))
    add("--pipeline", help="pipeline of the repository (default: its default)")
    add("--images", type=int, default=1, help="images per timed request (default: 1)")
    add("--guidance-scale", type=float, help="default: the service's")
    add("--times", type=Path, help="block times, or a report of bench.gpu_check")
    add("--engine", help="engine to read from the report")
    add("--precision", help="precision to read from the report")
    add("--metric", choices=("distance", "frechet"), default="distance")
    add(
        "--latents",
        type=int,
        default=60,
        help=f"latents for the distance, {MIN_LATENTS} or more (default: 60)",
    )
    add(
        "--predictor",
        type=Path,
        help="checkpoint for the exact solution (default: the deployed one)",
    )
    add("--judged", type=int, default=1000, help="images per Fréchet distance (default: 1000)")
    add(
        "--finalists",
        type=int,
        default=12,
        help="schedules rated by it, at least the whole front (default: 12)",
    )
    add(
        "--weights",
        type=Path,
        default=Path("weights/glyphs"),
        help="folder of the glyphs' classifier",
    )
    add("--inception", type=Path, help="pt_inception-2015-12-05-6726825d.pth")
    add("--reference", type=Path, help="real images: an .npz in ADM's layout, or a folder")
    add(
        "--cache",
        type=Path,
        default=Path("runs/tune"),
        help="folder for exact solutions and images",
    )
    add(
        "--out",
        type=Path,
        default=Path("output/presets.json"),
        help="presets; a .png is written beside them",
    )
    return parser


def _tune(args: argparse.Namespace) -> str:
    """Searches and writes the presets; returns the report for the user."""
    if args.latents < MIN_LATENTS:
        raise ValueError(f"--latents must be at least {MIN_LATENTS}, got {args.latents}")
    if args.judged < MIN_LATENTS:
        raise ValueError(f"--judged must be at least {MIN_LATENTS}, got {args.judged}")
    if not math.isfinite(args.latency_ms or 0.0):
        raise ValueError(f"--latency-ms must be a finite number, got {args.latency_ms:g}")
    pipeline = Engine(args.repository, args.pipeline)
    scale = args.guidance_scale
    if scale is None:
        scale = pipeline.pipeline.default_guidance_scale(pipeline.settings)
    guidance = Guidance(scale)
    elsewhere = runs_elsewhere(args.repository, pipeline)
    check_images(args.images, guidance, pipeline.pipeline, Settings.load(args.repository))
    cost = Cost.of(_times(args, pipeline, guidance, elsewhere), args.images, guidance)
    paper = built_in(has_refiner=pipeline.pipeline.has(Role.REFINER))[DEFAULT]
    cap_ms = CAP * cost.ms(paper) if args.latency_ms is None else args.latency_ms
    judge = None
    if args.metric == "frechet":  # fail fast, before the search
        check_decoder(args.repository, pipeline.pipeline)
        judge = Evaluator.open(args.weights, args.inception, args.reference, pipeline.subject)
    stages, metric = _search(args, pipeline, guidance, cost, paper, cap_ms)
    tried, dropped = stages[-1], [each for stage in stages[:-1] for each in stage]
    if judge:
        tried, metric = _judged(args, pipeline, judge, tried, paper, guidance), "Fréchet distance"
    found = choice.choose(tried, paper, cap_ms, args.quality, dropped)
    times_of = str(args.times) if args.times else "this process"
    figures_of = f"the ONNX files in {pipeline.pipeline.runtime}, in this process"
    stated = {
        **found.stated(),
        "target": {"latency_ms": args.latency_ms, "quality": args.quality, "cap_ms": cap_ms},
        "metric": metric,
        "latents": args.latents,
        "judged": args.judged if args.metric == "frechet" else None,
        "images": args.images,
        "guidance_scale": guidance.scale,
        "times_of": times_of,
        "figures_of": figures_of,
        **_circumstances(args.repository, pipeline, cost),
    }
    write_json(stated, args.out)
    labels = f"ms per request, images: {args.images}", metric
    report.draw(tried, found, labels, args.out.with_suffix(".png"))
    clocked = None
    if not elsewhere:
        clocked = in_process_ms(pipeline, [r.schedule for r in found.front], guidance, args.images)
    head = f"{metric}; images: {args.images}, guidance {guidance.scale:g}, up to {cap_ms:.1f} ms"
    whose = f"times: {times_of}; figures: {figures_of}"
    written = f"written: {args.out} and a .png"
    return "\n".join([head, whose, report.table(found, clocked), written])


def runs_elsewhere(repository: Path, pipeline: Engine) -> str | None:
    """Where the service runs the blocks, if `pipeline` here runs them differently."""
    if pipeline.pipeline.predictor.engine == "tensorrt":
        return "in TensorRT"
    # PyTorch in this process runs no CUDA graphs.
    differs = pipeline.pipeline.runtime == "torch" or not pipeline.on_gpu
    return "on a GPU" if pipeline.pipeline.on_gpu and differs else None


def _times(
    args: argparse.Namespace, pipeline: Engine, guidance: Guidance, elsewhere: str | None
) -> BlockTimes:
    if args.times:
        times = BlockTimes.read(args.times, args.engine, args.precision)
        if missing := set(pipeline.pipeline.generating) - times.times_ms.keys():
            raise ValueError(f"{args.times} has no times of {min(missing)}")
        return times
    if args.engine or args.precision:
        raise ValueError("--engine and --precision select from a report: give it with --times")
    if elsewhere:
        raise ValueError(
            f"{args.repository} runs {elsewhere}, whose times this process cannot measure: give "
            "a report of bench.gpu_check from there with --times"
        )
    return measured(args.repository, pipeline.pipeline.name, args.images, guidance)


def _search(
    args: argparse.Namespace,
    pipeline: Engine,
    guidance: Guidance,
    cost: Cost,
    paper: Schedule,
    cap_ms: float,
) -> tuple[list[list[Rated]], str]:
    """The stages of the search up to `cap_ms`, which always include `paper`; and the metric.

    Raises ValueError if no schedule is fast enough.
    """
    learned = pipeline.pipeline.learned_at(guidance.scale)
    listed = candidates(has_refiner=pipeline.pipeline.has(Role.REFINER), learned=learned)
    every = {schedule: cost.ms(schedule) for schedule in listed}
    fastest = min(every, key=lambda schedule: every[schedule])
    if every[fastest] > cap_ms:
        raise ValueError(
            f"no schedule takes {cap_ms:g} ms or less; the fastest, {fastest}, takes "
            f"{every[fastest]:.1f} ms"
        )
    within = {schedule: ms for schedule, ms in every.items() if ms <= cap_ms}
    whose, solved = solve(
        pipeline, args.repository, args.predictor, guidance, args.latents, args.cache
    )
    score = Distances(pipeline, guidance, solved).score
    stages = search(within | {paper: cost.ms(paper)}, score, args.latents, [paper])
    return stages, f"distance to {whose}"


def _judged(
    args: argparse.Namespace,
    engine: Engine,
    eyes: Evaluator,
    tried: Sequence[Rated],
    paper: Schedule,
    guidance: Guidance,
) -> list[Rated]:
    """The finalists of `tried`, and `paper`, rated by the Fréchet distance of their images."""
    found = []
    for each in finalists(tried, args.finalists, [paper]):
        spec = SamplingSpec(str(each.schedule), guidance.scale, variant=engine.settings.variant)
        said = described(spec, args.repository, "process", engine.pipeline.name)
        path = args.cache / "_".join([str(spec), *digests(said).values()])
        folder = ImageFolder(path, said, engine.subject)
        folder.fill(args.judged, Local(engine, spec))
        figures = eyes.figures(folder, args.judged)
        score = Score(figures.frechet_distance, figures.frechet_distance_without_block)
        found.append(Rated(each.schedule, each.ms, score))
    return found


def in_process_ms(
    pipeline: Engine, schedules: Sequence[Schedule], guidance: Guidance, images: int
) -> list[float]:
    """Median milliseconds per request to `pipeline`, by schedule; schedules take turns."""
    seeds = np.arange(images)
    asked = pipeline.subject.asked(seeds)
    taken: list[list[float]] = []
    for _ in range(_ROUNDS):
        taken.append([])
        for schedule in schedules:
            started = time.perf_counter()
            pipeline.generate(
                seed=seeds, schedule=str(schedule), guidance_scale=guidance.scale, **asked
            )
            taken[-1].append(1e3 * (time.perf_counter() - started))
    return [statistics.median(of_schedule) for of_schedule in zip(*taken, strict=True)]


def _circumstances(repository: Path, pipeline: Engine, cost: Cost) -> dict[str, Any]:
    return {
        "block_ms": cost.block_ms,
        "overhead_ms": cost.overhead_ms,
        "hardware": hardware(),
        "precision": pipeline.pipeline.precision,
        "runtime": pipeline.pipeline.runtime,
        "variant": pipeline.settings.variant,
        "models": models_digest(repository, pipeline.pipeline.name),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
