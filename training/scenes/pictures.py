"""The images of glyph scenes: 64 x 64 RGB, signs of varied fonts, sizes and places."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.fonts import font_paths
from training.rendering import load_or_render
from training.scenes.grammar import COLOURS, Scene

IMAGE_SIZE = 64  # pixels
_OVERSAMPLING = 2
_SHIFT = 2.0  # largest shift of a sign from its place, in pixels
_COLOUR_NOISE = 5.0  # standard deviation of a colour's levels
_ALONE, _IN_PAIRS = (26.0, 31.0), (22.0, 26.0)  # heights of signs in pixels
_WIDEST = 27.0  # pixels
# Centres (x, y) of the signs of each layout, in pixels.
_CENTRES = {
    "in the centre": ((32, 32),),
    "at the top left": ((20, 20),),
    "at the top right": ((44, 20),),
    "at the bottom left": ((20, 44),),
    "at the bottom right": ((44, 44),),
    "left of": ((17, 32), (47, 32)),
    "above": ((32, 17), (32, 47)),
}
# Upright fonts with strokes that stand out at this size.
_FONTS = """
B612-Bold Cabin-Bold Cabin-SemiBold Cantarell-Bold Carlito-Bold DejaVuSans DejaVuSansCondensed-Bold
FreeSansBold Lato-Bold Lato-Heavy LiberationSans-Bold LinBiolinum_RB NotoSans-Bold OpenSans-Bold
OpenSans-Semibold Play-Bold Quicksand-Bold Roboto-Bold Roboto-Medium RobotoCondensed-Bold
"""


def fonts() -> list[str]:
    """The font files. Raises FileNotFoundError if one is not installed, or as `font_paths`."""
    found = {path.stem: str(path) for path in font_paths()}
    missing = [name for name in _FONTS.split() if name not in found]
    if missing:
        raise FileNotFoundError(f"fonts are missing: {', '.join(missing)}: run make fonts")
    return [found[name] for name in _FONTS.split()]


def render(scene: Scene, rng: np.random.Generator, fonts: Sequence[str]) -> np.ndarray:
    """An image of `scene`, [64, 64, 3] uint8. All its signs have the same font."""
    image = np.broadcast_to(_colour(scene.ground, rng), (IMAGE_SIZE, IMAGE_SIZE, 3))
    font = fonts[rng.integers(len(fonts))]
    heights = _ALONE if len(scene.signs) == 1 else _IN_PAIRS
    for sign, centre in zip(scene.signs, _CENTRES[scene.layout], strict=True):
        at = np.array(centre) + rng.uniform(-_SHIFT, _SHIFT, 2)
        ink = _ink(sign.sign, font, rng.uniform(*heights), at)[..., None]
        image = image * (1 - ink) + _colour(sign.colour, rng) * ink
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def render_drawn(
    index: int, rng: np.random.Generator, fonts: Sequence[str], *, held_out: bool | None = False
) -> np.ndarray:
    """An image of the scene that `rng` draws first (see `grammar.scenes`)."""
    return render(Scene.draw(rng, held_out=held_out), rng, fonts)


def load_images(
    folder: Path, count: int, seed: int, *, held_out: bool | None = False
) -> np.ndarray:
    """Images [count, 64, 64, 3] uint8 of the scenes `grammar.scenes(count, seed, held_out=…)`."""
    task = partial(render_drawn, held_out=held_out)
    return load_or_render(folder, task, fonts(), IMAGE_SIZE, count, seed)


def _ink(sign: str, path: str, height: float, centre: np.ndarray) -> np.ndarray:
    """How much of each pixel the sign covers, [64, 64] in [0, 1]."""
    side = IMAGE_SIZE * _OVERSAMPLING
    left, top, right, bottom = ImageFont.truetype(path, 100).getbbox(sign)
    scale = min(height / (bottom - top), _WIDEST / (right - left))
    font = ImageFont.truetype(path, 100 * scale * _OVERSAMPLING)
    left, top, right, bottom = font.getbbox(sign)
    corner = centre * _OVERSAMPLING - np.array([left + right, top + bottom]) / 2
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).text((corner[0], corner[1]), sign, font=font, fill=255)
    mask = mask.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.asarray(mask, dtype=np.float32) / 255


def _colour(name: str, rng: np.random.Generator) -> np.ndarray:
    level = np.array(COLOURS[name]) + rng.normal(0, _COLOUR_NOISE, 3)
    return np.clip(level, 0, 255)
