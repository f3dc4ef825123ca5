"""What a search found: a table, a figure, and a file of presets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.tune.choice import Rated


def table(
    front: Sequence[Rated], names: Mapping[str, Rated], in_process_ms: Sequence[float]
) -> str:
    """The front, a schedule a line; `surely` where it is better than the line before, 95%."""
    lines = [f"{'schedule':<10} {'ms':>8} {'in process':>11}  {'figure':<20} better"]
    for k, each in enumerate(front):
        surely = k > 0 and front[k - 1].score.surely_above(each.score)
        said = "" if k == 0 else "surely" if surely else "perhaps"
        figure = f"{each.score.value:.4g} ± {each.score.interval:.2g}"
        of_preset = ", ".join(name for name, preset in names.items() if preset is each)
        lines.append(
            f"{each.schedule!s:<10} {each.ms:8.1f} {in_process_ms[k]:11.1f}  {figure:<20} "
            f"{said:<8} {of_preset}".rstrip()
        )
    return "\n".join(lines)


def write(document: Mapping[str, Any], path: Path) -> None:
    """The JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def draw(
    tried: Sequence[Rated],
    front: Sequence[Rated],
    names: Mapping[str, Rated],
    labels: tuple[str, str],
    path: Path,
) -> None:
    """Writes a PNG: all that were tried, the front as a line, and the presets by name.

    `labels` are those of the two axes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    axis.plot(*_points(tried), ".", color="0.7", label="tried")
    axis.errorbar(
        *_points(front), yerr=[r.score.interval for r in front], fmt="o-", ms=4, label="front"
    )
    by_schedule: dict[Rated, list[str]] = {}
    for name, rated in names.items():
        by_schedule.setdefault(rated, []).append(name)
    for rated, of_it in by_schedule.items():
        axis.plot(rated.ms, rated.score.value, "o", ms=10, mfc="none", color="black")
        axis.annotate(
            f"{', '.join(of_it)}: {rated.schedule}",
            (rated.ms, rated.score.value),
            xytext=(8, 8),
            textcoords="offset points",
        )
    axis.set(xlabel=labels[0], ylabel=labels[1], xscale="log", yscale="log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.legend()
    axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _points(rated: Sequence[Rated]) -> tuple[list[float], list[float]]:
    return [each.ms for each in rated], [each.score.value for each in rated]
