"""The study's report: Markdown tables and figures, made from its JSON and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.quality.engine import EXACT_TOLERANCE
from bench.quality.metrics import BLOCKS, half_width
from bench.study import figures
from bench.study.points import Point, Section, sections

Study = dict[str, Any]
Found = dict[str, Any]  # one point's figures

_INTRODUCTION = """\
# Quality against time

{date}, {cpu}, {cores} cores, networks in {precision}, guidance {scale:g} where nothing else is
said, in process, batches of 25 images, decoder included. {images}, the same classes and
seeds for every point, judged by {judge}. Made by `python -m bench.study`.

- **Evaluations** of predictor + refiner an image. A guided one is of two rows.
- **ms/image**: the median of {rounds} batches; **of H8's**: the ratio to H8 at the same guidance,
  run in turns with it, median (least to most).
- **Fréchet**: distance between the features of the images and of real ones, ± half the 95%
  interval of a jackknife over {blocks} disjoint blocks of seeds. It falls with the number of
  images: compare at equal numbers. **− H8**: the difference from H8 at the same guidance, its
  interval paired by seeds. **Spatial**: the same of spatial features, as sFID.
- **IS**: Inception Score; **P**, **R**: precision and recall by three nearest neighbours.
- **From exact**: RMS distance of the first {compared} latents to the solution of the same flow in
  float32 (dopri5, tolerance {tolerance:g}) from the same noise.
"""


def write(study: Study, json_path: Path, path: Path) -> Path:
    """Writes the report to `path` and its figures beside the JSON; returns `path`."""
    plots = figures.draw(study, json_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(study, [_relative(plot, path.parent) for plot in plots]))
    return path


def _relative(plot: Path, folder: Path) -> str:
    try:
        return plot.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return plot.as_posix()


def markdown(study: Study, plots: Sequence[str]) -> str:
    """The whole text; `plots` are the paths of the figures from it."""
    points = list(study["points"].values())
    counts = sorted({point["images"] for point in points})
    parts = [
        _INTRODUCTION.format(
            date=study["date"][:10],
            cpu=study["hardware"]["cpu"],
            cores=study["hardware"]["cores"],
            precision=study["precision"],
            scale=study["guidance_scale"],
            images=f"{' or '.join(f'{count:,}' for count in counts)} images a point",
            judge=study["judge"],
            rounds=max((point["rounds"] for point in points), default=0),
            compared=max((point["exact_images"] for point in points), default=0),
            blocks=BLOCKS,
            tolerance=EXACT_TOLERANCE,
        )
    ]
    parts += [f"![{Path(plot).stem.replace('_', ' ')}]({plot})" for plot in plots]
    parts.append(_stable(study["stability"]))
    for section in sections(study["guidance_scale"], study["refiners"]):
        if table := _table(study, section):
            parts.append(f"## {section.title}\n\n{section.text}\n\n{table}")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _stable(stability: dict[str, Found]) -> str:
    text = [
        "## How stable the velocity is",
        "Its relative change over a step of 1/32, median of the images (10% to 90%), from t on:",
    ]
    rows = ["| guidance | 0 | 1/4 | 1/2 | 3/4 | 15/16 |", "|---|---|---|---|---|---|"]
    for scale, s in stability.items():
        places = [0, 8, 16, 24, 30]
        cells = [f"{s['median'][k]:.3f} ({s['low'][k]:.3f} to {s['high'][k]:.3f})" for k in places]
        rows.append(f"| {scale} | {' | '.join(cells)} |")
    return "\n\n".join([*text, "\n".join(rows)])


def _table(study: Study, section: Section) -> str:
    """The section's measured points, with the columns that they have; nothing without any."""
    rows = [(p, study["points"][str(p)]) for p in section.points if str(p) in study["points"]]
    columns = [
        (head, [cell(study, point, found) for point, found in rows]) for head, cell in _COLUMNS
    ]
    shown = [(head, cells) for head, cells in columns if any(cells)]
    lines = [[head for head, _ in shown], ["---"] * len(shown)]
    lines += [list(cells) for cells in zip(*(cells for _, cells in shown), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def _name(study: Study, point: Point, found: Found) -> str:
    recipe, name = point.recipe, f"`{point.recipe.sampler}`"
    if recipe.guidance_scale != study["guidance_scale"]:
        name += f", guidance {recipe.guidance_scale:g}"
    if recipe.interval != (0.0, 1.0):
        name += f", from {recipe.interval[0]:g} to {recipe.interval[1]:g}"
    if recipe.variant != "reference":
        name += f", {recipe.variant}"
    return name + f", {point.repository}" * (point.repository != "main")


def _ratio(study: Study, point: Point, found: Found) -> str:
    ratio = found["ratio"]
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _frechet(study: Study, point: Point, found: Found) -> str:
    interval = found["frechet_interval"]
    return f"{found['frechet_distance']:.4f}" + (f" ± {interval:.4f}" if interval else "")


def difference(study: Study, found: Found) -> tuple[float, float] | None:
    """Fréchet distance less H8's at the same guidance scale, and half its 95% interval.

    None without a measured H8 of as many images.
    """
    baseline = study["points"].get(f"main/H8_g{found['guidance_scale']:g}")
    if not baseline or baseline["images"] != found["images"] or baseline is found:
        return None
    ours, theirs = (np.array(each["frechet_without_block"]) for each in (found, baseline))
    if not len(ours):
        return None
    return found["frechet_distance"] - baseline["frechet_distance"], half_width(ours - theirs)


def _less(study: Study, point: Point, found: Found) -> str:
    known = difference(study, found)
    return f"{known[0]:+.4f} ± {known[1]:.4f}" if known else ""


def _plain(key: str, form: str) -> Callable[[Study, Point, Found], str]:
    return lambda _, __, found: "" if found.get(key) is None else f"{found[key]:{form}}"


_COLUMNS: tuple[tuple[str, Callable[[Study, Point, Found], str]], ...] = (
    ("sampler", _name),
    ("evaluations", lambda _, __, found: f"{found['predictor']} + {found['refiner']}"),
    ("ms/image", _plain("ms_per_image", ".1f")),
    ("of H8's", _ratio),
    ("Fréchet", _frechet),
    ("− H8", _less),
    ("spatial", _plain("spatial_frechet_distance", ".3f")),
    ("IS", _plain("inception_score", ".2f")),
    ("P", _plain("knn_precision", ".3f")),
    ("R", _plain("knn_recall", ".3f")),
    ("recognised", _plain("recognised", ".1%")),
    ("from exact", _plain("exact_rms", ".4f")),
)


def in_words(found: Found) -> str:
    """One point's figures on one line."""
    interval = found["frechet_interval"] or 0.0
    return (
        f"{found['predictor']} + {found['refiner']} evaluations, {found['ms_per_image']:.1f} "
        f"ms/image, Fréchet distance {found['frechet_distance']:.4f} ± {interval:.4f}, "
        f"{found['exact_rms']:.4f} from exact"
    )
