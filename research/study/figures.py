"""The pictures of the study, drawn from its JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

from flowturbo.presets import BUILT_IN
from flowturbo.solver.schedule import read_shift
from research.study.equal import EXACT, FRECHET, baseline, difference, family, time_share
from research.study.points import CURVES, GRIDS, GUIDANCE, REFINER_STEPS, measured, sections_of

Study = dict[str, Any]
Found = dict[str, Any]

# Series of the curves: a label, the look, and families if the label does not name it. Lines join
# schedules of one kind of step; other schedules have no order.
SERIES: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("Heun", {"fmt": "o-", "color": "C0"}, ()),
    ("Adams-Bashforth 2", {"fmt": "^--", "color": "C1"}, ()),
    ("UniPC", {"fmt": "s-.", "color": "C4"}, ()),
    ("DPM-Solver++", {"fmt": "D:", "color": "C5"}, ()),
    ("NeuralSolver", {"fmt": "v:", "color": "C7"}, ()),
    ("learned (L)", {"fmt": "P-", "color": "C3", "ms": 8}, ("learned",)),
    (
        "FlowTurbo with Z or T for R",
        {"fmt": "h", "color": "C2", "ms": 8},
        ("FlowTurbo with Z for R", "FlowTurbo with T for R"),
    ),
    ("FlowTurbo", {"fmt": "*", "color": "black", "ms": 11}, ()),
)
_OWN_GRID = ("learned", "NeuralSolver")
_LABELS = {FRECHET: "Fréchet distance minus H8's", EXACT: "distance to the exact solution"}
_TOP = 0.01  # of Fréchet distance minus H8's in the curves: a few bad schedules would hide the rest
_GAIN = 0.1  # a named schedule has a figure lower by this share than any faster schedule
_STYLES = ("o-", "s--", "^-.", "D:", "*-")  # tell series apart without colour
# Where a name may stand beside its point: offset in points, and alignment.
_PLACES = (
    ((7, 5), "left"),
    ((7, -11), "left"),
    ((-7, 5), "right"),
    ((-7, -11), "right"),
    ((0, 14), "center"),
)

_BARS = "Bars: 95% intervals; differences from H8 are paired by seeds."
CAPTIONS = {
    "curves": "Quality against time, on the uniform time grid and on other grids. Names: the "
    f"built-in presets, and schedules that are better than all faster ones. {_BARS} Schedules "
    f"more than {_TOP:g} above H8 are outside the upper panels.",
    "stability": "Relative change of the velocity over 1/32 of the time. Lines: medians over the "
    "images. Bands: 10% to 90%.",
    "ablations": "Top: number of refiner steps after H1P5. Bottom: guidance scale, and shift of "
    f"the time grid. {_BARS}",
}


def draw(study: Study, json_path: Path) -> dict[Path, str]:
    """Draws every picture that there are points for, beside the JSON.

    Returns the paths with their captions.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = {}
    for name, size, panels, fill in (
        ("curves", (13, 10), (2, 2), _curves),
        ("stability", (7, 4.2), (1, 1), _stability),
        ("ablations", (12, 8), (2, 2), _ablations),
    ):
        figure, axes = pyplot.subplots(*panels, figsize=size, layout="constrained", squeeze=False)
        if fill(study, axes):
            path = json_path.with_name(f"{json_path.stem}_{name}.png")
            figure.savefig(path, dpi=120)
            written[path] = CAPTIONS[name]
        pyplot.close(figure)
    return written


def _curves(study: Study, axes: Any) -> bool:
    """Both figures of merit against time, on the uniform time grid and on shifted grids."""
    grids: tuple[list[Found], list[Found]] = ([], [])
    for found in _points(study, CURVES):
        if series(found) is not None:
            elsewhere = "@" in found["sampler"] or family(found["sampler"]) in _OWN_GRID
            grids[elsewhere].append(found)
    for (row, figure), column in product(enumerate(_LABELS), range(2)):
        axis = axes[row][column]
        for number, (label, look, _) in enumerate(SERIES):
            own = [each for each in grids[column] if series(each) == number]
            shifts = sorted({_shift(each) for each in own})
            for shift in shifts:  # a line each, one label
                of_shift = [each for each in own if _shift(each) == shift]
                named = label if shift == shifts[0] else None
                _errorbar(axis, study, of_shift, time_share, figure, label=named, **look)
        title = ("uniform time grid", "shifted and solvers' own time grids")[column]
        axis.set(title=title, xscale="log")
        axis.set(xlabel="time per image relative to H8", ylabel=_LABELS[figure])
        axis.grid(alpha=0.3, which="both")
        if figure == EXACT:
            axis.set_yscale("log")
            plain_numbers(axis.yaxis)
        plain_numbers(axis.xaxis)
    for row in axes:
        row[1].sharex(row[0])
        row[1].sharey(row[0])
        for axis in row:
            axis.autoscale()
    axes[0][0].set_ylim(top=min(_TOP, axes[0][0].get_ylim()[1]))
    _legend_below(axes)
    axes[0][0].figure.draw_without_rendering()  # so that positions on the canvas are known
    for (row, figure), column in product(enumerate(_LABELS), range(2)):
        _name_front(axes[row][column], study, grids[column], figure)
    return any(grids)


def _points(study: Study, title: str) -> list[Found]:
    """The measured points of a section."""
    section = next(section for section in sections_of(study) if section.title == title)
    return [found for _, found in measured(study, section)]


def series(found: Found) -> int | None:
    """The position in SERIES; None for a family that is in the tables only."""
    name = (family(found["sampler"]) or "").removesuffix(", shifted")
    names = (families or (label,) for label, _, families in SERIES)
    return next((k for k, of_series in enumerate(names) if name in of_series), None)


def _shift(found: Found) -> float:
    return read_shift(found["sampler"])[1] or 1.0


def _value(study: Study, found: Found, figure: str) -> tuple[float, float] | None:
    """What the pictures show of a point: its height, and half its 95% interval.

    The Fréchet distance is shown as the difference from H8's; without H8 there is none.
    """
    if figure == EXACT:
        return found[EXACT], found["from_exact_interval"] or 0.0
    other = baseline(study, found)
    return difference(found, other, FRECHET) if other else None


def _errorbar(
    axis: Any,
    study: Study,
    found: Iterable[Found],
    x: Callable[[Found], float],
    figure: str,
    **look: Any,
) -> None:
    values = [(x(each), _value(study, each, figure)) for each in found]
    places = sorted((at, *value) for at, value in values if value)
    if places:
        axis.errorbar(*zip(*places, strict=True), capsize=2, elinewidth=0.8, **look)


def _name_front(axis: Any, study: Study, found: list[Found], figure: str) -> None:
    """Names the built-in presets, and schedules that are better than all faster ones by _GAIN.

    A name that would cover a point or another name is left out.
    """
    values = [(each, time_share(each), _value(study, each, figure)) for each in found]
    shown = [(each, x, *value) for each, x, value in values if value]
    covered = [(x, y + part * half) for _, x, y, half in shown for part in (-1, -0.5, 0, 0.5, 1)]
    points = axis.transData.transform(covered or [(1, 1)])
    taken: list[Any] = []
    best = float("inf")
    for each, x, y, _ in sorted(shown, key=lambda row: row[1:]):
        if each[figure] > (1 - _GAIN) * best and each["sampler"] not in BUILT_IN.values():
            continue
        best = min(best, each[figure])
        for offset, side in _PLACES:
            text = axis.annotate(
                each["sampler"], (x, y), offset, textcoords="offset points", ha=side, fontsize=8
            )
            box = text.get_window_extent()
            inside = axis.bbox.contains(box.x0, box.y0) and axis.bbox.contains(box.x1, box.y1)
            free = not box.padded(4).count_contains(points) and not box.count_overlaps(taken)
            if inside and free:
                taken.append(box)
                break
            text.remove()


def plain_numbers(axis: Any) -> None:
    """Numbers on a logarithmic `axis` as such, not as powers of ten."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")
    axis.set_tick_params(which="both", labelsize=8)


def _legend_below(axes: Any) -> None:
    """One legend for all panels."""
    named: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True)) | named
    order = [label for label, _, _ in SERIES if label in named]
    axes[0][0].figure.legend(
        [named[label] for label in order], order, loc="outside lower center", ncols=len(order) or 1
    )


def _stability(study: Study, axes: Any) -> bool:
    axis = axes[0][0]
    for (scale, s), line in zip(study["stability"].items(), ("-", "--", "-."), strict=False):
        axis.plot(s["t"], s["median"], line, label=f"guidance {scale}")
        axis.fill_between(s["t"], s["low"], s["high"], alpha=0.2)
    axis.set(
        xlabel="t (noise at 0, data at 1)", ylabel="|v(t + 1/32) − v(t)| / |v(t)|", yscale="log"
    )
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    return bool(study["stability"])


def _ablations(study: Study, axes: Any) -> bool:
    """The number of refiner steps, the guidance scale, and the time grid."""
    steps, scales, grids = (_points(study, s) for s in (REFINER_STEPS, GUIDANCE, GRIDS))
    (few, exact), (guided, shifted) = axes

    def refiner_steps(each: Found) -> float:
        return each["refiner"] / 2  # one step evaluates twice

    _errorbar(few, study, steps, refiner_steps, FRECHET, fmt="o-")
    few.set(xlabel="refiner steps after H1P5", ylabel=_LABELS[FRECHET])
    _errorbar(exact, study, steps, refiner_steps, EXACT, fmt="o-")
    exact.set(xlabel="refiner steps after H1P5", ylabel=_LABELS[EXACT])

    samplers = dict.fromkeys(each["sampler"] for each in scales if each["sampler"] != "H8")
    for k, (sampler, style) in enumerate(zip(samplers, _STYLES, strict=False)):
        own = [each for each in scales if each["sampler"] == sampler]

        def scale(each: Found, k: int = k) -> float:
            share: float = each["guidance_scale"] + 0.02 * (k - 1.5)  # bars must not overlap
            return share

        _errorbar(guided, study, own, scale, FRECHET, fmt=style, label=sampler)
    guided.axhline(0, color="grey", lw=0.8)
    guided.set(xlabel="guidance scale", ylabel=_LABELS[FRECHET])

    without_shift = dict.fromkeys(read_shift(each["sampler"])[0] for each in grids)
    for sampler, style in zip(without_shift, _STYLES, strict=False):
        own = [each for each in grids if read_shift(each["sampler"])[0] == sampler]
        _errorbar(shifted, study, own, _shift, EXACT, fmt=style, label=sampler)
    shifted.set(xlabel="shift of the time grid (1: uniform)", ylabel=_LABELS[EXACT], yscale="log")
    plain_numbers(shifted.yaxis)
    for axis in axes.flat:
        axis.grid(alpha=0.3, which="both")
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    return bool(steps or scales or grids)
