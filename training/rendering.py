"""Renders a data set once, on all cores, and reads it from then on."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL
from tqdm import tqdm

_CHUNK = 500  # images per task of the process pool


class Renderer(Protocol):
    """Draws image `index` of a data set with one of `fonts`; it depends on `rng` alone."""

    def __call__(self, index: int, rng: np.random.Generator, fonts: Sequence[str]) -> np.ndarray:
        """The image, [S, S, 3] uint8."""


def load_or_render(
    folder: Path, render: Renderer, fonts: Sequence[str], size: int, count: int, seed: int
) -> np.ndarray:
    """The data set, [count, size, size, 3] uint8, rendered once and then read from `folder`.

    Image i depends on (seed, i), the fonts and the version of Pillow. Each combination has its own
    file. `render` must be a function of a module: other processes call it.
    """
    path = folder / f"images-{count}-{seed}-{_digest_of(fonts)}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial.npy")
        out = np.lib.format.open_memmap(partial_path, "w+", np.uint8, (count, size, size, 3))
        starts = range(0, count, _CHUNK)
        stops = [min(start + _CHUNK, count) for start in starts]
        task = partial(_render_range, render=render, seed=seed, fonts=fonts)
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            chunks = pool.map(task, starts, stops)
            for start, images in zip(starts, tqdm(chunks, "render", len(stops)), strict=True):
                out[start : start + len(images)] = images
        out.flush()
        partial_path.rename(path)
    loaded: np.ndarray = np.load(path, mmap_mode="r")
    return loaded


def _render_range(
    start: int, stop: int, render: Renderer, seed: int, fonts: Sequence[str]
) -> np.ndarray:
    rows = range(start, stop)
    return np.stack([render(row, np.random.default_rng([seed, row]), fonts) for row in rows])


def _digest_of(fonts: Sequence[str]) -> str:
    """Twelve hexadecimal digits that identify the fonts and the version of Pillow."""
    digest = hashlib.sha256(PIL.__version__.encode())
    for font in fonts:
        digest.update(Path(font).name.encode() + Path(font).read_bytes())
    return digest.hexdigest()[:12]
