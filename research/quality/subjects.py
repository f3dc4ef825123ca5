"""What measured images are to show, by seed, and whether they show it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from flowturbo.conditions.class_label import LABEL, ClassLabel
from flowturbo.conditions.prompt import PROMPT
from flowturbo.pipeline import Pipeline
from flowturbo.solver.sampler import Array
from flowturbo.textfile import read_text
from training.scenes.grammar import Scene
from training.scenes.judge import HEADS, answers_of, readings

ALL = "recognised"  # everything that was asked for
_SCENES_SEED = 7919  # of the measured scenes: training has other seeds
SETS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "single": {"signs": 1},
    "two": {"signs": 2},
    "single-new": {"signs": 1, "held_out": True},
    "two-new": {"signs": 2, "held_out": True},
}


class Subject(Protocol):
    """What seed i asks for. `suffix` of a file's name tells the subjects apart."""

    @property
    def suffix(self) -> str: ...

    @property
    def stated(self) -> Mapping[str, Any]:
        """What identifies the subjects, as JSON values."""

    def asked(self, seeds: Array) -> dict[str, Any]:
        """Arguments of `generate` that ask for the subjects of `seeds` [n]."""

    def tensors(self, seeds: Array) -> dict[str, Array]:
        """Request inputs that ask for them."""

    def labels(self, seeds: Array) -> Array | None:
        """Class ids [n]; None if the subjects are no classes."""

    def right(self, probability: Array, seeds: Array) -> dict[str, Array]:
        """What a judge that knows the subjects reads rightly, [n] bool each; ALL is everything.

        `probability` [n, K] are the judge's outputs.
        """


@dataclass(frozen=True)
class Classes:
    """Seed i has class i mod `count`."""

    count: int

    suffix: ClassVar[str] = ""

    @property
    def stated(self) -> Mapping[str, Any]:
        return {"num_classes": self.count}

    def asked(self, seeds: Array) -> dict[str, Any]:
        return {LABEL: self.labels(seeds)}

    def tensors(self, seeds: Array) -> dict[str, Array]:
        return {LABEL: self.labels(seeds)}

    def labels(self, seeds: Array) -> Array:
        return seeds % self.count

    def right(self, probability: Array, seeds: Array) -> dict[str, Array]:
        return {ALL: probability.argmax(1) == self.labels(seeds)}


@dataclass(frozen=True)
class ScenePrompts:
    """Seed i has a prompt of random scene i in the set `name` of SETS.

    Training never shows the pairs of sign and colour of the `new` sets.
    """

    name: str = "mixed"

    def __post_init__(self) -> None:
        if self.name not in SETS:
            raise ValueError(f"scenes must be one of {', '.join(SETS)}, got {self.name!r}")

    @property
    def suffix(self) -> str:
        return f"_{self.name}"

    @property
    def stated(self) -> Mapping[str, Any]:
        return {"scenes": self.name}

    def scenes(self, seeds: Array) -> list[tuple[Scene, str]]:
        """The scene and the prompt of each of `seeds`."""
        found = []
        for seed in seeds.tolist():
            rng = np.random.default_rng([_SCENES_SEED, seed])
            scene = Scene.draw(rng, **SETS[self.name])
            found.append((scene, scene.prompt(rng)))
        return found

    def asked(self, seeds: Array) -> dict[str, Any]:
        return {PROMPT: [prompt for _, prompt in self.scenes(seeds)]}

    def tensors(self, seeds: Array) -> dict[str, Array]:
        return {PROMPT: np.array([prompt for _, prompt in self.scenes(seeds)], dtype=object)}

    def labels(self, seeds: Array) -> None:
        return None

    def right(self, probability: Array, seeds: Array) -> dict[str, Array]:
        """Also `swapped`: the two colours are exchanged; and `shuffled`: another seed's prompt."""
        wanted = answers_of([scene for scene, _ in self.scenes(seeds)])
        found = readings(probability)
        same = found == wanted
        names = list(HEADS)
        first, second = names.index("first colour"), names.index("second colour")
        shuffled = (found == np.roll(wanted, 1, axis=0)).all(1)
        swapped = found[:, [first, second]] == wanted[:, [second, first]]
        differ = wanted[:, first] != wanted[:, second]
        return {
            ALL: same.all(1),
            **{name: same[:, k] for k, name in enumerate(names)},
            "swapped": swapped.all(1) & differ,
            "shuffled": shuffled,
        }


@dataclass(frozen=True)
class Prompts:
    """Seed i has text i mod n of `texts`, which no judge here can read."""

    texts: tuple[str, ...]

    @classmethod
    def of_file(cls, path: Path) -> Prompts:
        """One text per line; empty lines do not count. Raises TextFileError, or ValueError."""
        texts = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
        if not texts:
            raise ValueError(f"{path} has no text: write one per line")
        return cls(texts)

    @property
    def suffix(self) -> str:
        digest = hashlib.sha256("\n".join(self.texts).encode()).hexdigest()
        return f"_prompts{digest[:8]}"

    @property
    def stated(self) -> Mapping[str, Any]:
        return {"prompts": len(self.texts)}

    def asked(self, seeds: Array) -> dict[str, Any]:
        return {PROMPT: [self.texts[seed % len(self.texts)] for seed in seeds.tolist()]}

    def tensors(self, seeds: Array) -> dict[str, Array]:
        return {PROMPT: np.array(self.asked(seeds)[PROMPT], dtype=object)}

    def labels(self, seeds: Array) -> None:
        return None

    def right(self, probability: Array, seeds: Array) -> dict[str, Array]:
        return {}


def subject_of(pipeline: Pipeline, scenes: str = "mixed") -> Subject:
    """The subjects that `pipeline` is measured with: its classes, or scenes."""
    if isinstance(pipeline.condition, ClassLabel):
        return Classes(pipeline.condition.num_classes)
    return ScenePrompts(scenes)
