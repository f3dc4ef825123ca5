"""A folder of images in ImageNet's layout: a subfolder a class, whose sorted order is class ids."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flowturbo.errors import FlowTurboError

_CHUNK = 256
_LONGEST = 50  # of a picture's sides, in shorter ones
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class DataError(FlowTurboError):
    """Training data cannot be used: the message names the file and what is allowed."""


@dataclass(frozen=True)
class Picture:
    """One image file, of class id `label`, perhaps mirrored left to right."""

    path: Path
    label: int
    mirrored: bool = False

    def load(self, size: int) -> np.ndarray:
        """[size, size, 3] uint8; raises DataError."""
        try:
            with Image.open(self.path) as file:
                if file.mode.startswith(("I", "F")):  # which Pillow would cut off at white
                    raise ValueError(f"its {file.mode} pixels have more than 8 bits")
                if max(file.size) > _LONGEST * min(file.size):  # of no use, but of much memory
                    raise ValueError(f"{file.width} x {file.height} pixels are too thin")
                image = center_crop(file.convert("RGB"), size)
        except Exception as error:  # Pillow's decoders raise whatever the bytes make them do
            reason = " ".join(str(error).split())
            raise DataError(f"{self.path} is not a readable image: {reason}") from error
        return np.asarray(ImageOps.mirror(image) if self.mirrored else image)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a folder, and their classes' names in the order of the ids."""

    folder: Path
    class_names: tuple[str, ...]
    pictures: tuple[Picture, ...]
    size: int  # pixels, of the side of what `read` answers
    empty: int = 0  # class folders without images

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, rows: Iterable[int]) -> Iterator[tuple[np.ndarray | DataError, int]]:
        """Images [size, size, 3] uint8 (or what is wrong with each) and class ids, in order."""

        def load(row: int) -> tuple[np.ndarray | DataError, int]:
            picture = self.pictures[row]
            try:
                return picture.load(self.size), picture.label
            except DataError as error:
                return error, picture.label

        # Pillow decodes and resizes outside the interpreter's lock. A chunk at a time, or a million
        # images would be held.
        order = list(rows)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(order), _CHUNK):
                yield from pool.map(load, order[start : start + _CHUNK])

    def name(self, row: int) -> str:
        """The file of the picture at `row`."""
        return str(self.pictures[row].path)

    def identity(self) -> list[str]:
        """What tells this list of pictures from another."""
        return [f"{p.label} {p.path.relative_to(self.folder)} {p.mirrored}" for p in self.pictures]


def list_pictures(
    folder: Path, size: int, *, flip: bool = False, skip_bad: bool = False
) -> Pictures:
    """The images of `folder`, which `flip` lists twice, once mirrored; nothing is decoded yet.

    Raises DataError for a folder without class folders or images, and, unless `skip_bad`, for a
    class folder without images.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise DataError(f"{folder} has no subfolders: one for each class is needed")
    files = [_files(each) for each in classes]
    empty = [each for each, found in zip(classes, files, strict=True) if not found]
    if len(empty) == len(classes) or (empty and not skip_bad):
        raise DataError(
            f"{empty[0]} has no images ({', '.join(SUFFIXES)}); --skip-bad leaves such a class out"
        )
    pictures = tuple(
        Picture(path, label, mirrored)
        for label, found in enumerate(files)
        for path in found
        for mirrored in ((False, True) if flip else (False,))
    )
    names = tuple(each.name for each in classes)
    return Pictures(folder, names, pictures, size, len(empty))


def _files(folder: Path) -> Sequence[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square, `size` pixels wide, as ADM's `center_crop_arr` cuts and scales it."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    wide, high = round(image.width * scale), round(image.height * scale)
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
