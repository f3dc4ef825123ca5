"""The result of a search as a table and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tuning.choice import Choice, Rated


def table(found: Choice, in_process_ms: Sequence[float] | None) -> str:
    """The front, one schedule per line; `surely` means better than the line before at 95%.

    `in_process_ms` are the measured times of the front's requests; None if not measured.
    """
    title, clocked = "", [""] * len(found.front)
    if in_process_ms is not None:
        title, clocked = f"{'in process':>12}", [f"{ms:12.1f}" for ms in in_process_ms]
    lines = [f"{'schedule':<10} {'ms':>8}{title}  {'figure':<20} better"]
    for k, each in enumerate(found.front):
        surely = k > 0 and found.front[k - 1].score.surely_above(each.score)
        better = "" if k == 0 else "surely" if surely else "perhaps"
        names = ", ".join(name for name, preset in found.presets.items() if preset is each)
        lines.append(f"{_words(each, clocked[k])}  {better:<8} {names}".rstrip())
    fits = found.recommended
    lines.append(f"{_words(found.paper, ' ' * len(title))}  (the paper's)")
    lines.append(f"recommended: {fits.schedule if fits else 'no schedule reaches the target'}")
    return "\n".join(lines)


def _words(rated: Rated, measured: str) -> str:
    figure = f"{rated.score.value:.4g} ± {rated.score.interval:.2g}"
    return f"{rated.schedule!s:<10} {rated.ms:8.1f}{measured}  {figure:<20}"


def draw(
    tried: Sequence[Rated],
    found: Choice,
    labels: tuple[str, str],
    path: Path,
) -> None:
    """Writes a PNG: schedules of the last stage, the front as a line, and named presets.

    `labels` are the labels of the two axes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    axis.plot(*_points(tried), ".", color="0.7", label="others, same number of seeds")
    axis.errorbar(
        *_points(found.front),
        yerr=[r.score.interval for r in found.front],
        fmt="o-",
        ms=4,
        label="front",
    )
    by_schedule: dict[Rated, list[str]] = {}
    for name, rated in found.presets.items():
        by_schedule.setdefault(rated, []).append(name)
    for rated, of_it in by_schedule.items():
        axis.plot(rated.ms, rated.score.value, "o", ms=10, mfc="none", color="black")
        axis.annotate(
            f"{', '.join(of_it)}: {rated.schedule}",
            (rated.ms, rated.score.value),
            xytext=(-8, -12),  # below the front, where no points are
            textcoords="offset points",
            ha="right",
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
