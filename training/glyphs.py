"""The glyphs data set: 64 x 64 RGB letters and digits in random fonts, colours and poses."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from training.fonts import font_paths

CLASS_NAMES = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
IMAGE_SIZE = 64  # pixels
_OVERSAMPLING = 2
_CHUNK = 500  # images per task of the process pool


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


def _render_range(start: int, stop: int, seed: int, fonts: Sequence[str]) -> np.ndarray:
    images = []
    for index in range(start, stop):
        rng = np.random.default_rng([seed, index])
        font = fonts[rng.integers(len(fonts))]
        images.append(render(CLASS_NAMES[index % len(CLASS_NAMES)], font, rng))
    return np.stack(images)


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


def load_or_render(folder: Path, count: int, seed: int) -> np.ndarray:
    """The data set, [count, 64, 64, 3] uint8, rendered once and then read from `folder`.

    Image i depends on (seed, i), the installed fonts and the version of Pillow. Each combination
    has its own file.
    """
    fonts = [str(p) for p in font_paths()]
    path = folder / f"images-{count}-{seed}-{_digest_of(fonts)}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial.npy")
        out = np.lib.format.open_memmap(
            partial_path, "w+", np.uint8, (count, IMAGE_SIZE, IMAGE_SIZE, 3)
        )
        starts = range(0, count, _CHUNK)
        stops = [min(start + _CHUNK, count) for start in starts]
        task = partial(_render_range, seed=seed, fonts=fonts)
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            chunks = pool.map(task, starts, stops)
            for start, images in zip(starts, tqdm(chunks, "render", len(stops)), strict=True):
                out[start : start + len(images)] = images
        out.flush()
        partial_path.rename(path)
    loaded: np.ndarray = np.load(path, mmap_mode="r")
    return loaded


def _digest_of(fonts: Sequence[str]) -> str:
    """Twelve hexadecimal digits that identify the fonts and the version of Pillow."""
    digest = hashlib.sha256(PIL.__version__.encode())
    for font in fonts:
        digest.update(Path(font).name.encode() + Path(font).read_bytes())
    return digest.hexdigest()[:12]
