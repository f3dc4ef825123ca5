"""What the study measures: the one list of its points."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.quality.engine import Recipe
from flowturbo.program import Variant

MAIN = "main"  # the name of the first repository, whose refiner all sections but the last use
CURVES, REFINER_STEPS, GUIDANCE = "Solvers", "Number of refiner steps", "Guidance scale"


@dataclass(frozen=True)
class Point:
    """One recipe in one repository, by its name."""

    recipe: Recipe
    repository: str = MAIN

    def __str__(self) -> str:
        return f"{self.repository}/{self.recipe}"


@dataclass(frozen=True)
class Section:
    """Points that belong in one table; `text` says what to look for in it."""

    title: str
    text: str
    points: tuple[Point, ...]


def sections(scale: float, refiners: Sequence[str] = ()) -> tuple[Section, ...]:
    """The study at guidance `scale`; `refiners` names repositories with other refiners."""

    def of(samplers: str, **recipe: object) -> tuple[Point, ...]:
        return tuple(Point(Recipe(s, scale, **recipe)) for s in samplers.split())  # type: ignore[arg-type]

    found = [
        Section(CURVES, "Solvers that evaluate the predictor alone, then FlowTurbo.", of(_SOLVERS)),
        Section(
            "In place of the refiner",
            "T extrapolates the velocity along a line, Z keeps it as it is, both without any "
            "evaluation. The last of each group leaves these steps out and takes longer ones.",
            of("H1P5R3 H1P5T3 H1P5Z3 H1P5 H2P4R2 H2P4T2 H2P4Z2 H2P4 H5P7R3 H5P7T3 H5P7Z3 H5P7"),
        ),
        Section("Components", "The schedules of the paper's ablation.", of(_COMPONENTS)),
        Section(
            "Order of blocks",
            "Refiner steps come last in the paper, and suffer most elsewhere.",
            of("H5P7R3 P5H7R3 P5R7H3 H5R7P3 H1P1R1H1P1R1H1P1R1 H3P3R3"),
        ),
        Section(
            REFINER_STEPS,
            "More of them on the same grid from noise to data: every step is shorter.",
            of("H1P5 H1P5R1 H1P5R2 H1P5R3 H1P5R4 H1P5R5 H1P5R6"),
        ),
        Section(
            "What a refiner step reads",
            "In its second evaluation: the velocity from before the step (`reference`, as the "
            "public code does) or the refined one (`paper`, Eq. 7).",
            tuple(
                point
                for sampler in ("H1P5R3", "H2P4R2", "H5P7R3")
                for variant in Variant
                for point in of(sampler, variant=variant.value)
            ),
        ),
        Section(
            "Guidance interval",
            "Guidance acts between two times only; an evaluation outside costs half. The exact "
            "solution is that of the flow so guided.",
            tuple(
                point
                for interval in ((0.0, 1.0), (0.0, 0.5), (0.0, 0.8), (0.1, 0.8), (0.2, 1.0))
                for point in of("H8 H1P5R3", interval=interval)
            ),
        ),
        Section(
            GUIDANCE,
            "The same two schedules at other scales.",
            tuple(
                Point(Recipe(sampler, other))
                for other in sorted({1.0, 1.5, 2.0, 3.0, 4.0, 6.0, scale})
                for sampler in ("H8", "H1P5R3")
            ),
        ),
    ]
    if refiners:
        found.append(
            Section(
                "Refiners",
                "The same predictor with other refiners.",
                tuple(
                    Point(Recipe(sampler, scale), name)
                    for sampler in ("H1P5R3", "H2P4R2", "H5P7R3")
                    for name in (MAIN, *refiners)
                ),
            )
        )
    return tuple(found)


# SiT's own tolerance of dopri5, 1e-3, is below the rounding of bfloat16: steps shrink to nothing.
_SOLVERS = (
    "H4 H6 H8 H12 H16 E8 E12 E16 A8 A12 A16 P5 P7 P11 P15 unipc:6 unipc:8 unipc:12 unipc:16 "
    "dpm:6 dpm:8 dpm:12 dpm:16 dopri5:1e-2 H1P2R1 H1P5R3 H2P4R2 H2P8R2 H5P7R3 H8P9R5"
)
_COMPONENTS = "H8 H7R1 H6R2 H5R3 H7R2 H5P2R2 H3P4R2 H3P3R2 H2P8R2 H2P4R2 H1P6R2 H1P5R3"


def unique(of: Iterable[Section]) -> tuple[Point, ...]:
    """Every point of the sections once, in their order."""
    return tuple(dict.fromkeys(point for section in of for point in section.points))
