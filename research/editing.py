"""Measures inpainting, editing and inversion: `python -m research.editing --pipeline glyphs`.

The images to edit are the pipeline's own (`ORIGINALS`). Inpainting is compared with the exact
solution of the same flow, and with the usual blending of states alone. Writes a JSON file, a report
and pictures.
"""

import argparse
import datetime
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from flowturbo_client.grid import labelled_grid, marked
from PIL import Image
from tqdm import tqdm

from bench.observe import in_words, processor, write_json
from flowturbo import generate as product
from flowturbo.command import run_command
from flowturbo.conditions.prompt import PROMPT
from flowturbo.contract import IMAGE, MASK, STRENGTH
from flowturbo.editing import OpenEdit
from flowturbo.errors import FlowTurboError
from flowturbo.generate import awaited, encode
from flowturbo.solver.calls import BlockCall
from flowturbo.solver.sampler import After, Array, run_sync
from research.quality.engine import BATCH, Engine, find_sampler
from research.quality.evaluate import Evaluator
from research.quality.subjects import Classes, ScenePrompts, Subject
from training.scenes.grammar import Scene, Sign
from training.scenes.judge import HEADS, answers_of, readings

ORIGINALS, EXACT = "A24", "H100"
SCHEDULES = ("A9", "H8", "H1P5R3", "M8", "H1P3Z1@3")
INVERSIONS = ("E18", "H9", "A18", "P17", "M17", "E18@2", "H9@2", "A18@2", "P17@2", "M17@2")
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_SEED_OF_REPAINTING, _OTHER_CLASS = 100_000, 7
_RESAMPLES = 1000
_SHOWN = 8  # images in the picture


@dataclass(frozen=True)
class Task:
    """Images [n, H, W, 3] to repaint inside `masks` [1 or n, H, W] uint8.

    `asked` are arguments of `generate`. `right` maps the judge's outputs to what is right, [n] bool
    each. Without `strength` holes are filled first.
    """

    name: str
    images: Array
    masks: Array
    asked: dict[str, Any]
    right: Callable[[Array], dict[str, Array]]
    strength: float | None = None


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m research.editing", description=__doc__)
    add = parser.add_argument
    add("--repository", type=Path, default=Path("model_repository"))
    add("--pipeline", default="glyphs")
    add("--weights", type=Path, help="folder of the judge (default: weights/PIPELINE)")
    add("--images", type=int, default=128)
    add("--schedule", nargs="+", default=list(SCHEDULES), help="default: a list")
    add("--json", type=Path, help="default: docs/benchmarks/editing_PIPELINE.json")
    args = parser.parse_args(argv)
    return run_command("editing", lambda: _run(args), (FlowTurboError, OSError, ValueError))


def _run(args: argparse.Namespace) -> None:
    subject: Subject | None = None if args.pipeline == "glyphs" else ScenePrompts("two")
    engine = Engine(args.repository, args.pipeline, subject)
    eyes = Evaluator.open(
        args.weights or Path("weights") / args.pipeline, None, None, engine.subject
    )
    path = args.json or Path("docs/benchmarks") / f"editing_{args.pipeline}.json"
    schedules = [find_sampler(text, engine.pipeline) for text in args.schedule]
    originals = _originals(engine, args.images)
    found: dict[str, Any] = {
        "pipeline": args.pipeline,
        "hardware": processor(),
        "precision": engine.pipeline.precision,
        "images": args.images,
        "originals": ORIGINALS,
        "exact": EXACT,
        "date": datetime.date.today().isoformat(),
        "inpainting": {},
    }
    shown: list[tuple[str, Array]] = []
    tasks = _tasks(engine, originals)
    tasks += [replace(task, name=f"{task.name}, from noise", strength=1.0) for task in tasks]
    for task in tasks:
        found["inpainting"][task.name] = _inpainting(engine, eyes, task, schedules, shown)
        write_json(found, path)
    if isinstance(engine.subject, Classes):
        found["strengths"] = _strengths(engine, eyes, originals)
    found["inversions"] = _inversions(engine, originals)
    write_json(found, path)
    report = markdown(found, path.stem)
    path.with_suffix(".md").write_text(report)
    _draw(shown, path.with_suffix(".png"))
    print(report)


def _batches(count: int) -> list[Array]:
    """The seeds 0 to `count` - 1 in batches."""
    return np.array_split(np.arange(count), -(-count // BATCH))


def _originals(engine: Engine, count: int) -> Array:
    parts = [
        engine.generate(seed=of, schedule=ORIGINALS, **engine.subject.asked(of)).image
        for of in tqdm(_batches(count), desc="originals")
    ]
    return np.concatenate([part for part in parts if part is not None])


def _tasks(engine: Engine, images: Array) -> list[Task]:
    """Half an image, a box and strokes with the same subject; of scenes another second sign."""
    seeds = np.arange(len(images))
    subject, (height, width) = engine.subject, images.shape[1:3]
    if isinstance(subject, ScenePrompts):
        return [_second_sign(subject, images)]
    masks = {name: np.zeros((1, height, width), np.uint8) for name in ("half", "box", "strokes")}
    masks["half"][:, :, width // 2 :] = 255
    masks["box"][:, height // 4 : -height // 4, width // 4 : -width // 4] = 255
    for y in range(height // 8, height, height // 4):
        masks["strokes"][:, y : y + height // 16] = 255

    def right(probability: Array) -> dict[str, Array]:
        return subject.right(probability, seeds)

    return [Task(name, images, mask, subject.asked(seeds), right) for name, mask in masks.items()]


def _second_sign(subject: ScenePrompts, images: Array) -> Task:
    """The half of the second sign is repainted, with another sign there."""
    rng = np.random.default_rng(0)
    masks = np.zeros(images.shape[:3], np.uint8)
    wanted = []
    for k, (scene, _) in enumerate(subject.scenes(np.arange(len(images)))):
        half = (
            np.s_[:, images.shape[2] // 2 :]
            if scene.layout == "left of"
            else np.s_[images.shape[1] // 2 :, :]
        )
        masks[k][half] = 255
        while True:
            drawn = Scene.draw(rng, signs=2).signs[1]
            if drawn != scene.signs[1] and drawn.colour != scene.ground:
                break
        wanted.append(replace(scene, signs=(scene.signs[0], Sign(drawn.sign, drawn.colour))))

    def right(probability: Array) -> dict[str, Array]:
        same = readings(probability) == answers_of(wanted)
        second = np.array([name.startswith("second") for name in HEADS])
        return {"repainted": same[:, second].all(1), "kept": same[:, ~second].all(1)}

    return Task("second sign", images, masks, {PROMPT: [scene.prompt() for scene in wanted]}, right)


def blending_states(masks: Array, noise: Array, data: Array) -> After[Array]:
    """The usual way: after each call only the state outside the mask is set, not the velocity."""

    async def blended(call: BlockCall, x: Array, v: Array) -> tuple[Array, Array]:
        t = call.lands_at
        return np.where(masks, x, (1 - t) * noise + t * data), v

    return blended


def _inpainting(
    engine: Engine,
    eyes: Evaluator,
    task: Task,
    schedules: Sequence[str],
    shown: list[tuple[str, Array]],
) -> dict[str, Any]:
    exact, image = _repainted(engine, task, EXACT)
    plain = _repainted(engine, task, EXACT, masked=False)[0] if task.strength == 1 else None
    opened = OpenEdit(task.images, task.masks > 0, 0, engine.pipeline.factor)
    cells = opened.latent_masks
    found: dict[str, Any] = {EXACT: _seen(eyes, task, image)}
    row = [task.images, marked(task.images, task.masks), image]
    for schedule in tqdm(schedules, desc=task.name):
        latent, image = _repainted(engine, task, schedule)
        with patch.object(product, "repainting", blending_states):
            usual, other = _repainted(engine, task, schedule)
        errors = [_error(of, exact, cells) for of in (latent, usual)]
        found[schedule] = {
            "velocity": _rms(errors[0]),
            "state": _rms(errors[1]),
            "ratio": _ratio(*errors),
            "typical": _typical_ratio(*errors),
            **_seen(eyes, task, image),
        }
        if plain is not None:
            generated, _ = _repainted(engine, task, schedule, masked=False)
            found[schedule]["generation"] = _rms(_error(generated, plain, cells))
        if schedule == "H1P5R3":
            row += [image, other]
    names = ("original", "masked", f"exact ({EXACT})", "H1P5R3", "H1P5R3, states alone")
    shown += zip((f"{task.name}: {name}" for name in names), row, strict=False)
    return found


def _repainted(
    engine: Engine, task: Task, schedule: str, *, masked: bool = True
) -> tuple[Array, Array]:
    """Latents and images of the task by `schedule`, in batches; without `masked` from noise."""
    latents, images = [], []
    for seeds in _batches(len(task.images)):
        asked: dict[str, Any] = {name: np.array(of)[seeds] for name, of in task.asked.items()}
        if PROMPT in asked:
            asked[PROMPT] = asked[PROMPT].tolist()
        if masked:
            masks = task.masks if len(task.masks) == 1 else task.masks[seeds]
            asked |= {IMAGE: task.images[seeds], MASK: masks, STRENGTH: task.strength}
        made = engine.generate(seed=_SEED_OF_REPAINTING + seeds, schedule=schedule, **asked)
        assert made.image is not None
        latents.append(made.latent)
        images.append(made.image)
    return np.concatenate(latents), np.concatenate(images)


def _error(latent: Array, exact: Array, cells: Array) -> Array:
    """The mean square error of each image inside the mask, [n]."""
    square = ((latent - exact) ** 2).mean(1, keepdims=True) * cells
    return np.asarray(square.sum((1, 2, 3)) / np.broadcast_to(cells, square.shape).sum((1, 2, 3)))


def _rms(squares: Array) -> float:
    return float(np.sqrt(squares.mean()))


def _ratio(velocity: Array, state: Array) -> list[float]:
    """How many times nearer velocity blending is, with its 95% interval (bootstrap, paired)."""
    chosen = _resampled(len(velocity))
    ratios = np.sqrt(state[chosen].mean(1) / velocity[chosen].mean(1))
    return [_rms(state) / _rms(velocity), *_bounds(ratios)]


def _typical_ratio(velocity: Array, state: Array) -> list[float]:
    """The same for the median image: few images whose path splits dominate the RMS."""
    ratios = np.sqrt(state / velocity)
    return [float(np.median(ratios)), *_bounds(np.median(ratios[_resampled(len(ratios))], axis=1))]


def _resampled(count: int) -> Array:
    return np.random.default_rng(0).integers(count, size=(_RESAMPLES, count))


def _bounds(values: Array) -> list[float]:
    """The 95% interval of resampled `values`."""
    return [float(bound) for bound in np.percentile(values, [2.5, 97.5])]


def _seen(eyes: Evaluator, task: Task, image: Array) -> dict[str, Any]:
    right = task.right(eyes.judge(image).probability)
    masks = np.broadcast_to(task.masks > 0, image.shape[:3])
    return {
        "right": {name: float(of.mean()) for name, of in right.items()},
        "outside": int(np.abs(image.astype(int) - task.images)[~masks].max()),
        "seam": seam(image, masks) / seam(task.images, masks),
    }


def seam(images: Array, masks: Array) -> float:
    """The mean difference of neighbours in `images` across the border of `masks` [n, H, W] bool."""
    grey = images.astype(float).mean(3)
    across = [
        np.abs(np.diff(grey, axis=axis))[np.diff(masks.astype(int), axis=axis) != 0]
        for axis in (1, 2)
    ]
    return float(np.concatenate(across).mean())


def _strengths(engine: Engine, eyes: Evaluator, images: Array) -> dict[str, Any]:
    """How often the class asked for is recognised, and the one that the image had."""
    subject, seeds = engine.subject, np.arange(len(images))
    found: dict[str, Any] = {}
    for strength in tqdm(STRENGTHS, desc="strengths"):
        parts = []
        for of in _batches(len(seeds)):
            asked = subject.asked(of + _OTHER_CLASS)
            made = engine.generate(
                seed=_SEED_OF_REPAINTING + of,
                schedule="H1P5R3",
                image=images[of],
                strength=strength,
                **asked,
            )
            assert made.image is not None
            parts.append(made.image)
        seen = eyes.judge(np.concatenate(parts)).probability
        shares = [subject.right(seen, seeds + more)["recognised"] for more in (_OTHER_CLASS, 0)]
        found[f"{strength:g}"] = {
            name: [float(of.mean()), _interval(of)]
            for name, of in zip(("new", "old"), shares, strict=True)
        }
    return found


def _interval(right: Array) -> float:
    """Half of the 95% interval of a share."""
    return float(
        1.96 * np.sqrt(max(right.mean() * (1 - right.mean()), 0.25 / len(right)) / len(right))
    )


def _inversions(engine: Engine, images: Array) -> dict[str, Any]:
    """From images to noise and back, unguided: errors of latents (RMS) and of pixels (mean)."""
    images = images[:64]
    seeds = np.arange(len(images))
    asked = engine.subject.asked(seeds)
    latent = run_sync(encode(awaited(engine._chunked), images, engine.pipeline))
    found: dict[str, Any] = {}
    for schedule in tqdm(INVERSIONS, desc="inversions"):
        noise = engine.generate(schedule=schedule, image=images, invert=True, **asked).latent
        back = engine.generate(schedule=schedule, guidance_scale=1.0, initial_noise=noise, **asked)
        assert back.image is not None
        found[schedule] = {
            "latent": _rms(((back.latent - latent) ** 2).mean((1, 2, 3))),
            "pixels": float(np.abs(back.image.astype(int) - images).mean()),
            "noise": float(noise.std()),
        }
    return found


def _draw(shown: list[tuple[str, Array]], path: Path) -> None:
    rows = [list(images[:_SHOWN]) for _, images in shown]
    captions = [name.replace(": ", ":\n") for name, _ in shown]
    grid: Image.Image = labelled_grid(rows, captions, [str(k) for k in range(len(rows[0]))])
    grid.save(path)


def markdown(found: dict[str, Any], stem: str) -> str:
    """The report."""
    lines = [
        f"# Inpainting, editing and inversion: {found['pipeline']}",
        "",
        f"{found['images']} images of {found['originals']}; models in {found['precision']}, "
        f"{in_words(found['hardware'])}, {found['date']}. The exact solution is {found['exact']}.",
        "",
        "## Inpainting",
        "",
        "“Velocity” blends the state and the cached velocity, “state” the state alone. Both "
        "columns are the RMS distance of latents to the exact solution inside the mask. “Nearer” "
        "is their ratio with its 95% interval, paired. “Per image” is the median of the ratios per "
        "image. “Generation” is the distance of the same schedule without image and mask, in the "
        "same place. “Seam” is the mean difference of neighbours across the mask's border, divided "
        "by the original's. “Outside” is the largest change of a pixel outside.",
    ]
    for task, schedules in found["inpainting"].items():
        names = list(next(iter(schedules.values()))["right"])
        errors = ["velocity", "state"]
        errors += ["generation"] if any("generation" in of for of in schedules.values()) else []
        head = ["schedule", *errors, "nearer", "per image", *names, "seam", "outside"]
        lines += ["", f"### {task}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for schedule, of in schedules.items():
            distances = [f"{of[key]:.3f}" if key in of else "" for key in errors]
            ratios = [
                "{:.1f} ({:.1f} to {:.1f})".format(*of[key]) if key in of else ""
                for key in ("ratio", "typical")
            ]
            shares = [f"{100 * of['right'][name]:.1f}%" for name in names]
            cells = [f"`{schedule}`", *distances, *ratios, *shares, f"{of['seam']:.2f}"]
            lines.append(f"| {' | '.join([*cells, str(of['outside'])])} |")
    if "strengths" in found:
        lines += ["", "## Editing", "", "Recognised by strength, H1P5R3; ± is half of the 95% "]
        lines[-1] += "interval."
        lines += ["", "| strength | new class | old class |", "|---|---|---|"]
        for strength, of in found["strengths"].items():
            shares = ["{:.0%} ± {:.0%}".format(*of[name]) for name in ("new", "old")]
            lines.append(f"| {strength} | {' | '.join(shares)} |")
    lines += ["", "## Inversion", "", "From 64 images to noise and back, without guidance.", ""]
    lines += ["| schedule | latents, RMS | pixels of 255, mean | noise, std |", "|---|---|---|---|"]
    for schedule, of in found["inversions"].items():
        lines.append(
            f"| `{schedule}` | {of['latent']:.3f} | {of['pixels']:.2f} | {of['noise']:.2f} |"
        )
    return "\n".join([*lines, "", f"![Inpainted images]({stem}.png)", ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
