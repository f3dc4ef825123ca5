"""Watching images form: in the terminal, and as an animated WebP file."""

from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .protocol import Generation
from .stream import Update

_COLUMNS = 96  # of the terminal; a character shows two pixels, one above the other
_FRAME_MS, _LAST_MS = 250, 1500
_MOST_SIDE = 16383  # of a WebP file
_UPPER_HALF = "\u2580"


def watch(updates: Iterable[Update], terminal: TextIO) -> tuple[Generation, list[Image.Image]]:
    """Show every update; return the generation, and all pictures in order.

    The pictures are drawn over each other if `terminal` is one; else there is a line per update.
    """
    frames: list[Image.Image] = []
    drawn, generation = 0, None
    for update in updates:
        frames.append(_joined(update.pil()))
        generation = update.generation
        if terminal.isatty():
            text = picture_text(frames[-1])
            terminal.write(f"\x1b[{drawn}A" * bool(drawn) + text)
            drawn = text.count("\n")
        else:
            terminal.write(f"step {update.step}{', final' if update.final else ''}\n")
        terminal.flush()
    assert generation  # a stream ends with its answer
    return generation, frames


def write_animation(frames: list[Image.Image], folder: Path) -> Path:
    """Write the pictures as `forming.webp`, smaller if the format needs it; return its path."""
    path = folder / "forming.webp"
    shrink = max(1, -(-max(frames[0].size) // _MOST_SIDE))
    smaller = [frame.reduce(shrink) for frame in frames]
    durations = [_FRAME_MS] * (len(frames) - 1) + [_LAST_MS]
    smaller[0].save(
        path, save_all=True, append_images=smaller[1:], duration=durations, loop=0, quality=90
    )
    return path


def picture_text(image: Image.Image) -> str:
    """Return lines of coloured half blocks, at most _COLUMNS wide."""
    width = min(_COLUMNS, image.width)
    height = max(2, round(image.height * width / image.width) // 2 * 2)
    pixels: NDArray[np.uint8] = np.asarray(image.resize((width, height)))
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        cells = [
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m{_UPPER_HALF}"
            for a, b in zip(upper.tolist(), lower.tolist(), strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m\n")
    return "".join(lines)


def _joined(images: list[Image.Image]) -> Image.Image:
    """The images side by side."""
    return Image.fromarray(np.concatenate([np.asarray(image) for image in images], axis=1))
