"""Quality against time: `python -m research.study`.

Measures every point of research/study/points.py: images are made, looked at, timed in turns with
H8, and compared with the exact solution of the flow. Each point is written to a JSON file as it is
done, and not done again; images already made are kept. A file of other models or settings is
refused, points of another refiner than the file's are measured anew. The points of the curves come
first and have more images than those of the other sections.
Ends with a report, which `--report-only` writes from the file alone.
"""

import argparse
import datetime
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.observe import hardware, write_json
from flowturbo.contract import Role
from flowturbo.errors import FlowTurboError
from flowturbo.pipeline import class_label, read_pipeline
from flowturbo.settings import Settings
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.schedule import Schedule, read_shift
from flowturbo.textfile import read_json
from research.quality.engine import BATCH, Engine, Exact, check_decoder, schedule_evaluations
from research.quality.evaluate import Evaluator, models_digest
from research.study import report
from research.study.measure import BASELINE, Bench, stability
from research.study.points import MAIN, Point, Size, sections_of, unique
from research.study.refiners import FOLDER, REFINERS

STABILITY_IMAGES = 36
# In an image's evaluations of the predictor, for an estimate of time only: what dopri5 and an exact
# solution (in float32) take, and an evaluation of the refiner.
_ADAPTIVE_EVALUATIONS, _EXACT_EVALUATIONS, _REFINER_COST = 100.0, 200.0, 0.2

_FORM = ("engine", "runtime", "precision")  # of a model that is the same

Study = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Measures what is missing and writes the report.

    Returns the exit status: 2, and one line on stderr, for what the user can put right.
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
        help="repositories of the same predictor with other refiners (research.study.refiners)",
    )
    parser.add_argument("--weights", type=Path, default=Path("weights/glyphs"))
    parser.add_argument(
        "--predictor", type=Path, help="its checkpoint; default: that in the weights' folder"
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=1.0,
        help="where nothing else is said (default: 1, no guidance)",
    )
    parser.add_argument(
        "--guided-scale",
        type=float,
        help="where guidance itself is looked at (default: the service's)",
    )
    parser.add_argument("--inception", type=Path, help="pt_inception-2015-12-05-6726825d.pth")
    parser.add_argument("--reference", type=Path, help="real images: .npz as ADM's, or a folder")
    parser.add_argument("--images", type=int, default=Size.curves, help="a point of the curves")
    parser.add_argument("--other-images", type=int, default=Size.others, help="another point")
    parser.add_argument("--rounds", type=int, default=6, help=f"of {BATCH} images each, timed")
    parser.add_argument("--only", default="", metavar="REGEX", help="points whose name matches")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="images")
    parser.add_argument("--json", type=Path, default=Path("output/study.json"))
    parser.add_argument("--report", type=Path, default=Path("output/quality.md"))
    parser.add_argument("--report-only", action="store_true", help="measures nothing")
    return parser


def _measure(study: Study, args: argparse.Namespace) -> None:
    guided = args.guided_scale
    if guided is None:
        served = Settings.load(args.repository)
        guided = read_pipeline(args.repository).default_guidance_scale(served)
    bench = _bench(args)
    settings = {
        "hardware": {name: value for name, value in hardware().items() if name != "gib"},
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
    study.setdefault("date", datetime.date.today().isoformat())  # of the last point, where one is
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
            f"{each:g}": stability(bench.exact, Guidance(each), STABILITY_IMAGES)
            for each in sorted({1.0, guided, 2 * guided})
        }
    for number, point in enumerate(missing, 1):
        study["points"][str(point)] = found = bench.point(point)
        study["date"] = datetime.date.today().isoformat()
        write_json(study, args.json)
        print(f"{number}/{len(missing)} {point}: {report.in_words(found)}", flush=True)
    write_json(study, args.json)


def _can_run(point: Point, bench: Bench) -> bool:
    """Whether there is a repository for it, with a refiner if it has refiner steps."""
    engine, schedule = bench.engines.get(point.repository), point.spec.schedule
    if engine is None or schedule is None:
        return engine is not None
    return engine.pipeline.has(Role.REFINER) or not schedule.refines


def _check_same(study: Study, settings: Study, path: Path) -> None:
    """Raises ValueError if points of `study` were measured with other settings: in one report they
    would pass for each other.
    """
    for name, value in settings.items():
        if study.get(name, value) != value:
            raise ValueError(
                f"{path} is of {name} {study[name]}, this would be of {value}: "
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
            class_label(engines[MAIN].pipeline).num_classes,
        ),
        args.work,
        args.rounds,
    )


def _check_predictor(one: Path, other: Path) -> None:
    """Raises ValueError unless two repositories differ in their refiners alone."""
    pipelines = [read_pipeline(path) for path in (one, other)]
    for role in (Role.PREDICTOR, Role.DECODER):
        stated = [
            [getattr(each.models.get(role), key, None) for key in _FORM]
            + [each.fingerprint["sha256"].get(role) if each.has(role) else None]
            for each in pipelines
        ]
        if stated[0] != stated[1]:
            raise ValueError(f"{one} has another {role} than {other}: {stated[0]}, {stated[1]}")


def _done(study: Study, point: Point, bench: Bench) -> bool:
    known = study["points"].get(str(point), {})
    return known.get("models") == models_digest(bench.repositories[point.repository])


def _evaluations(points: Sequence[Point], bench: Bench) -> float:
    """How many evaluations of the predictor at one row an image the points take, all together.

    Turns with H8 and exact solutions are included, images that are there already are not left out.
    """
    timed = bench.rounds * BATCH
    beside = schedule_evaluations(Schedule.parse(BASELINE))[0]
    total = 0.0
    for guidance in {point.spec.guidance for point in points}:
        total += timed * _EXACT_EVALUATIONS * guidance.rows
    for point in points:
        schedule, (name, _, steps) = point.spec.schedule, point.spec.sampler.partition(":")
        if schedule is not None:
            predictor, refiner = schedule_evaluations(schedule)
            each = predictor + _REFINER_COST * refiner
        else:
            each = _ADAPTIVE_EVALUATIONS if name == "dopri5" else float(read_shift(steps)[0])
        total += point.spec.guidance.rows * (point.images * each + timed * beside)
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
