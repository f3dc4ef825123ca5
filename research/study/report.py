"""The study's report: Markdown tables and figures, made from its JSON.

What people found in them is beside the JSON, in `<its name>_findings.md`, and comes first.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flowturbo.textfile import read_text
from research.quality.engine import EXACT_TOLERANCE, SamplingSpec
from research.quality.metrics import BLOCKS
from research.study import equal, figures
from research.study.points import CURVES, MAIN, Point, Section, measured, sections_of, unique

Study = dict[str, Any]
Found = dict[str, Any]  # one point's figures

_INTRODUCTION = """\
# Quality against time

{date}, {cpu}, {cores} cores, networks in {precision}, guidance {scale:g} where nothing else is
said, in process, batches of 25 images, decoder included. {curves:,} images a point of the curves,
{others:,} a point of the other sections, the same classes and seeds for every point, judged by
{judge}. Made by `python -m research.study`.

- **Evaluations** of predictor + refiner an image. A guided one is of two rows.
- **Of H8's time**: the ratio to H8 at the same guidance, run in turns with it, median (least to
  most) of {rounds} batches. Here H8 took {ms:.0f} ms an image at guidance {scale:g}, {least:.0f} to
  {most:.0f} as the machine had other work.
- **Fréchet**: distance between the features of the images and of real ones, ± half the 95%
  interval of a jackknife over {blocks} disjoint blocks of seeds. It falls with the number of
  images: compare at equal numbers. **− H8**: the difference from H8 at the same guidance, its
  interval paired by seeds. **Spatial**: the same of spatial features, as sFID.
- **IS**: Inception Score; **P**, **R**: precision and recall by three nearest neighbours.
- **From exact**: RMS distance of a latent to the solution of the same flow in float32 (dopri5,
  tolerance {tolerance:g}) from the same noise, mean of the first {compared}.
"""


def write(study: Study, json_path: Path, path: Path) -> Path:
    """Writes the report to `path` and its figures beside the JSON; returns `path`.

    Raises ValueError for a study that was never begun.
    """
    if "size" not in study:
        raise ValueError(f"{json_path} is not a study's")
    plots = figures.draw(study, json_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    findings = json_path.with_name(f"{json_path.stem}_findings.md")
    said = read_text(findings) if findings.exists() else ""
    path.write_text(markdown(study, [os.path.relpath(plot, path.parent) for plot in plots], said))
    return path


def markdown(study: Study, plots: Sequence[str], findings: str) -> str:
    """The whole text; `plots` are the paths of the figures from it."""
    points = list(study["points"].values())
    scale = study["guidance_scale"]
    h8_ms = [p["baseline_ms_per_image"] for p in points if p["guidance_scale"] == scale]
    parts = [
        _INTRODUCTION.format(
            date=study["date"],
            cpu=study["hardware"]["cpu"],
            cores=study["hardware"]["cores"],
            precision=study["precision"],
            scale=scale,
            ms=statistics.median(h8_ms or [math.nan]),
            least=min(h8_ms, default=math.nan),
            most=max(h8_ms, default=math.nan),
            **study["size"],
            judge=study["judge"],
            rounds=study["rounds"],
            compared=max((point["exact_images"] for point in points), default=0),
            blocks=BLOCKS,
            tolerance=EXACT_TOLERANCE,
        )
    ]
    listed = unique(sections_of(study))
    if missing := sum(str(point) not in study["points"] for point in listed):
        parts.append(f"Not measured yet: {missing} of {len(listed)} points.")
    parts += [findings, _equal(study)]
    parts += [f"![{Path(plot).stem.replace('_', ' ')}]({plot})" for plot in plots]
    parts.append(_stable(study["stability"]))
    for section in sections_of(study):
        if table := _table(study, section):
            parts.append(f"## {section.title}\n\n{section.text}\n\n{table}")
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _equal(study: Study) -> str:
    """What is as good as Heun: nothing without points of the curves."""
    curves = next(section for section in sections_of(study) if section.title == CURVES)
    known = [found for _, found in measured(study, curves)]
    heuns = [each for name in equal.HEUN for each in known if each["sampler"] == name]
    parts = []
    for name, figure, text in (
        ("Fréchet distance", equal.FRECHET, "no higher than Heun's"),
        ("distance to the exact solution", equal.EXACT, "no longer than Heun's"),
    ):
        found = [equal.rivals(known, heun, figure) for heun in heuns]
        rows = [
            [family, *(_rival(of_heun.get(family)) for of_heun in found)]
            for family in figures.FAMILIES
            if any(family in of_heun for of_heun in found)
        ]
        if rows:
            table = _markdown_table(["", *(f"`{heun['sampler']}`" for heun in heuns)], rows)
            parts.append(
                f"## At Heun's {name}\n\nThe fastest of each kind whose {name} is {text}, or by "
                f"{equal.AS_GOOD:.0%} at most: its share of Heun's time, decoder included, and its "
                f"{name} less Heun's.\n\n{table}"
            )
    return "\n\n".join(parts)


def _rival(rival: equal.Rival | None) -> str:
    if rival is None:
        return "none here"
    apart = f"{rival.difference:+.4f} ± {rival.interval:.4f}"
    return f"`{rival.sampler}` {rival.share:.0%} ({apart})"


def _stable(stability: dict[str, Found]) -> str:
    rows = []
    for scale, s in stability.items():
        places = [0, 8, 16, 24, 30]
        cells = [f"{s['median'][k]:.3f} ({s['low'][k]:.3f} to {s['high'][k]:.3f})" for k in places]
        rows.append([scale, *cells])
    table = _markdown_table(["guidance", "0", "1/4", "1/2", "3/4", "15/16"], rows)
    return (
        "## How stable the velocity is\n\n"
        "Its relative change over a step of 1/32, median of the images (10% to 90%), from t on:"
        f"\n\n{table}"
    )


def _table(study: Study, section: Section) -> str:
    """The section's measured points, with the columns that they have; nothing without any."""
    rows = measured(study, section)
    columns = [
        (head, [cell(study, point, found) for point, found in rows]) for head, cell in _COLUMNS
    ]
    shown = [(head, cells) for head, cells in columns if any(cells)]
    if not rows:
        return ""
    lines = zip(*(cells for _, cells in shown), strict=True)
    return _markdown_table([head for head, _ in shown], lines)


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(study: Study, point: Point, found: Found) -> str:
    spec, name = point.spec, f"`{point.spec.sampler}`"
    if spec.guidance_scale != study["guidance_scale"]:
        name += f", guidance {spec.guidance_scale:g}"
    if spec.interval != (0.0, 1.0):
        name += f", from {spec.interval[0]:g} to {spec.interval[1]:g}"
    if spec.variant != "reference":
        name += f", {spec.variant}"
    return name + f", {point.repository}" * (point.repository != "main")


def _ratio(study: Study, point: Point, found: Found) -> str:
    ratio = found["ratio"]
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _less(study: Study, point: Point, found: Found) -> str:
    """Fréchet distance less H8's at the same guidance scale, of as many images."""
    baseline = Point(SamplingSpec("H8", point.spec.guidance_scale), point.images, MAIN)
    other = study["points"].get(str(baseline))
    if not other or other is found:
        return ""
    known = equal.difference(found, other, equal.FRECHET)
    return f"{known[0]:+.4f} ± {known[1]:.4f}" if known else ""


def _with_interval(key: str, interval_key: str) -> Callable[[Study, Point, Found], str]:
    def cell(_study: Study, _point: Point, found: Found) -> str:
        interval = found[interval_key]
        return f"{found[key]:.4f}" + (f" ± {interval:.4f}" if interval else "")

    return cell


def _plain(key: str, form: str) -> Callable[[Study, Point, Found], str]:
    return lambda _, __, found: "" if found.get(key) is None else f"{found[key]:{form}}"


_COLUMNS: tuple[tuple[str, Callable[[Study, Point, Found], str]], ...] = (
    ("sampler", _name),
    ("evaluations", lambda _, __, found: f"{found['predictor']} + {found['refiner']}"),
    ("of H8's time", _ratio),
    ("Fréchet", _with_interval("frechet_distance", "frechet_interval")),
    ("− H8", _less),
    ("spatial", _plain("spatial_frechet_distance", ".3f")),
    ("IS", _plain("inception_score", ".2f")),
    ("P", _plain("knn_precision", ".3f")),
    ("R", _plain("knn_recall", ".3f")),
    ("recognised", _plain("recognised", ".1%")),
    ("from exact", _with_interval("from_exact", "from_exact_interval")),
)


def in_words(found: Found) -> str:
    """One point's figures on one line."""
    interval = found["frechet_interval"] or 0.0
    return (
        f"{found['predictor']} + {found['refiner']} evaluations, {found['ms_per_image']:.1f} "
        f"ms/image, Fréchet distance {found['frechet_distance']:.4f} ± {interval:.4f}, "
        f"{found['from_exact']:.4f} from exact"
    )
