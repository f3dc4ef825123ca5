"""Glyph scenes: what an image shows, and the prompts that ask for it.

A scene is one or two signs, each of one colour, on a plain ground. Prompts are English phrases.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Sixteen signs that no font draws alike. Letters are capitals in the image; a tokenizer in CLIP's
# form reads only lower case, so a prompt cannot ask for the case.
SIGNS = tuple("BCEHKLRTXY234579")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 225, 50),
    "purple": (150, 60, 190),
    "orange": (245, 125, 20),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
COLOUR_NAMES = tuple(COLOURS)
PLACES = ("in the centre", "at the top left", "at the top right") + (
    "at the bottom left",
    "at the bottom right",
)
RELATIONS = ("left of", "above")  # of the first sign to the second
LAYOUTS = (*PLACES, *RELATIONS)
_TWO_SIGNS = 0.6  # share of scenes with two signs
_INVERSE = {"left of": "right of", "above": "below"}
_WORDS = {
    "in the centre": ("in the centre", "in the center", "in the middle"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "below": ("below", "under"),
}
# Where the second sign is, seen from the first, and the first from the second.
_SEEN = {"left of": "to its right", "right of": "to its left"} | {
    "above": "below it",
    "below": "above it",
}


@dataclass(frozen=True)
class Sign:
    """A sign of SIGNS in a colour of COLOURS."""

    sign: str
    colour: str

    @property
    def held_out(self) -> bool:
        """Whether no training image shows this sign in this colour: so for a fifth of the pairs."""
        return (SIGNS.index(self.sign) + 2 * COLOUR_NAMES.index(self.colour)) % 5 == 0


@dataclass(frozen=True)
class Scene:
    """`signs` on a `ground`: one at a place, or two with the left or upper one first."""

    layout: str
    signs: tuple[Sign, ...]
    ground: str

    @property
    def held_out(self) -> bool:
        """Whether a sign has a colour that training does not show it in."""
        return any(sign.held_out for sign in self.signs)

    @classmethod
    def draw(
        cls, rng: np.random.Generator, *, held_out: bool | None = False, signs: int | None = None
    ) -> "Scene":
        """A random scene: without pairs that are held out, with only such pairs, or (None) any.

        `signs` is 1 or 2; None draws it.
        """
        count = signs or (2 if rng.random() < _TWO_SIGNS else 1)
        ground = str(rng.choice(COLOUR_NAMES))
        layout = str(rng.choice(PLACES if count == 1 else RELATIONS))
        drawn = tuple(_draw_sign(rng, ground, held_out=held_out) for _ in range(count))
        return cls(layout, drawn, ground)

    def prompt(self, rng: np.random.Generator | None = None) -> str:
        """The plain prompt, or one of its paraphrases."""
        if rng is None:
            first, *others = (f"{_a(sign.colour)} {_noun(sign.sign)}" for sign in self.signs)
            return f"{' '.join([first, self.layout, *others])} on {self.ground}"
        return _Paraphrase(rng).of(self)


def _draw_sign(rng: np.random.Generator, ground: str, *, held_out: bool | None) -> Sign:
    while True:
        found = Sign(str(rng.choice(SIGNS)), str(rng.choice(COLOUR_NAMES)))
        if found.colour != ground and held_out in (None, found.held_out):
            return found


def _a(colour: str) -> str:
    return f"an {colour}" if colour[0] in "aeiou" else f"a {colour}"


def _noun(sign: str) -> str:
    return sign if sign.isdigit() else f"letter {sign.lower()}"


class _Paraphrase:
    """Says a scene in one of many ways."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def of(self, scene: Scene) -> str:
        rng, signs = self._rng, list(scene.signs)
        relation = scene.layout
        if len(signs) == 2 and rng.random() < 0.5:
            signs.reverse()
            relation = _INVERSE[relation]
        where = self._one_of(*_WORDS.get(relation, (relation,)))
        ground = self._one_of(scene.ground, scene.ground, f"{_a(scene.ground)} background")
        first, others = signs[0], [self._phrase(sign) for sign in signs[1:]]
        form = rng.random()
        if form < 0.2:
            of_first = [f"the {self._name(first.sign)} is {first.colour} and", where, *others]
            return f"{' '.join(of_first)}, on {ground}"
        if form < 0.4:
            return f"on {ground}, {' '.join([self._phrase(first), where, *others])}"
        if form < 0.5 and others:
            return f"{self._phrase(first)} with {others[0]} {_SEEN[relation]} on {ground}"
        return f"{' '.join([self._phrase(first), where, *others])} on {ground}"

    def _phrase(self, sign: Sign) -> str:
        coloured = self._one_of(*2 * (_a(sign.colour),), f"the {sign.colour}", sign.colour)
        return f"{coloured} {self._name(sign.sign)}"

    def _name(self, sign: str) -> str:
        if sign.isdigit():
            return self._one_of(sign, sign, f"digit {sign}", f"number {sign}")
        return self._one_of(sign.lower(), f"letter {sign.lower()}", f"letter {sign.lower()}")

    def _one_of(self, *choices: str) -> str:
        return choices[int(self._rng.integers(len(choices)))]


def scenes(count: int, seed: int, **what: bool | int | None) -> list[Scene]:
    """`count` random scenes; scene i depends on (seed, i) alone. `what` is as for Scene.draw."""
    return [Scene.draw(np.random.default_rng([seed, i]), **what) for i in range(count)]  # type: ignore[arg-type]


def vocabulary(count: int = 4000) -> Sequence[str]:
    """Prompts that have every word of the grammar."""
    rng = np.random.default_rng(0)
    drawn = [scene.prompt(rng) for scene in scenes(count, 0)]
    return [*drawn, *(scene.prompt() for scene in scenes(count, 1, held_out=True))]
