"""The study's figures, from its JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowturbo.presets import BUILT_IN
from flowturbo.solver.schedule import read_shift
from research.study.measure import BASELINE
from research.study.points import CURVES, GRIDS, GUIDANCE, REFINER_STEPS, measured, sections_of

Study = dict[str, Any]
Found = dict[str, Any]

# A family's name by the form of its samplers; the first that fits is taken.
_FAMILIES = (
    ("UniPC, shifted", r"unipc.*@.*", "s:"),
    ("UniPC", r"unipc.*", "s-"),
    ("DPM-Solver++, shifted", r"dpm.*@.*", "D:"),
    ("DPM-Solver++", r"dpm.*", "D-"),
    ("Heun", r"H\d+", "o-"),
    ("Heun, shifted", r"H\d+@.*", "o:"),
    ("Euler", r"E\d+", "v-"),
    ("Adams-Bashforth 2", r"A\d+", "^-"),
    ("Adams-Bashforth 2, shifted", r"A\d+@.*", "^:"),
    ("pseudo corrector", r"(H1)?P\d+", "<-"),
    ("FlowTurbo", r"H\d+(P\d+)?R\d+", "*"),
    ("FlowTurbo, shifted", r"H\d+(P\d+)?R\d+@.*", "P"),
    ("FlowTurbo, T for R", r"H\d+(P\d+)?T\d+", "X"),
    ("FlowTurbo, T for R, shifted", r"H\d+(P\d+)?T\d+@.*", "x"),
    ("FlowTurbo, Z for R", r"H\d+(P\d+)?Z\d+", "H"),
    ("FlowTurbo, Z for R, shifted", r"H\d+(P\d+)?Z\d+@.*", "h"),
)
_OURS = "FlowTurbo"
FAMILIES = tuple(name for name, _, _ in _FAMILIES)


def draw(study: Study, json_path: Path) -> list[Path]:
    """Writes every figure that the points are there for beside the JSON; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for name, size, panels, fill in (
        ("curves", (13, 9), (2, 2), _curves),
        ("stability", (7, 4.2), (1, 1), _stability),
        ("ablations", (14, 4.2), (1, 3), _ablations),
    ):
        figure, axes = pyplot.subplots(*panels, figsize=size, layout="constrained", squeeze=False)
        if fill(study, axes):
            written.append(json_path.with_name(f"{json_path.stem}_{name}.png"))
            figure.savefig(written[-1], dpi=120)
        pyplot.close(figure)
    return written


def family(sampler: str) -> tuple[str, str] | None:
    """The name and matplotlib format of `sampler`'s family, None for other mixtures."""
    for name, form, style in _FAMILIES:
        if re.fullmatch(form, sampler):
            return name, style
    return None


def _curves(study: Study, axes: Any) -> bool:
    """Fréchet distance and distance to the exact solution, against time and evaluations."""
    groups = _groups(study)
    if not groups:
        return False
    for row, (value, label) in enumerate(
        (("frechet_distance", "Fréchet distance"), ("from_exact", "distance to the exact solution"))
    ):
        for column, (cost, unit) in enumerate(
            (
                (time_share, "time an image, of H8's beside it"),
                (_evaluations, "predictor evaluations"),
            )
        ):
            axis = axes[row][column]
            for (name, style), found in groups.items():
                ordered = sorted(found, key=cost)
                x, y = [cost(each) for each in ordered], [each[value] for each in ordered]
                # FlowTurbo's points must not be hidden.
                front = name.startswith(_OURS)
                look = {"ms": 12, "color": "black", "zorder": 3} if front else {"ms": 7}
                axis.plot(x, y, style, label=name, **look)
            _name_best(axis, groups, cost, value)
            axis.set(xlabel=unit, ylabel=label, xscale="log", yscale="log")
            for scale in (axis.xaxis, axis.yaxis):
                scale.set_major_formatter("{x:g}")
                scale.set_minor_formatter("{x:g}")
            axis.tick_params(which="minor", labelsize=7)
            axis.grid(alpha=0.3, which="both")
    axes[0][0].legend(fontsize=8)
    return True


def _groups(study: Study) -> dict[tuple[str, str], list[Found]]:
    """The points of the curves, by family."""
    groups: dict[tuple[str, str], list[Found]] = {}
    for found in _points(study, CURVES):
        kind = family(found["sampler"])
        if kind is not None:
            groups.setdefault(kind, []).append(found)
    return groups


def _points(study: Study, title: str) -> list[Found]:
    """The measured points of a section."""
    section = next(section for section in sections_of(study) if section.title == title)
    return [found for _, found in measured(study, section)]


def time_share(found: Found) -> float:
    """The time an image, of H8's beside it: the machine's speed drifts from point to point."""
    # H8 in turns with itself tells of noise alone.
    share: float = 1.0 if found["sampler"] == BASELINE else found["ratio"]["median"]
    return share


def _evaluations(found: Found) -> int:
    count: int = found["predictor"]
    return count


def _name_best(
    axis: Any,
    groups: dict[tuple[str, str], list[Found]],
    cost: Callable[[Found], float],
    value: str,
) -> None:
    """Names FlowTurbo's points that no cheaper one of it equals, and the paper's."""
    ours = [each for (name, _), found in groups.items() if name.startswith(_OURS) for each in found]
    least = math.inf
    for each in sorted(ours, key=lambda each: (cost(each), each[value])):
        if each[value] < least or each["sampler"] in BUILT_IN.values():
            place = cost(each), each[value]
            axis.annotate(each["sampler"], place, (4, 6), textcoords="offset points", fontsize=7)
        least = min(least, each[value])


def _stability(study: Study, axes: Any) -> bool:
    axis = axes[0][0]
    for scale, s in study["stability"].items():
        axis.plot(s["t"], s["median"], label=f"guidance {scale}")
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

    def refiner_steps(each: Found) -> float:
        return each["refiner"] / 2  # a step evaluates twice

    _with_intervals(axes[0][0], steps, refiner_steps, "H1P5R…")
    axes[0][0].set(xlabel="refiner steps after H1P5", ylabel="Fréchet distance")
    for sampler in dict.fromkeys(each["sampler"] for each in scales):
        of_one = [each for each in scales if each["sampler"] == sampler]
        _with_intervals(axes[0][1], of_one, lambda each: each["guidance_scale"], sampler)
    axes[0][1].set(xlabel="guidance scale", ylabel="Fréchet distance")
    by_steps: dict[str, list[tuple[float, float]]] = {}
    for each in grids:
        sampler, shift = read_shift(each["sampler"])
        by_steps.setdefault(sampler, []).append((shift, each["from_exact"]))
    for sampler, places in by_steps.items():
        axes[0][2].plot(*zip(*sorted(places), strict=True), "o-", label=sampler)
    axes[0][2].set(
        xlabel="shift of the time grid", ylabel="distance to the exact solution", yscale="log"
    )
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend()
    return bool(steps or scales or grids)


def _with_intervals(axis: Any, found: list[Found], x: Callable[[Found], float], name: str) -> None:
    if found:
        places = [x(each) for each in found]
        heights = [each["frechet_distance"] for each in found]
        widths = [each["frechet_interval"] or 0.0 for each in found]
        axis.errorbar(places, heights, widths, fmt="o-", capsize=3, label=name)
