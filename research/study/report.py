"""Writes the study's report: Markdown tables and pictures, made from its JSON.

Findings are written by hand in `<name of the JSON>_findings.md` beside the JSON. The report quotes
them before the tables.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowturbo.textfile import read_text
from research.quality.engine import BATCH, EXACT_TOLERANCE
from research.quality.metrics import BLOCKS
from research.study import equal, figures
from research.study.points import CURVES, MAIN, Point, Section, measured, sections_of, unique

Study = dict[str, Any]
Found = dict[str, Any]  # the figures of one point

_INTRODUCTION = """\
# Log of the quality study

`python -m research.study` writes this page from its JSON.

- **Machine**: {cpu}, {cores} cores, networks in {precision}, {date}. Images are made in process, in
  batches of {batch}.
- **Images**: {curves:,} per row in the section Solvers, {others:,} per row in all other sections.
  All rows have the same classes and seeds.
- **Guidance**: scale {scale:g}, unless a row names another scale.
- **Features**: from {judge}.

The columns of the tables:

- **evaluations**: predictor + refiner, per image. With guidance, one evaluation has two rows.
- **time / H8**: time per image relative to H8 at the same guidance scale, decoder included. Each
  sampler ran in turns with H8. The cell has the median (minimum to maximum) of {rounds} batches.
  At guidance {scale:g} H8 took {ms:.0f} ms per image (median over the rows; {least:.0f} to
  {most:.0f} ms).
- **Fréchet**: the distance between features of generated and of real images, ± half of its 95%
  interval. The interval is a jackknife over {blocks} disjoint blocks of seeds. The distance falls
  with the number of images: compare it at equal numbers only.
- **− H8**: the Fréchet distance minus that of H8 at the same guidance scale. Its interval is paired
  by seeds.
- **spatial**: the Fréchet distance of spatial features, as in sFID.
- **IS**, **P**, **R**: Inception Score; precision and recall with three nearest neighbours.
- **recognised**: the share of images in which the classifier reads the requested class.
- **to exact**: root mean square distance of a latent to the exact solution, ± half of its 95%
  interval. It is the mean of the first {compared} images. The exact solution starts from the same
  noise. dopri5 computes it in float32 with tolerance {tolerance:g}.
"""


def write(study: Study, json_path: Path, path: Path) -> Path:
    """Writes the report to `path` and its pictures beside the JSON; returns `path`.

    Raises ValueError if the JSON is not that of a study.
    """
    if "size" not in study:
        raise ValueError(f"{json_path} has no study")
    plots = figures.draw(study, json_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    findings = json_path.with_name(f"{json_path.stem}_findings.md")
    said = read_text(findings) if findings.exists() else ""
    links = {os.path.relpath(plot, path.parent): caption for plot, caption in plots.items()}
    path.write_text(markdown(study, links, said))
    return path


def markdown(study: Study, plots: Mapping[str, str], findings: str) -> str:
    """The text of the report; `plots` has the links to the pictures, with their captions."""
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
            batch=BATCH,
            compared=max((point["exact_images"] for point in points), default=0),
            blocks=BLOCKS,
            tolerance=EXACT_TOLERANCE,
        )
    ]
    listed = unique(sections_of(study))
    if missing := sum(str(point) not in study["points"] for point in listed):
        parts.append(f"Not measured yet: {missing} of {len(listed)} points.")
    parts += [findings, _equal(study)]
    if plots:
        parts.append("## Pictures")
    for link, caption in plots.items():
        parts.append(f"![{Path(link).stem.replace('_', ' ')}]({link})\n\n{caption}")
    parts.append(_stable(study["stability"]))
    for section in sections_of(study):
        if table := _table(study, section):
            parts.append(f"## {section.title}\n\n{section.text}\n\n{table}")
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _equal(study: Study) -> str:
    """The fastest samplers that are as good as Heun; empty without points of the curves."""
    curves = next(section for section in sections_of(study) if section.title == CURVES)
    known = [found for _, found in measured(study, curves)]
    heuns = [each for name in equal.HEUN for each in known if each["sampler"] == name]
    parts = []
    for name, figure in (
        ("Fréchet distance", equal.FRECHET),
        ("distance to the exact solution", equal.EXACT),
    ):
        found = [equal.rivals(known, heun, figure) for heun in heuns]
        rows = [
            [family, *(_rival(of_heun.get(family)) for of_heun in found)]
            for family in equal.FAMILIES
            if any(family in of_heun for of_heun in found)
        ]
        if rows:
            table = _markdown_table(["family", *(f"`{heun['sampler']}`" for heun in heuns)], rows)
            parts.append(
                f"## At Heun's {name}\n\nEach cell has the fastest measured sampler of a family "
                f"whose {name} is at most {equal.AS_GOOD:.0%} above Heun's. The choice ignores the "
                "interval. The percentage is its time relative to Heun's, decoder included. In "
                f"brackets is the difference of the two figures, paired by seeds.\n\n{table}"
            )
    return "\n\n".join(parts)


def _rival(rival: equal.Rival | None) -> str:
    if rival is None:
        return "none"
    apart = f"{rival.difference:+.4f} ± {rival.interval:.4f}"
    return f"`{rival.sampler}` {rival.share:.0%} ({apart})"


def _stable(stability: dict[str, Found]) -> str:
    rows = []
    for scale, s in stability.items():
        places = [0, 8, 16, 24, 30]
        cells = [f"{s['median'][k]:.3f} ({s['low'][k]:.3f} to {s['high'][k]:.3f})" for k in places]
        rows.append([scale, *cells])
    table = _markdown_table(["guidance", "t = 0", "1/4", "1/2", "3/4", "15/16"], rows)
    return (
        "## Stability of the velocity\n\n"
        "The relative change of the velocity over a step of 1/32 that starts at t. Each cell has "
        f"the median of the images (10% to 90%).\n\n{table}"
    )


def _table(study: Study, section: Section) -> str:
    """The measured points of the section, without empty columns; empty without points."""
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
    return name + f", {point.repository}" * (point.repository != MAIN)


def _ratio(study: Study, point: Point, found: Found) -> str:
    ratio = found["ratio"]
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _minus_baseline(study: Study, point: Point, found: Found) -> str:
    """Fréchet distance minus H8's, at the same guidance scale and number of images."""
    other = equal.baseline(study, found)
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
    ("time / H8", _ratio),
    ("Fréchet", _with_interval("frechet_distance", "frechet_interval")),
    ("− H8", _minus_baseline),
    ("spatial", _plain("spatial_frechet_distance", ".3f")),
    ("IS", _plain("inception_score", ".2f")),
    ("P", _plain("knn_precision", ".3f")),
    ("R", _plain("knn_recall", ".3f")),
    ("recognised", _plain("recognised", ".1%")),
    ("to exact", _with_interval("from_exact", "from_exact_interval")),
)


def in_words(found: Found) -> str:
    """The main figures of one point, on one line."""
    interval = found["frechet_interval"] or 0.0
    return (
        f"{found['predictor']} + {found['refiner']} evaluations, {found['ms_per_image']:.1f} "
        f"ms/image, Fréchet distance {found['frechet_distance']:.4f} ± {interval:.4f}, "
        f"{found['from_exact']:.4f} to exact"
    )
