"""Measures image quality against time: `python -m research.study`.

Measures every point of research/study/points.py. A point is timed in turns with H8. Its latents are
compared with the exact solution of the flow, its images with real ones. Each point is written to
the JSON file at once and is not measured again; existing images are kept. Fails if the JSON file
has other models or settings. Measures a point again if its refiner has changed.
At the end it writes a report. `--report-only` writes the report from the JSON file, without any
measurement.
"""

import argparse
import datetime
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.observe import processor, write_json
from flowturbo.contract import Role
from flowturbo.errors import FlowTurboError
from flowturbo.pipeline import read_pipeline
from flowturbo.settings import Settings
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.schedule import Schedule
from flowturbo.textfile import read_json
from research.quality.engine import BATCH, Engine, Exact, check_decoder, schedule_evaluations
from research.quality.evaluate import Evaluator, described, measured_with, models_digest
from research.study import report
from research.study.measure import BASELINE, Bench, stability
from research.study.points import MAIN, Point, Size, sections_of, unique
from research.study.refiners import FOLDER, REFINERS

STABILITY_IMAGES = 36
# Costs per image in predictor evaluations, to estimate the time only: of dopri5, of an exact
# solution in float32, and of one refiner evaluation.
_ADAPTIVE_EVALUATIONS, _EXACT_EVALUATIONS, _REFINER_COST = 100.0, 200.0, 0.2

_FORM = ("engine", "runtime", "precision")  # equal in all repositories of a study

Study = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Measures the missing points and writes the report.

    Returns the exit status: 2, with one line on stderr, for an error that the user can correct.
    """
    args = _parser().parse_args(argv)
    try:
        if args.rounds < 1:
            raise ValueError(f"--rounds must be 1 or more, got {args.rounds}")
        known = args.report_only or args.json.exists()
        study: Study = read_json(args.json) if known else {"points": {}}
        if not args.report_only:
            _measure(study, args)
        print(report.write(study, args.json, args.report))
    except (FlowTurboError, OSError, ValueError, re.error) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m research.study", description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument(
        "--refiners",
        type=Path,
        default=FOLDER,
        help="repositories with the same predictor and other refiners (research.study.refiners)",
    )
    parser.add_argument("--weights", type=Path, default=Path("weights/glyphs"))
    parser.add_argument(
        "--predictor", type=Path, help="the predictor's checkpoint; default: the one in --weights"
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=1.0,
        help="guidance scale of most points (default: 1, no guidance)",
    )
    parser.add_argument(
        "--guided-scale",
        type=float,
        help="guidance scale of the sections about guidance (default: the service's)",
    )
    parser.add_argument("--inception", type=Path, help="pt_inception-2015-12-05-6726825d.pth")
    parser.add_argument("--reference", type=Path, help="real images: ADM's .npz, or a folder")
    parser.add_argument(
        "--images", type=int, default=Size.curves, help="images per point of the curves"
    )
    parser.add_argument(
        "--other-images", type=int, default=Size.others, help="images per other point"
    )
    parser.add_argument("--rounds", type=int, default=6, help=f"timed batches of {BATCH} images")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="measure points whose name matches"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="keeps images")
    parser.add_argument("--json", type=Path, default=Path("output/study.json"))
    parser.add_argument("--report", type=Path, default=Path("output/study.md"))
    parser.add_argument(
        "--report-only", action="store_true", help="write the report from --json, measure nothing"
    )
    return parser


def _measure(study: Study, args: argparse.Namespace) -> None:
    guided = args.guided_scale
    if guided is None:
        served = Settings.load(args.repository)
        guided = read_pipeline(args.repository).default_guidance_scale(served)
    bench = _bench(args)
    settings = {
        "hardware": processor(),
        "precision": bench.engines[MAIN].pipeline.precision,
        "models": models_digest(args.repository),
        "flow": bench.exact.digest,
        "judge": "Inception-v3" if args.inception else "the glyphs' classifier",
        "reference": bench.eyes.digest,
        "guidance_scale": args.guidance_scale,
        "guided_scale": guided,
        "size": asdict(Size(args.images, args.other_images)),
        "rounds": args.rounds,
    }
    _check_same(study, settings, args.json)
    refiners = [name for name in bench.repositories if name != MAIN]
    study |= settings
    study.setdefault("date", datetime.date.today().isoformat())  # later: of the last point
    study["refiners"] = list(dict.fromkeys([*study.get("refiners", []), *refiners]))
    points = [point for point in unique(sections_of(study)) if _can_run(point, bench)]
    wanted = [point for point in points if re.search(args.only, str(point))]
    missing = [point for point in wanted if not _done(study, point, bench)]
    estimate_s = bench.seconds_an_evaluation() * _evaluations(missing, bench)
    print(
        f"{len(missing)} points to measure, {len(wanted) - len(missing)} done: "
        f"about {datetime.timedelta(minutes=round(estimate_s / 60))}",
        flush=True,
    )
    if "stability" not in study:
        study["stability"] = {
            f"{each:g}": stability(
                bench.exact, bench.engines[MAIN].subject, Guidance(each), STABILITY_IMAGES
            )
            for each in sorted({1.0, guided, 2 * guided})
        }
    for number, point in enumerate(missing, 1):
        study["points"][str(point)] = found = bench.point(point)
        study["date"] = datetime.date.today().isoformat()
        write_json(study, args.json)
        print(f"{number}/{len(missing)} {point}: {report.in_words(found)}", flush=True)
    write_json(study, args.json)


def _can_run(point: Point, bench: Bench) -> bool:
    """Whether the point's repository is here, with a refiner if the schedule has refiner steps."""
    engine, schedule = bench.engines.get(point.repository), point.spec.schedule
    if engine is None or schedule is None:
        return engine is not None
    return engine.pipeline.has(Role.REFINER) or not schedule.refines


def _check_same(study: Study, settings: Study, path: Path) -> None:
    """Raises ValueError if points of `study` were measured with other settings.

    One report must not mix the two.
    """
    for name, value in settings.items():
        if study.get(name, value) != value:
            raise ValueError(
                f"{path} was measured with {name} {study[name]}, not {value}: "
                "give another --json and --report"
            )


def _bench(args: argparse.Namespace) -> Bench:
    repositories = {MAIN: args.repository}
    for name in REFINERS:
        if (path := args.refiners / name).exists():
            _check_predictor(path, args.repository)
            repositories[name] = path
    args.work.mkdir(parents=True, exist_ok=True)
    engines = {name: Engine(path) for name, path in repositories.items()}
    for name, engine in engines.items():
        check_decoder(repositories[name], engine.pipeline)
    return Bench(
        engines,
        repositories,
        Exact.of_repository(
            args.predictor or args.weights / "predictor.safetensors", args.repository
        ),
        Evaluator.open(
            args.weights,
            args.inception,
            args.reference,
            engines[MAIN].subject,
        ),
        args.work,
        args.rounds,
    )


def _check_predictor(one: Path, other: Path) -> None:
    """Raises ValueError unless the two repositories differ only in their refiners."""
    pipelines = [read_pipeline(path, solvers=False) for path in (one, other)]
    for role in (Role.PREDICTOR, Role.DECODER):
        stated = [
            [getattr(each.models.get(role), key, None) for key in _FORM]
            + [each.fingerprint["sha256"].get(role) if each.has(role) else None]
            for each in pipelines
        ]
        if stated[0] != stated[1]:
            raise ValueError(f"{one} and {other} have different {role}s: {stated[0]}, {stated[1]}")


def _done(study: Study, point: Point, bench: Bench) -> bool:
    known = study["points"].get(str(point), {})
    said = described(point.spec, bench.repositories[point.repository], "process")
    return measured_with(known, said)


def _evaluations(points: Sequence[Point], bench: Bench) -> float:
    """Estimates the evaluations of `points`, in predictor evaluations of one row.

    Includes the turns of H8 and the exact solutions. Ignores that images may exist already.
    """
    timed = bench.rounds * BATCH
    beside = schedule_evaluations(Schedule.parse(BASELINE))[0]
    total = 0.0
    for guidance in {point.spec.guidance for point in points}:
        total += timed * _EXACT_EVALUATIONS * guidance.rows
    for point in points:
        schedule = point.spec.schedule
        if schedule is not None:
            predictor, refiner = schedule_evaluations(schedule)
            each = predictor + _REFINER_COST * refiner
        else:
            each = _ADAPTIVE_EVALUATIONS
        total += point.spec.guidance.rows * (point.images * each + timed * beside)
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
