"""Images side by side, with a caption for every row and column."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_READABLE_PX = 96
_GAP_PX = 6
_FONT_PX = 16
_LINE_PX = 19
_INK = (32, 32, 32)
_PAPER = (255, 255, 255)


def labelled_grid(
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    row_captions: Sequence[str],
    column_captions: Sequence[str],
) -> Image.Image:
    """Return an RGB picture of `rows` x columns, captions left and above.

    Images are uint8 [H, W, 3]. One integer factor enlarges small images until the largest spans
    at least 96 px; pixels stay square. Row captions may have several lines. A column caption
    wider than its column is broken into lines, and a word wider than it is shortened. Raises
    ValueError if counts or shapes disagree.
    """
    _check(rows, row_captions, column_captions)
    layout = _Layout.of(rows, row_captions, column_captions)
    picture = Image.new("RGB", layout.size(len(rows), len(column_captions)), _PAPER)
    draw = ImageDraw.Draw(picture)
    for j, lines in enumerate(layout.columns):
        middle = layout.corner(0, j)[0] + layout.cell_w / 2
        for k, line in enumerate(reversed(lines)):
            place = middle, layout.top - _GAP_PX - k * _LINE_PX
            draw.text(place, line, fill=_INK, font=layout.font, anchor="ms")
    for i, (row, caption) in enumerate(zip(rows, row_captions, strict=True)):
        middle = layout.corner(i, 0)[1] + layout.cell_h / 2
        draw.multiline_text((_GAP_PX, middle), caption, fill=_INK, font=layout.font, anchor="lm")
        for j, image in enumerate(row):
            picture.paste(_enlarged(image, layout.factor), layout.corner(i, j))
    return picture


def marked(images: NDArray[np.uint8], masks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return `images` [..., H, W, 3], red where `masks` [..., H, W] are not black."""
    red = 0.5 * images + 0.5 * np.array([255, 0, 0])
    return np.where(masks[..., None] > 0, red, images).astype(np.uint8)


@dataclass(frozen=True)
class _Layout:
    """All lengths in pixels; `columns` has the lines of each column's caption."""

    font: Any
    columns: tuple[tuple[str, ...], ...]
    factor: int
    cell_w: int
    cell_h: int
    left: int
    top: int

    @staticmethod
    def of(
        rows: Sequence[Sequence[NDArray[np.uint8]]],
        row_captions: Sequence[str],
        column_captions: Sequence[str],
    ) -> "_Layout":
        font = ImageFont.load_default(_FONT_PX)
        heights = [image.shape[0] for row in rows for image in row]
        widths = [image.shape[1] for row in rows for image in row]
        factor = max(1, -(-_READABLE_PX // max(heights + widths)))
        draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
        boxes = [draw.multiline_textbbox((0, 0), text, font=font) for text in row_captions]
        cell_w = factor * max(widths)
        columns = tuple(_lines(draw, caption, cell_w) for caption in column_captions)
        return _Layout(
            font=font,
            columns=columns,
            factor=factor,
            cell_w=cell_w,
            # A row is at least as high as its caption.
            cell_h=max([factor * max(heights), *(round(box[3]) for box in boxes)]),
            left=2 * _GAP_PX + max(round(box[2]) for box in boxes),
            top=_LINE_PX * (max(map(len, columns)) - 1) + _FONT_PX + 2 * _GAP_PX,
        )

    def corner(self, i: int, j: int) -> tuple[int, int]:
        """Upper left corner (x, y) of the cell in row i, column j."""
        x = self.left + j * (self.cell_w + _GAP_PX)
        return x, self.top + i * (self.cell_h + _GAP_PX)

    def size(self, n_rows: int, n_columns: int) -> tuple[int, int]:
        return self.corner(n_rows, n_columns)


def _check(
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    row_captions: Sequence[str],
    column_captions: Sequence[str],
) -> None:
    if not rows or not column_captions or len(rows) != len(row_captions):
        raise ValueError(
            f"a grid needs rows, columns and a caption for each: got {len(rows)} rows, "
            f"{len(row_captions)} row captions, {len(column_captions)} column captions"
        )
    for i, row in enumerate(rows):
        if len(row) != len(column_captions):
            raise ValueError(
                f"row {i} has {len(row)} images for {len(column_captions)} column captions"
            )
        for image in row:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(
                    f"row {i}: images must be uint8 [H, W, 3], got {image.dtype} "
                    f"{list(image.shape)}"
                )


def _enlarged(image: NDArray[np.uint8], factor: int) -> Image.Image:
    return Image.fromarray(image.repeat(factor, axis=0).repeat(factor, axis=1))


def _lines(draw: ImageDraw.ImageDraw, text: str, width_px: int) -> tuple[str, ...]:
    found: list[str] = []
    for word in text.split() or [""]:
        joined = f"{found[-1]} {word}" if found else word
        if found and draw.textlength(joined, font=ImageFont.load_default(_FONT_PX)) <= width_px:
            found[-1] = joined
        else:
            found.append(_shortened(draw, word, width_px))
    return tuple(found)


def _shortened(draw: ImageDraw.ImageDraw, text: str, width_px: int) -> str:
    line = " ".join(text.split())
    shown = line
    while shown and draw.textlength(shown, font=ImageFont.load_default(_FONT_PX)) > width_px:
        line = line[:-1]
        shown = line.rstrip() + "..." if line else ""
    return shown
