"""The glyphs data set: 64 x 64 RGB letters and digits in random fonts, colours and poses."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.fonts import font_paths
from training.rendering import load_or_render

CLASS_NAMES = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
IMAGE_SIZE = 64  # pixels
_OVERSAMPLING = 2


def render(text: str, font_path: str, rng: np.random.Generator) -> np.ndarray:
    """One image, [64, 64, 3] uint8: a glyph of one colour on a background of another."""
    side = IMAGE_SIZE * _OVERSAMPLING
    font = ImageFont.truetype(font_path, int(rng.uniform(42, 56) * _OVERSAMPLING))
    mask = Image.new("L", (side, side))
    centre = side / 2 + rng.uniform(-3, 3, size=2) * _OVERSAMPLING
    left, top, right, bottom = font.getbbox(text)
    corner = centre - np.array([left + right, top + bottom]) / 2
    ImageDraw.Draw(mask).text((corner[0], corner[1]), text, font=font, fill=255)
    mask = mask.rotate(rng.uniform(-8, 8), resample=Image.Resampling.BICUBIC)
    mask = mask.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    ink = np.asarray(mask, dtype=np.float32)[..., None] / 255
    ground, colour = _two_colours(rng)
    return np.round(ground * (1 - ink) + colour * ink).astype(np.uint8)


def _two_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colours, [3] in 0..255, with enough contrast in brightness."""
    while True:
        pair = rng.uniform(0, 255, size=(2, 3)).astype(np.float32)
        brightness = pair @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        if abs(brightness[0] - brightness[1]) > 70:
            return pair[0], pair[1]


def render_class(index: int, rng: np.random.Generator, fonts: Sequence[str]) -> np.ndarray:
    """An image of the class of `index`: the classes take turns."""
    font = fonts[rng.integers(len(fonts))]
    return render(CLASS_NAMES[index % len(CLASS_NAMES)], font, rng)


def label_of(index: np.ndarray) -> np.ndarray:
    """Class id of the image at `index`: the classes take turns."""
    return (index % len(CLASS_NAMES)).astype(np.int64)


@dataclass(frozen=True)
class GlyphImages:
    """The data set `images` [N, 64, 64, 3] uint8, labelled, for `training.latents`."""

    images: np.ndarray
    class_names: tuple[str, ...] = CLASS_NAMES
    size: int = IMAGE_SIZE

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: Iterable[int]) -> Iterator[tuple[np.ndarray, int]]:
        order = np.fromiter(rows, np.int64)
        yield from zip(self.images[order], label_of(order).tolist(), strict=True)

    def name(self, row: int) -> str:
        return f"glyph {row}"

    @property
    def unused(self) -> dict[str, Any]:
        return {}

    @property
    def settings(self) -> dict[str, Any]:
        return {"image_size": self.size}

    def identity(self) -> list[str]:
        return [hashlib.sha256(image.tobytes()).hexdigest() for image in self.images]


def load_images(folder: Path, count: int, seed: int) -> np.ndarray:
    """The data set, [count, 64, 64, 3] uint8 (see `training.rendering`)."""
    fonts = [str(path) for path in font_paths()]
    return load_or_render(folder, render_class, fonts, IMAGE_SIZE, count, seed)
