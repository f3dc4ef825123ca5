"""Compares solvers at equal numbers of evaluations: `python -m research.solvers`.

Each schedule makes the same images with the deployed models. The figure is the distance of each
latent to the exact solution in float32. It is compared, paired by seeds, with Adams-Bashforth 2 at
the same number of evaluations. Images are judged too. Exact solutions are kept in `--work`.
"""

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.observe import in_words, processor, write_json
from flowturbo.command import run_command
from flowturbo.errors import FlowTurboError, RequestError
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.sampler import Array
from research.quality.engine import (
    BATCH,
    Engine,
    Exact,
    SamplingSpec,
    distances,
    schedule_evaluations,
)
from research.quality.evaluate import Evaluator, described, exact_latents, models_digest
from research.quality.images import ImageFolder
from research.quality.metrics import half_width, mean_without

BESIDE = "A{}@3"
# At each number of evaluations. What a pipeline has no fit for, or no table, is left out.
RIVALS = "L{0} A{0}@2 A{0}@3 U{0}@2 U{0}@3 V{0}@3 D{0}@3 G{0}@3 B{0}@3 C{0}@3 N{0}"


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m research.solvers", description=__doc__)
    add = parser.add_argument
    add("--repository", type=Path, default=Path("model_repository"))
    add("--pipeline", default="glyphs")
    add("--predictor", type=Path, help="checkpoint or folder (default: of the shipped model)")
    add("--weights", type=Path, help="folder with the judge (default: weights/NAME)")
    add("--evaluations", type=int, nargs="+", default=[3, 4, 5, 6, 8])
    add("--guidance-scale", type=float, nargs="+", default=[1.0, 3.0])
    add("--schedule", nargs="*", default=["fast", "balanced", "best", "H1P5R3", "H8"])
    add("--images", type=int, default=1024)
    add("--first-seed", type=int, default=0)
    add("--work", type=Path, default=Path("runs/solvers"), help="keeps exact solutions and images")
    add("--json", type=Path, help="default: docs/benchmarks/solvers_NAME.json")
    args = parser.parse_args(argv)
    return run_command("solvers", lambda: _run(args), (FlowTurboError, OSError, ValueError))


def _run(args: argparse.Namespace) -> None:
    weights = args.weights or Path("weights") / args.pipeline
    shipped = weights / "predictor.safetensors"
    predictor = args.predictor or (shipped if shipped.is_file() else weights / "model")
    engine = Engine(args.repository, args.pipeline)
    exact = Exact.of_repository(predictor, args.repository, args.pipeline)
    judged = args.first_seed == 0  # the judge's subjects and the images count from there
    eyes = Evaluator.open(weights, None, None, engine.subject) if judged else None
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.json or Path("docs/benchmarks") / f"solvers_{args.pipeline}.json"
    found: dict[str, Any] = {
        "hardware": processor(),
        "date": datetime.date.today().isoformat(),
        "models": models_digest(args.repository, args.pipeline),
        "precision": engine.pipeline.precision,
        "runtime": engine.pipeline.runtime,
        "images": args.images,
        "first_seed": args.first_seed,
        "exact": {},
        "guidance": {},
    }
    for scale in args.guidance_scale:
        listed = _schedules(args, engine, scale)
        guidance = Guidance(scale)
        last = args.first_seed + args.images
        solved = exact_latents(exact, engine.subject, guidance, last, args.work)
        rows: dict[str, Any] = {}
        apart: dict[str, Array] = {}
        for schedule in tqdm(listed, desc=f"guidance {scale:g}"):
            spec = SamplingSpec(schedule, scale)
            said = described(spec, args.repository, "process", args.pipeline)
            name = f"{spec}_{said['models']}_{said.get('solvers', '')}_{args.first_seed}"
            folder = ImageFolder(args.work / "images" / name, said, engine.subject)
            apart[schedule] = _distances(engine, spec, folder, solved[args.first_seed :], args)
            evaluations = schedule_evaluations(spec.schedule)[0] if spec.schedule else 0
            rows[schedule] = {"evaluations": evaluations, **_mean(apart[schedule])}
            if eyes:
                rows[schedule] |= _judged(eyes, folder, args.images)
            beside = apart.get(BESIDE.format(evaluations))
            if beside is not None:
                rows[schedule] |= compared(apart[schedule], beside)
            found["guidance"][f"{scale:g}"] = rows
            write_json(found, path)
        if eyes:
            said = described(SamplingSpec("H8", scale), args.repository, "process", args.pipeline)
            name = f"exact_{exact.digest}_g{scale:g}_{said['models']}"
            folder = ImageFolder(args.work / "images" / name, said | {"spec": name}, engine.subject)
            for start in range(0, args.images, BATCH):
                seeds = np.arange(start, min(start + BATCH, args.images))
                folder.write(seeds, engine.decoded(solved[seeds]))
            found["exact"][f"{scale:g}"] = _judged(eyes, folder, args.images)
            write_json(found, path)
    path.with_suffix(".md").write_text(markdown(found, args.pipeline))
    print(markdown(found, args.pipeline))


def _schedules(args: argparse.Namespace, engine: Engine, scale: float) -> list[str]:
    """What can be served of the rivals, those to compare with first."""
    texts = [BESIDE.format(count) for count in args.evaluations]
    texts += [text.format(count) for count in args.evaluations for text in RIVALS.split()]
    found = {}
    for text in [*texts, *args.schedule]:
        try:
            schedule = engine.pipeline.find_schedule(text)
            if schedule.learned:
                engine.pipeline.fitted(schedule, scale)
            found[str(schedule)] = schedule
        except RequestError:
            if text in args.schedule:
                raise
    return list(found)


def _distances(
    engine: Engine, spec: SamplingSpec, folder: ImageFolder, solved: Array, args: Any
) -> Array:
    parts = []
    for start in range(0, len(solved), BATCH):
        seeds = np.arange(start, min(start + BATCH, len(solved)))
        made = engine.make(spec, args.first_seed + seeds)
        folder.write(args.first_seed + seeds, made.image)
        parts.append(distances(made.latent, solved[seeds]))
    return np.concatenate(parts)


def _judged(eyes: Evaluator, folder: ImageFolder, count: int) -> dict[str, float | None]:
    figures = eyes.figures(folder, count)
    return {
        "recognised": figures.recognised,
        "recognised_interval": figures.recognised_interval,
        "frechet": figures.frechet_distance,
        "frechet_interval": figures.frechet_interval,
    }


def _mean(apart: Array) -> dict[str, float]:
    return {
        "distance": float(apart.mean()),
        "interval": half_width(mean_without(apart)),
        "median": float(np.median(apart)),
    }


def compared(own: Array, beside: Array) -> dict[str, float]:
    """The ratio of mean distances on the same seeds, and half its 95% interval."""
    ratios = np.array(mean_without(own)) / np.array(mean_without(beside))
    return {"ratio": float(own.mean() / beside.mean()), "ratio_interval": half_width(ratios)}


def markdown(found: dict[str, Any], name: str) -> str:
    """The report: one table per guidance scale, ordered by evaluations and then by distance."""
    seeds = f"{found['first_seed']} to {found['first_seed'] + found['images'] - 1}"
    lines = [
        f"# Solvers on {name}",
        "",
        f"{found['images']} images, seeds {seeds}; the deployed models in {found['precision']} "
        f"({found['runtime']}), {in_words(found['hardware'])}, {found['date']}. "
        f"`python -m research.solvers --pipeline {name}` measures this again.",
        "",
        "- **Distance**: RMS of a latent from the exact solution in float32, mean over images; "
        "± is half of the 95% interval.",
        f"- **Ratio**: to the distance of {BESIDE.format('N')} (Adams-Bashforth 2 with N "
        "evaluations), on the same seeds.",
        "- The letters are in [schedules](../schedules.md#steps).",
    ]
    for scale, rows in found["guidance"].items():
        lines += [
            "",
            f"## Guidance {scale}",
            "",
            *_of_exact(found.get("exact", {}).get(scale)),
            "| evaluations | schedule | distance | median | ratio | recognised | Fréchet |",
            "|---|---|---|---|---|---|---|",
        ]
        for schedule, row in sorted(
            rows.items(), key=lambda item: (item[1]["evaluations"], item[1]["distance"])
        ):
            ratio = ""
            if "ratio" in row:
                ratio = f"{row['ratio']:.2f} ± {row['ratio_interval']:.2f}"
            judged = " | ".join(_shown(row)) if "recognised" in row else " | "
            lines.append(
                f"| {row['evaluations']} | `{schedule}` | {row['distance']:.4f} ± "
                f"{row['interval']:.4f} | {row['median']:.4f} | {ratio} | {judged} |"
            )
    return "\n".join([*lines, ""])


def _of_exact(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return []
    recognised, frechet = _shown(row)
    return [f"The exact solution: recognised {recognised}, Fréchet distance {frechet}.", ""]


def _shown(row: dict[str, Any]) -> tuple[str, str]:
    """The judged figures with half their 95% intervals."""
    recognised, frechet = f"{100 * row['recognised']:.1f}", f"{row['frechet']:.4f}"
    if row.get("recognised_interval") is not None:
        recognised += f" ± {100 * row['recognised_interval']:.1f}"
        frechet += f" ± {row['frechet_interval']:.4f}"
    return f"{recognised}%", frechet


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
