"""How good images are: `python -m bench.quality`.

They are made in this process by the exported blocks that the server runs, or by a server, and
compared with real ones by a network that looks at both: for glyphs a classifier, else Inception.
A Fréchet distance depends on the number of images: compare at equal numbers only.
"""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowturbo_client import FlowTurboClient

from bench.quality.engine import Engine, Exact, Recipe, schedule_evaluations
from bench.quality.evaluate import (
    IN_FLIGHT,
    SERVED_BATCH,
    Eyes,
    Local,
    described,
    exact_distance,
    exact_latents,
    served,
)
from bench.quality.images import ImageFolder, Speed
from flowturbo.presets import BUILT_IN, DEFAULT
from flowturbo.repository import Pipeline, Settings
from flowturbo.request import default_schedule

PREDICTOR = "predictor.safetensors"  # of the weights folder, beside the classifier
Row = dict[str, Any]
_ALSO = (
    ("spatial", "spatial_frechet_distance", ".3f"),
    ("Inception Score", "inception_score", ".2f"),
    ("precision", "knn_precision", ".3f"),
    ("recall", "knn_recall", ".3f"),
    ("from exact", "from_exact", ".4f"),
    ("ms/image", "ms_per_image", ".1f"),
)


def main() -> None:
    """Prints and writes the quality of each recipe in each repository."""
    parser = _parser()
    args = parser.parse_args()
    if args.server and args.variant:
        parser.error("--variant is the server's own: leave it out with --server")
    eyes = Eyes.open(args.weights, args.inception, args.reference)
    with contextlib.ExitStack() as stack:
        images = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = [row for path in args.repository for row in _rows(path, images, eyes, args)]
    print(f"schedule  precision  recognised  Fréchet distance   ({args.images} images each)")
    for row in rows:
        print(in_words(row))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--repository", type=Path, nargs="+", default=[Path("model_repository")])
    parser.add_argument("--weights", type=Path, default=Path("weights/glyphs"))
    parser.add_argument(
        "--schedule",
        nargs="+",
        help="schedules, or baselines such as unipc:8, dpm:8 and dopri5 "
        "(bench/quality/samplers.py); default: H8, H1P5R3 and the service's own",
    )
    parser.add_argument("--guidance-scale", type=float, help="default: the service's")
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH")
    )
    parser.add_argument(
        "--variant", help="of refiner steps in this process; default: the service's"
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument(
        "--exact",
        type=int,
        default=0,
        metavar="N",
        help="measure the distance to the exact solution over N latents, in this process",
    )
    parser.add_argument("--inception", type=Path, help="pt_inception-2015-12-05-6726825d.pth")
    parser.add_argument("--reference", type=Path, help="real images: .npz as ADM's, or a folder")
    parser.add_argument("--server", metavar="HOST:PORT", help="makes the images instead, over gRPC")
    parser.add_argument("--in-flight", type=int, default=IN_FLIGHT, help="requests to the server")
    parser.add_argument("--out", type=Path, help="keeps the images here, and goes on with them")
    parser.add_argument("--npz", action="store_true", help="also as ADM's evaluator reads them")
    parser.add_argument("--json", type=Path, help="where to write the figures as well")
    return parser


def _rows(repository: Path, images: Path, eyes: Eyes, args: argparse.Namespace) -> Iterator[Row]:
    settings = Settings.load(repository)
    engine = None if args.server else Engine(repository)
    exact = Exact(args.weights / PREDICTOR) if args.exact and engine else None
    scale = args.guidance_scale
    if scale is None:
        scale = settings.default_guidance_scale
    interval, variant = tuple(args.guidance_interval), args.variant or settings.variant
    default = default_schedule(Pipeline.load(repository), settings)
    for sampler in args.schedule or dict.fromkeys(["H8", BUILT_IN[DEFAULT], str(default)]):
        recipe = Recipe(sampler, scale, interval, variant)
        row = _row(repository, images, eyes, engine, recipe, args)
        if engine and exact:
            solved = exact_latents(exact, recipe.guidance, args.exact, images)
            row["exact_images"] = args.exact
            row["from_exact"] = exact_distance(engine, recipe, solved)
        yield row


def _row(
    repository: Path,
    images: Path,
    eyes: Eyes,
    engine: Engine | None,
    recipe: Recipe,
    args: argparse.Namespace,
) -> Row:
    pipeline, source = Pipeline.load(repository), "process" if engine else "server"
    said = described(recipe, repository, source)
    name = f"{recipe}_{pipeline.precision}_{source}_{said['models']}"
    folder = ImageFolder(images / name, said, pipeline.num_classes)
    made, evaluations = _fill(folder, engine, recipe, args)
    if args.npz:
        folder.to_npz(images / f"{name}.npz", args.images)
    row = {"schedule": recipe.sampler, "precision": pipeline.precision, **asdict(recipe)}
    del row["sampler"]
    row |= asdict(eyes.figures(folder, args.images))
    row |= {"made": made.images, "ms_per_image": folder.speed.ms_per_image}
    row["predictor"], row["refiner"] = evaluations or (None, None)
    return row


def _fill(
    folder: ImageFolder, engine: Engine | None, recipe: Recipe, args: argparse.Namespace
) -> tuple[Speed, tuple[int, int] | None]:
    """Makes the images; also says how often each network was evaluated for one, where known."""
    if engine:
        make = Local(engine, recipe)
        return folder.fill(args.images, make), make.evaluations
    with FlowTurboClient(args.server) as client:
        asked = served(client, recipe)
        speed = folder.fill(args.images, asked, batch=SERVED_BATCH, in_flight=args.in_flight)
    assert recipe.schedule is not None  # a server runs nothing else
    return speed, schedule_evaluations(recipe.schedule)


def in_words(row: Row) -> str:
    """One recipe's figures on one line, those that it has."""
    recognised = "" if row["recognised"] is None else f"{row['recognised']:.1%}"
    text = f"{row['schedule']:<9} {row['precision']:<10} {recognised:>10}"
    text += f"  {row['frechet_distance']:10.3f}"
    if row["frechet_interval"] is not None:
        text += f" ± {row['frechet_interval']:.3f}"
    for label, key, form in _ALSO:
        if row.get(key) is not None:
            text += f", {label} {row[key]:{form}}"
    return text


if __name__ == "__main__":
    main()
