"""The list of everything that the study measures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowturbo.solver.calls import Variant
from research.quality.engine import SamplingSpec
from research.study.refiners import REFINERS

MAIN = "main"  # the repository of all sections; only the last section has others as well
CURVES, REFINER_STEPS = "Solvers", "Number of refiner steps"
GRIDS, GUIDANCE = "Time grid", "Guidance scale"


@dataclass(frozen=True)
class Size:
    """Images per point of the section CURVES, and per point of any other section."""

    curves: int = 10_000
    others: int = 2_000


@dataclass(frozen=True)
class Point:
    """One sampling spec, run on one repository for a number of images.

    Its text is its key in the JSON.
    """

    spec: SamplingSpec
    images: int
    repository: str = MAIN

    def __str__(self) -> str:
        return f"{self.repository}/{self.spec} {self.images}"


@dataclass(frozen=True)
class Section:
    """The points of one table; `text` introduces the table."""

    title: str
    text: str
    points: tuple[Point, ...]


def sections(
    scale: float, guided: float, size: Size, refiners: Sequence[str] = ()
) -> tuple[Section, ...]:
    """All sections at guidance `scale`; those about guidance also use the scale `guided`.

    `refiners` names the refiners of research/study/refiners.py that are trained.
    """

    def of(samplers: str, scale: float = scale, **spec: object) -> tuple[Point, ...]:
        return tuple(
            Point(SamplingSpec(s, scale, **spec), size.others)  # type: ignore[arg-type]
            for s in samplers.split()
        )

    found = [
        Section(
            CURVES,
            "FlowTurbo schedules and solvers without a refiner, at the largest number of images. "
            "A number after @ is the shift of the time grid; without it the grid is uniform.",
            tuple(Point(SamplingSpec(sampler, scale), size.curves) for sampler in _SOLVERS.split()),
        ),
        Section(
            GRIDS,
            "A shift above 1 takes shorter steps near the noise and longer steps near the data.",
            of(" ".join(f"{s}{shift}" for s in _ON_GRIDS.split() for shift in _SHIFTS)),
        ),
        Section(
            "In place of the refiner",
            "Z reuses the last velocity; T extrapolates it. Neither calls a network. In each group "
            "one schedule has no such steps, so its other steps are longer. Another has one more "
            "step of the predictor instead.",
            of(_RIVALS),
        ),
        Section(
            "Refiner steps after Adams-Bashforth",
            "On the uniform grid R and Z steps at the end also shorten the steps before them. "
            "A shift does the same without them.",
            of("A6 A6R2 A6Z2 A7 A7R1 A8 A6@2 A6R2@2 A6Z2@2 A7@2 A7R1@2 A8@2"),
        ),
        Section("Components", "The schedules of the paper's ablation.", of(_COMPONENTS)),
        Section(
            "Order of blocks",
            "The paper puts refiner steps last. These schedules put them elsewhere.",
            of("H5P7R3 P5H7R3 P5R7H3 H5R7P3 H1P1R1H1P1R1H1P1R1 H3P3R3"),
        ),
        Section(
            REFINER_STEPS,
            "Each additional step makes all steps of the uniform grid shorter.",
            of("H1P5 H1P5R1 H1P5R2 H1P5R3 H1P5R4 H1P5R5 H1P5R6"),
        ),
        Section(
            "What a refiner step reads",
            "The second evaluation of the refiner reads a velocity. By default this is the one "
            "from before the step, as in the public code (`reference`). The variant `paper` reads "
            "the refined velocity, as in Eq. 7.",
            tuple(
                point
                for sampler in ("H1P5R3", "H2P4R2", "H5P7R3")
                for variant in Variant
                for point in of(sampler, variant=variant.value)
            ),
        ),
        Section(
            "Nearly exact",
            "Heun with many steps, and dopri5, which chooses its own steps.",
            # At SiT's tolerance of 1e-3, dopri5 takes the rounding of bfloat16 for an error and
            # needs twice the evaluations.
            of("H8 H16 H32 dopri5:1e-2"),
        ),
        Section(
            GUIDANCE,
            "The same schedules at several guidance scales.",
            tuple(
                point
                for other in sorted({1.0, 1.5, guided, scale})
                for point in of("H4 H8 H16 H1P5R3 A8@3", scale=other)
            ),
        ),
        Section(
            "Guidance interval",
            "Guidance acts between two times only. An evaluation outside costs half as much. The "
            "exact solution has guidance in the same interval.",
            tuple(
                point
                for interval in ((0.0, 1.0), (0.0, 0.8), (0.1, 0.8), (0.2, 1.0))
                for point in of("H8 H1P5R3", scale=guided, interval=interval)
            ),
        ),
    ]
    if refiners:
        found.append(
            Section(
                "Refiners",
                _REFINERS_TEXT + "\n".join(f"- `{n}`: {_options(n)}" for n in refiners),
                tuple(
                    Point(SamplingSpec(sampler, each), size.others, name)
                    for sampler, each in (
                        ("H1P5R3", scale),
                        ("H1P5R3@2", scale),
                        ("H1P5R3", guided),
                    )
                    for name in (MAIN, *refiners)
                ),
            )
        )
    return tuple(found)


_REFINERS_TEXT = """\
The same predictor with other refiners. Rows without a name use the refiner of the repository
itself. `python -m research.study.refiners` trains the others, with these options of
`python -m training.refiner`:

"""
_SOLVERS = (
    "H4 H8 H12 H1P2Z1@3 H1P3Z1@3 H2P3Z1@3 A4@2 A6@3 A8@3 H1P2R1@2 H1P5R3 H1P5R3@2 H2P4R2 H1P2R1 "
    "H1P5 H1P5Z3 H1P5T3 H2P4Z2 H1P1Z1@3 H1P3T2@1.5 H1P4Z1@1.5 H1P2Z1@2 H1P3Z1@2 "
    "A8 U8 U8@2 D8 E8 H4@1.5 H8@1.5 P7 A12 H2P9Z1@2 U12 U6@2 D12 E16 P11 "
    "H16 H2P8R2 H5P7R3 H8P9R5 A5@2 A6@2 A12@3 U6@3 U8@3 D8@3 V6@3 G6@3 N6 N8 L3 L4 L5 L6 L8"
)
_ON_GRIDS, _SHIFTS = "H4 H8 A8 H1P5R3", ("", "@1.5", "@2", "@3", "@4")
_RIVALS = (
    "H1P5R3 H1P5T3 H1P5Z3 H1P5 H1P6 H2P4R2 H2P4T2 H2P4Z2 H2P4 H2P5 H5P7R3 H5P7T3 H5P7Z3 H5P7 H5P8 "
    "H1P5R3@2 H1P5T3@2 H1P5Z3@2 H1P5@2 H1P6@2 H1P3R1@3 H1P3T1@3 H1P3Z1@3 H1P3@3 H1P4@3"
)
_COMPONENTS = "H8 H7R1 H6R2 H5R3 H7R2 H5P2R2 H3P4R2 H3P3R2 H2P8R2 H2P4R2 H1P6R2 H1P5R3"


def _options(refiner: str) -> str:
    options = REFINERS.get(refiner)
    return f"`{options}`" if options else "from an earlier list of refiners"


def sections_of(study: Mapping[str, Any]) -> tuple[Section, ...]:
    """The sections of the study whose JSON is `study`."""
    size = Size(**study["size"])
    return sections(study["guidance_scale"], study["guided_scale"], size, study["refiners"])


def measured(study: Mapping[str, Any], section: Section) -> list[tuple[Point, dict[str, Any]]]:
    """The measured points of `section`, each with its figures."""
    found = study["points"]
    return [(point, found[str(point)]) for point in section.points if str(point) in found]


def unique(of: Iterable[Section]) -> tuple[Point, ...]:
    """Every point of the sections, without repeats, in order."""
    return tuple(dict.fromkeys(point for section in of for point in section.points))
