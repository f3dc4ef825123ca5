"""Compares solvers at equal numbers of evaluations: `python -m research.solvers`.

Each schedule makes the same images with the deployed models. The figure is the distance of each
latent to the exact solution in float32. It is compared, paired by seeds, with Adams-Bashforth 2 at
the same number of evaluations. Images are judged too. Exact solutions are kept in `--work`. What a
run does not measure stays in the report, if it was measured with the same networks and images.
"""

import argparse
import datetime
import re
import shlex
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
from flowturbo.solver.schedule import Schedule
from flowturbo.textfile import read_json
from research.quality.engine import (
    BATCH,
    Engine,
    SamplingSpec,
    add_exact_arguments,
    distances,
    exact_of,
    schedule_evaluations,
)
from research.quality.evaluate import Evaluator, described, exact_latents, models_digest
from research.quality.images import ImageFolder
from research.quality.metrics import half_width, mean_without
from tuning.scores import latents

BESIDE = "A{}@3"
# At each number of evaluations. What a pipeline has no fit for, or no table, is left out.
RIVALS = {letter: f"{letter}{{}}@3" for letter in "VDGBC"} | {"L": "L{}", "N": "N{}"}
SHIFTED = {letter: f"{letter}{{}}@{{:g}}" for letter in "AU"}  # on several grids


# What the picture shows: at most six families.
CURVES = (
    ("learned (L)", "L", "o-"),
    ("Adams-Bashforth 2 (A), best grid", "A", "^--"),
    ("UniPC 2 (U), best grid", "U", "s-."),
    ("DPM-Solver++ 2M (D@3)", "D", "D:"),
    ("NeuralSolver (N)", "N", "x--"),
)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m research.solvers", description=__doc__)
    add = parser.add_argument
    add_exact_arguments(parser)
    add("--weights", type=Path, help="folder with the judge (default: weights/NAME)")
    add("--evaluations", type=int, nargs="+", default=[3, 4, 5, 6, 8])
    letters = [*RIVALS, *SHIFTED]
    add("--letters", nargs="+", default=letters, choices=letters, help="what is compared with A")
    add("--shifts", type=float, nargs="+", default=[2.0, 3.0], help="grids of A and U")
    add("--guidance-scale", type=float, nargs="+", default=[1.0, 3.0])
    add("--schedule", nargs="*", default=["fast", "balanced", "best", "H1P5R3", "H8"])
    add("--images", type=int, default=1024)
    add("--first-seed", type=int, default=0)
    add("--work", type=Path, default=Path("runs/solvers"), help="keeps exact solutions and images")
    add("--json", type=Path, help="default: docs/benchmarks/solvers_NAME.json")
    add("--report-only", action="store_true", help="writes text and picture again from the file")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "-m", "research.solvers", *argv])
    return run_command("solvers", lambda: _run(args), (FlowTurboError, OSError, ValueError))


def _run(args: argparse.Namespace) -> None:
    path = args.json or Path("docs/benchmarks") / f"solvers_{args.pipeline}.json"
    if not args.report_only:
        _measure(args, path)
    _report(path, args.pipeline)


def _measure(args: argparse.Namespace, path: Path) -> None:
    weights = args.weights or Path("weights") / args.pipeline
    engine = Engine(args.repository, args.pipeline)
    exact = exact_of(args.repository, args.pipeline, args.predictor)
    judged = args.first_seed == 0  # the judge's subjects and the images count from there
    eyes = Evaluator.open(weights, None, None, engine.subject) if judged else None
    args.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "hardware": processor(),
        "date": datetime.date.today().isoformat(),
        "models": models_digest(args.repository, args.pipeline),
        "precision": engine.pipeline.precision,
        "runtime": engine.pipeline.runtime,
        "solvers": engine.pipeline.solvers.digest if engine.pipeline.solvers else None,
        "command": args.command,
        "images": args.images,
        "first_seed": args.first_seed,
        "exact": {},
        "guidance": {},
    }
    before = _before(path, found)
    found |= {key: before[key] for key in ("exact", "guidance", "command") if key in before}
    for scale in args.guidance_scale:
        listed = _schedules(args, engine, scale)
        guidance = Guidance(scale)
        last = args.first_seed + args.images
        solved = exact_latents(exact, engine.subject, guidance, last, args.work)
        rows: dict[str, Any] = found["guidance"].get(f"{scale:g}", {})
        apart: dict[str, Array] = {}
        for schedule in tqdm(listed, desc=f"guidance {scale:g}"):
            read = Schedule.parse(schedule)
            made = latents(engine, read, guidance, range(args.first_seed, last))
            apart[schedule] = distances(made, solved[args.first_seed :])
            evaluations, _ = schedule_evaluations(read)
            rows[schedule] = {"evaluations": evaluations, **_mean(apart[schedule])}
            if eyes:
                spec = SamplingSpec(schedule, scale)
                said = described(spec, args.repository, "process", args.pipeline)
                name = f"{spec}_{said['models']}_{said.get('solvers', '')}_{args.first_seed}"
                folder = ImageFolder(args.work / "images" / name, said, engine.subject)
                rows[schedule] |= _judged(eyes, engine, folder, made)
            beside = apart.get(BESIDE.format(evaluations))
            if beside is not None:
                rows[schedule] |= compared(apart[schedule], beside)
            found["guidance"][f"{scale:g}"] = rows
            write_json(found, path)
        for count, learned in nearest(rows, "L").items():
            if learned not in apart:
                continue
            others = [of[count] for of in (nearest(rows, "A"), nearest(rows, "U")) if count in of]
            rows[learned]["rivals"] = {
                other: compared(apart[learned], apart[other]) for other in others if other in apart
            }
        write_json(found, path)
        if eyes:
            said = described(SamplingSpec("H8", scale), args.repository, "process", args.pipeline)
            name = f"exact_{exact.digest}_g{scale:g}_{said['models']}"
            folder = ImageFolder(args.work / "images" / name, said | {"spec": name}, engine.subject)
            found["exact"][f"{scale:g}"] = _judged(eyes, engine, folder, solved)
            write_json(found, path)


def _before(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """What the report at `path` has of the same networks and images; none of other solvers."""
    known: dict[str, Any] = read_json(path) if path.is_file() else {}
    same = "hardware", "models", "precision", "runtime", "images", "first_seed"
    if any(known.get(key) != found[key] for key in same):
        return {}
    if known.get("solvers") != found["solvers"]:
        for scale, rows in known["guidance"].items():
            known["guidance"][scale] = {
                text: row for text, row in rows.items() if not Schedule.parse(text).learned
            }
    return known


def _report(path: Path, name: str) -> None:
    """Writes the text and the picture beside the figures in `path`."""
    found = read_json(path)
    draw(found, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(markdown(found, name, path.with_suffix(".png").name))
    print(markdown(found, name))


def _schedules(args: argparse.Namespace, engine: Engine, scale: float) -> list[str]:
    """What can be served of the rivals, those to compare with first."""
    texts = [BESIDE.format(count) for count in args.evaluations]
    for count in args.evaluations:
        texts += [text.format(count) for each, text in RIVALS.items() if each in args.letters]
        for text in (text for each, text in SHIFTED.items() if each in args.letters):
            texts += [text.format(count, shift) for shift in args.shifts]
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


def _judged(
    eyes: Evaluator, engine: Engine, folder: ImageFolder, latent: Array
) -> dict[str, float | None]:
    """The figures of the images of `latent`, of seeds from 0; they are kept in `folder`."""
    for start in range(0, len(latent), BATCH):
        part = latent[start : start + BATCH]
        folder.write(np.arange(start, start + len(part)), engine.decoded(part))
    figures = eyes.figures(folder, len(latent))
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


def draw(found: dict[str, Any], path: Path) -> None:
    """The distances of the families of CURVES by evaluations, one panel per guidance scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scales = list(found["guidance"])
    figure, axes = pyplot.subplots(
        1, len(scales), figsize=(6 * len(scales), 4.6), layout="constrained", squeeze=False
    )
    for scale, axis in zip(scales, axes[0], strict=True):
        rows = found["guidance"][scale]
        for label, letter, look in CURVES:
            points = [rows[schedule] for schedule in nearest(rows, letter).values()]
            off = [row["distance"] for row in points]
            bars = [row["interval"] for row in points]
            counts = [row["evaluations"] for row in points]
            if points:
                axis.errorbar(counts, off, bars, fmt=look, label=label, capsize=2, lw=1.3)
        for schedule in ("H1P5R3", "H8"):
            if row := rows.get(schedule):
                at = row["evaluations"], row["distance"]
                axis.plot(*at, "k*", ms=9)
                axis.annotate(
                    schedule, at, (0, 7), textcoords="offset points", fontsize=9, ha="center"
                )
        axis.set(yscale="log", title=f"guidance {scale}", xlabel="evaluations of the predictor")
        axis.set_ylabel("distance to the exact solution")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def nearest(rows: dict[str, Any], letter: str) -> dict[int, str]:
    """The nearest schedule of this letter alone, on any grid, by its number of evaluations."""
    best: dict[int, str] = {}
    for schedule, row in rows.items():
        if re.fullmatch(rf"{letter}\d+(@.+)?", schedule):
            count = row["evaluations"]
            best[count] = min(
                best.get(count, schedule), schedule, key=lambda s: rows[s]["distance"]
            )
    return dict(sorted(best.items()))


def markdown(found: dict[str, Any], name: str, picture: str = "") -> str:
    """The report: one table per guidance scale, ordered by evaluations and then by distance."""
    seeds = f"{found['first_seed']} to {found['first_seed'] + found['images'] - 1}"
    lines = [
        f"# Solvers on {name}",
        "",
        f"{found['images']} images, seeds {seeds}; the deployed models in {found['precision']} "
        f"({found['runtime']}), {in_words(found['hardware'])}, {found['date']}. The command that "
        "measures this again:",
        "",
        "```sh",
        found["command"],
        "```",
        "",
        "- **Distance**: RMS of a latent from the exact solution in float32, mean over images; "
        "± is half of the 95% interval.",
        f"- **Ratio**: to the distance of {BESIDE.format('N')} (Adams-Bashforth 2 with N "
        "evaluations), on the same seeds.",
        "- The letters are in [schedules](../schedules.md#steps).",
    ]
    if picture:
        lines += ["", f"![Distance to the exact solution by evaluations]({picture})"]
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
        for schedule, row in rows.items():
            if rivals := row.get("rivals"):
                said = [
                    f"{of['ratio']:.2f} ± {of['ratio_interval']:.2f} of `{name}`"
                    for name, of in rivals.items()
                ]
                lines += ["", f"`{schedule}` is at {' and '.join(said)}, each on its best grid."]
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
