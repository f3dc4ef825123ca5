"""Measures image quality: `python -m research.quality`.

The images are made in this process by the exported blocks that the server runs, or by a server. A
network compares them with real images: a classifier for glyphs, else Inception. A Fréchet distance
depends on the number of images: compare at equal numbers only.
"""

import argparse
import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import flowturbo_client
from flowturbo_client import FlowTurboClient

from bench.observe import write_json
from flowturbo.command import run_command
from flowturbo.contract import Role
from flowturbo.errors import FlowTurboError, RequestError
from flowturbo.pipeline import Pipeline, read_pipeline
from flowturbo.presets import DEFAULT, built_in
from flowturbo.settings import Settings
from research.quality.engine import (
    Engine,
    Exact,
    SamplingSpec,
    check_decoder,
    find_sampler,
    schedule_evaluations,
)
from research.quality.evaluate import (
    IN_FLIGHT,
    SERVED_BATCH,
    Evaluator,
    Local,
    described,
    exact_distance,
    exact_latents,
    served,
)
from research.quality.images import ImageFolder, Speed
from research.quality.subjects import SETS, Subject, subject_of

PREDICTOR = "predictor.safetensors"  # in the weights folder, beside the classifier
Row = dict[str, Any]
_ALSO = (  # label, key, key of the interval, and format
    ("spatial", "spatial_frechet_distance", "spatial_frechet_interval", ".3f"),
    ("Inception Score", "inception_score", "inception_score_interval", ".2f"),
    ("precision", "knn_precision", "knn_precision_interval", ".3f"),
    ("recall", "knn_recall", "", ".3f"),
    ("from exact", "from_exact", "", ".4f"),
    ("ms/image", "ms_per_image", "", ".1f"),
)


@dataclass(frozen=True)
class Task:
    """The specs of one repository; all are checked before the first image is made."""

    repository: Path
    pipeline: Pipeline
    subject: Subject
    specs: tuple[SamplingSpec, ...]
    exact: Exact | None

    @classmethod
    def of(cls, repository: Path, args: argparse.Namespace) -> "Task":
        """The task of `args` on `repository`; raises FlowTurboError if it is impossible."""
        pipeline, settings = read_pipeline(repository, args.pipeline), Settings.load(repository)
        check_decoder(repository, pipeline)
        paper = built_in(has_refiner=pipeline.has(Role.REFINER))[DEFAULT]
        default = pipeline.default_schedule(settings)
        texts = args.schedule or ["H8", str(paper), str(default)]
        samplers = dict.fromkeys(find_sampler(text, pipeline) for text in texts)
        scale = args.guidance_scale
        if scale is None:
            scale = pipeline.default_guidance_scale(settings)
        interval, variant = tuple(args.guidance_interval), args.variant or settings.variant
        specs = tuple(SamplingSpec(sampler, scale, interval, variant) for sampler in samplers)
        for spec in specs:
            if args.server and spec.schedule is None:
                raise RequestError(f"a server runs schedules only, not {spec.sampler}")
        exact = None
        if args.exact:
            predictor = args.predictor or args.weights / PREDICTOR
            exact = Exact.of_repository(predictor, repository, args.pipeline)
        subject = subject_of(pipeline, args.scenes)
        return cls(repository, pipeline, subject, specs, exact)


def main(argv: Sequence[str]) -> int:
    """Measures each spec in each repository; prints and writes each result at once.

    Returns the exit status: 2, and one line on stderr, for errors that the user can fix.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.server and (args.variant or args.exact):
        parser.error("--variant and --exact are for this process: leave them out with --server")
    if args.npz and not args.out:
        parser.error("--npz needs --out, the folder that it writes to")
    for name, least in (("images", 2), ("exact", 0), ("in_flight", 1)):
        if (value := getattr(args, name)) < least:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
    errors = (FlowTurboError, flowturbo_client.FlowTurboError, OSError, ValueError)
    return run_command("quality", lambda: _measure(args), errors)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m research.quality", description=__doc__)
    parser.add_argument("--repository", type=Path, nargs="+", default=[Path("model_repository")])
    parser.add_argument("--pipeline", help="pipeline of the repositories (default: theirs)")
    parser.add_argument(
        "--scenes",
        choices=tuple(SETS),
        default="mixed",
        help="prompts of a pipeline of glyph scenes; new ones have pairs of sign and colour that "
        "training never shows",
    )
    parser.add_argument("--weights", type=Path, default=Path("weights/glyphs"))
    parser.add_argument(
        "--schedule",
        nargs="+",
        help="schedules, presets, or the baseline dopri5; in bf16 use "
        "dopri5:1e-2 (research/quality/samplers.py); default: H8, H1P5R3 and the service's own",
    )
    parser.add_argument("--guidance-scale", type=float, help="default: the service's")
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH")
    )
    parser.add_argument(
        "--variant", help="form of refiner steps in this process; default: the service's"
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument(
        "--exact",
        type=int,
        default=0,
        metavar="N",
        help="measure the distance to the exact solution over N latents, in this process",
    )
    parser.add_argument(
        "--predictor",
        type=Path,
        help=f"checkpoint for the exact solution (default: --weights/{PREDICTOR})",
    )
    parser.add_argument("--inception", type=Path, help="pt_inception-2015-12-05-6726825d.pth")
    parser.add_argument(
        "--reference",
        type=Path,
        help="real images: an .npz in ADM's layout, or a folder (EXIF orientation is applied)",
    )
    parser.add_argument(
        "--server",
        metavar="HOST:PORT",
        help="server that makes the images instead, over gRPC; it must serve --repository",
    )
    parser.add_argument(
        "--in-flight", type=int, default=IN_FLIGHT, help="concurrent requests to the server"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="keep the images here, and reuse images of the same spec and networks, even if "
        "another version of this code made them",
    )
    parser.add_argument(
        "--npz", action="store_true", help="also write the images for ADM's evaluator"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser


def _measure(args: argparse.Namespace) -> None:
    tasks = [Task.of(path, args) for path in args.repository]
    subjects = [task.subject for task in tasks]
    eyes = Evaluator.open(args.weights, args.inception, args.reference, *subjects)
    rows: list[Row] = []
    print(f"schedule  precision    recognised  Fréchet distance   ({args.images} images each)")
    with contextlib.ExitStack() as stack:
        images = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for row in (row for task in tasks for row in _rows(task, images, eyes, args)):
            rows.append(row)
            print(in_words(row), flush=True)
            if args.json:
                write_json(rows, args.json)


def _rows(task: Task, images: Path, eyes: Evaluator, args: argparse.Namespace) -> Iterator[Row]:
    engine = None
    if not args.server:
        engine = Engine(task.repository, task.pipeline.name, task.subject)
    for spec in task.specs:
        row = _row(task, images, eyes, engine, spec, args)
        if engine and task.exact:
            solved = exact_latents(task.exact, task.subject, spec.guidance, args.exact, images)
            row["exact_images"] = args.exact
            row["from_exact"] = exact_distance(engine, spec, solved)
        yield row


def _row(
    task: Task,
    images: Path,
    eyes: Evaluator,
    engine: Engine | None,
    spec: SamplingSpec,
    args: argparse.Namespace,
) -> Row:
    pipeline, source = task.pipeline, "process" if engine else f"server {args.server}"
    said = described(spec, task.repository, source, pipeline.name)
    words = re.sub(r"[^\w.-]+", "-", source)
    name = f"{spec}_{pipeline.precision}_{words}_{said['models']}{task.subject.suffix}"
    folder = ImageFolder(images / name, said, task.subject)
    made, evaluations = _fill(task, folder, engine, spec, args)
    if args.npz:
        folder.to_npz(images / f"{name}.npz", args.images)
    row = {"schedule": spec.sampler, "precision": pipeline.precision, **asdict(spec)}
    del row["sampler"]
    row |= asdict(eyes.figures(folder, args.images))
    row |= {"made": made.images, "ms_per_image": folder.speed.ms_per_image}
    row["predictor"], row["refiner"] = evaluations or (None, None)
    return row


def _fill(
    task: Task,
    folder: ImageFolder,
    engine: Engine | None,
    spec: SamplingSpec,
    args: argparse.Namespace,
) -> tuple[Speed, tuple[int, int] | None]:
    """Makes the images; also returns the evaluations of each network per image, if known."""
    if engine:
        make = Local(engine, spec)
        return folder.fill(args.images, make), make.evaluations
    with FlowTurboClient(args.server) as client:
        asked = served(client, spec, task.subject, args.pipeline)
        batch = min(SERVED_BATCH, Settings.load(task.repository).max_images)
        made = folder.fill(args.images, asked, batch=batch, in_flight=args.in_flight)
    assert spec.schedule is not None  # a server runs schedules only
    return made, schedule_evaluations(spec.schedule)


def in_words(row: Row) -> str:
    """The available figures of one spec on one line."""
    recognised = _figure(row, "recognised", "recognised_interval", ".1%")
    frechet = _figure(row, "frechet_distance", "frechet_interval", ".3f")
    text = f"{row['schedule']:<9} {row['precision']:<10} {recognised:>12}  {frechet:>16}"
    for label, key, interval, form in _ALSO:
        if row.get(key) is not None:
            text += f", {label} {_figure(row, key, interval, form)}"
    right = row.get("right") or {}
    parts = [f"{name} {share:.1%}" for name, (share, _) in right.items()]
    return ", ".join([text, *parts])


def _figure(row: Row, key: str, interval: str, form: str) -> str:
    if row.get(key) is None:
        return ""
    half = row.get(interval)
    return f"{row[key]:{form}}" + ("" if half is None else f" ± {half:{form}}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
