"""Measures schedules on glyph scenes: `python -m research.scenes`.

Each schedule is timed in turns with H8, and compared with the exact solution of the flow. Its
images are judged: every attribute of the prompt, and the Fréchet distance to training images, both
paired with H8 by seeds. Each schedule is written to the JSON file at once. It is not measured again
unless other solvers were fitted. Also writes a report and a plot.
"""

import argparse
import datetime
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.observe import in_words, processor, write_json
from flowturbo.command import run_command
from flowturbo.errors import FlowTurboError
from flowturbo.textfile import read_json
from research.quality.engine import Engine, Exact, SamplingSpec, find_sampler
from research.quality.evaluate import Evaluator, described, measured_with, models_digest
from research.study.equal import EXACT, FRECHET, Found, difference, time_share
from research.study.figures import SERIES, plain_numbers, series
from research.study.measure import BASELINE, Bench
from research.study.points import MAIN, Point

# Heun; the paper's schedules with R, and with Z and T in its place; solvers without a refiner.
SCHEDULES = (
    "H8 H4 H16 H1P5R3 H1P5Z3 H1P5T3 H1P5 H1P6 H2P4R2 H2P4Z2 H2P4 H1P3R1@2 H1P3Z1@2 H1P3@2 "
    "H1P5R3@2 H1P5Z3@2 A4@2 A5@2 A6@2 A8@2 A8 E8 E16 U8 U8@2 D8@2 fast balanced best"
)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m research.scenes", description=__doc__)
    add = parser.add_argument
    add("--repository", type=Path, default=Path("model_repository"))
    add("--pipeline", default="scenes")
    add("--weights", type=Path, default=Path("weights/scenes"))
    add("--schedule", nargs="+", default=SCHEDULES.split(), help="default: a list")
    add("--guidance-scale", type=float, help="default: the service's")
    add("--images", type=int, default=1000)
    add("--rounds", type=int, default=8, help="timed batches of 25 images")
    add("--work", type=Path, default=Path("runs/scenes_study"), help="keeps images")
    add("--json", type=Path, default=Path("docs/benchmarks/scenes.json"))
    args = parser.parse_args(argv)
    return run_command("scenes", lambda: _run(args), (FlowTurboError, OSError, ValueError))


def _run(args: argparse.Namespace) -> None:
    engine = Engine(args.repository, args.pipeline)
    scale = args.guidance_scale
    if scale is None:
        scale = engine.pipeline.default_guidance_scale(engine.settings)
    args.work.mkdir(parents=True, exist_ok=True)
    exact = Exact.of_repository(args.weights / "model", args.repository, args.pipeline)
    eyes = Evaluator.open(args.weights, None, None, engine.subject)
    bench = Bench({MAIN: engine}, {MAIN: args.repository}, exact, eyes, args.work, args.rounds)
    settings = {
        "hardware": processor(),
        "models": models_digest(args.repository, args.pipeline),
        "precision": engine.pipeline.precision,
        "runtime": engine.pipeline.runtime,
        "guidance_scale": scale,
        "images": args.images,
        "rounds": args.rounds,
    }
    study: dict[str, Any] = read_json(args.json) if args.json.exists() else {"schedules": {}}
    if any(study.get(name, value) != value for name, value in settings.items()):
        raise ValueError(f"{args.json} has other models or settings: give another --json")
    study |= settings
    # Not a setting: they may be chosen anew, by these very figures.
    study["presets"] = {name: str(of) for name, of in engine.pipeline.presets.items()}
    for text in args.schedule:
        sampler = find_sampler(text, engine.pipeline)
        spec = SamplingSpec(sampler, scale)
        said = described(spec, args.repository, "process", args.pipeline)
        if measured_with(study["schedules"].get(sampler, {}), said):
            continue
        found = bench.point(Point(spec, args.images))
        study["schedules"][sampler] = found
        study["date"] = datetime.date.today().isoformat()
        write_json(study, args.json)
        print(" | ".join(_row(sampler, found, study)), flush=True)
    report = markdown(study, args.json.stem)
    args.json.with_suffix(".md").write_text(report)
    draw(study, args.json.with_suffix(".png"))
    print(report)


def markdown(study: dict[str, Any], stem: str) -> str:
    """The report: one table, ordered by time."""
    known = study["schedules"]
    right = next(iter(known.values()))["right"]
    parts = [name for name in right if name not in ("swapped", "shuffled")]
    head = ["schedule", "predictor + refiner", "time / H8", "all right", "− H8", "Fréchet", "− H8"]
    head += ["to exact", *parts, "swapped", "shuffled"]
    rows = sorted(known, key=lambda name: known[name]["ratio"]["median"])
    presets = ", ".join(f"`{name}` is `{of}`" for name, of in study["presets"].items())
    machine = in_words(study["hardware"])
    return "\n".join(
        [
            "# Schedules on glyph scenes",
            "",
            f"{study['images']} prompts as in training (paraphrases, one or two signs), seeds 0 to "
            f"{study['images'] - 1}, guidance {study['guidance_scale']:g}. The service's models in "
            f"{study['precision']} ({study['runtime']}), {machine}, {study['date']}.",
            "",
            f"Times are medians over {study['rounds']} batches of 25 images, in turns with H8; "
            "brackets have the range. “− H8” is paired by seeds; ± is half of the 95% interval. "
            "“All right”: the judge reads the layout, signs, colours and ground of the prompt. "
            "“Swapped”: the two colours are exchanged. “Shuffled”: all right for another prompt.",
            "",
            presets + ".",
            "",
            f"| {' | '.join(head)} |",
            "|" + "---|" * len(head),
            *(f"| {' | '.join(_row(name, known[name], study))} |" for name in rows),
            "",
            f"![Fréchet distance and distance to exact against time]({stem}.png)",
            "",
        ]
    )


def _row(name: str, found: dict[str, Any], study: dict[str, Any]) -> list[str]:
    ratio, right = found["ratio"], dict(found["right"])
    baseline = study["schedules"].get(BASELINE)
    apart, quality = "", ""
    if baseline and name != BASELINE:
        if paired := difference(found, baseline, FRECHET):
            apart = "{:+.4f} ± {:.4f}".format(*paired)
        quality = f"{100 * (found['recognised'] - baseline['recognised']):+.1f}"
    shares = [f"{100 * right[key][0]:.1f}%" for key in right]
    return [
        f"`{name}`",
        f"{found['predictor']} + {found['refiner']}",
        f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
        f"{100 * found['recognised']:.1f}%",
        quality,
        f"{found[FRECHET]:.4f}",
        apart,
        f"{found['from_exact']:.4f} ± {found['from_exact_interval'] or 0:.4f}",
        *shares,
    ]


NAMED = rf"L\d+|H1P5R3|{BASELINE}"


def draw(study: dict[str, Any], path: Path) -> None:
    """Fréchet distance, distance to exact, and what is not right, against time.

    Only some are named: there are many, and most of them are close together.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = study["schedules"].values()
    panels: dict[str, Callable[[Found], float]] = {
        "Fréchet distance": lambda of: of[FRECHET],
        "distance to exact": lambda of: of[EXACT],
        "prompts not all right (%)": lambda of: 100 * (1 - of["recognised"]),
    }
    looks: list[tuple[int | None, str, dict[str, Any]]] = [
        *((number, label, look) for number, (label, look, _) in enumerate(SERIES)),
        (None, "others", {"fmt": ".", "color": "C7"}),
    ]
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5), layout="constrained")
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for number, label, look in looks:
            own = sorted((each for each in known if series(each) == number), key=time_share)
            if own:
                heights = [value(each) for each in own]
                axis.errorbar([time_share(each) for each in own], heights, label=label, **look)
        for each in known:
            if re.fullmatch(NAMED, each["sampler"]):
                place = time_share(each), value(each)
                axis.annotate(each["sampler"], place, xytext=(2, 6), textcoords="offset points")
        axis.set(xlabel="time / H8", ylabel=title)
        axis.grid(alpha=0.3)
    for axis in axes[:2]:
        axis.set(yscale="log")
    plain_numbers(axes[0].yaxis)  # less than a decade
    axes[2].set_yscale("symlog", linthresh=1)  # most have none
    axes[2].set_ylim(bottom=-0.05)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
