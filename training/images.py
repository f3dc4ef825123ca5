"""Folders of images: every file is used, or counted and named with the reason.

Training reads ImageNet's layout, a subfolder for each class, whose sorted order is the class ids.
`find_images` and `read_image` are the one rule for all who read images from files: training and
`bench.quality`.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from flowturbo.errors import FlowTurboError

_CHUNK = 256
_LONGEST = 50  # of an image's sides, in shorter ones
_EXAMPLES = 3
_SHOWN = 20  # images that are left out, a line each
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
# Folders that archives, file servers and file systems put beside those of a data set.
_SYSTEM = {
    *("__MACOSX", "@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot"),
    *("lost+found", "$RECYCLE.BIN", "System Volume Information"),
}
_RULES = 2  # of `read_image`: latents made by other rules are others


class DataError(FlowTurboError):
    """Training data cannot be used: the message names the file and what is allowed."""


@dataclass
class Skipped:
    """Files and folders that are not used, by the reason; prints as a line."""

    paths: dict[str, list[Path]] = field(default_factory=dict)

    def add(self, path: Path, reason: str) -> None:
        self.paths.setdefault(reason, []).append(path)

    def __len__(self) -> int:
        return sum(map(len, self.paths.values()))

    def __str__(self) -> str:
        shown = []
        for reason, paths in sorted(self.paths.items()):
            examples = ", ".join(map(str, paths[:_EXAMPLES]))
            more = ", ..." if len(paths) > _EXAMPLES else ""
            shown.append(f"{len(paths)} {reason} ({examples}{more})")
        return "; ".join(shown) or "none"


def find_images(folder: Path, skipped: Skipped, *above: Path) -> list[Path]:
    """The image files below `folder`, sorted; what is no image is added to `skipped`.

    Links are followed, but not into the folder itself or those `above` it. Raises OSError for a
    folder that cannot be read.
    """
    closed = tuple(each.resolve() for each in (*above, folder))
    return sorted(_walk(folder, skipped, closed))


def _walk(folder: Path, skipped: Skipped, above: tuple[Path, ...]) -> Iterator[Path]:
    """`above` are the folder and all above it, with links resolved: a link to one is a circle."""
    for entry in _entries(folder, skipped):
        path = Path(entry.path)
        if entry.is_dir():
            real = path.resolve() if entry.is_symlink() else above[-1] / entry.name
            if real in above:
                skipped.add(path, "link to a folder above it")
            else:
                yield from _walk(path, skipped, (*above, real))
        elif not entry.is_file():
            skipped.add(path, "broken link" if entry.is_symlink() else "no regular file")
        elif path.suffix.lower() not in SUFFIXES:
            skipped.add(path, f"no image file ({path.suffix.lower() or 'no suffix'})")
        else:
            yield path


def _entries(folder: Path, skipped: Skipped) -> Iterator["os.DirEntry[str]"]:
    """What lies in `folder`, sorted, without what is no part of a data set, whatever it holds."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda each: each.name):
            if entry.name in _SYSTEM:
                skipped.add(Path(entry.path), "system folder")
            elif entry.name.startswith("."):
                skipped.add(Path(entry.path), "hidden")
            else:
                yield entry


def read_image(path: Path, *, as_stored: bool = False) -> Image.Image:
    """The image in a file, 8-bit RGB, turned as its EXIF orientation says unless `as_stored`.

    Of several frames it is the first. 16-bit grey keeps its upper 8 bits, as Pillow reads 16-bit
    colour. Transparent parts are shown on white. Raises DataError, also for 32-bit and
    floating-point pixels, whose range is not known.
    """
    try:
        with Image.open(path) as file:
            if max(file.size) > _LONGEST * min(file.size):  # of no use, but of much memory
                raise ValueError(f"{file.width} x {file.height} pixels are too thin")
            # A copy even where nothing is to be turned.
            return _to_rgb(file.copy() if as_stored else ImageOps.exif_transpose(file))
    except Exception as error:  # Pillow's decoders raise whatever the bytes make them do
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not a readable image: {reason}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"the range of its {image.mode} pixels (32 bits) is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


@dataclass(frozen=True)
class Picture:
    """One image file, of class id `label`, perhaps mirrored left to right."""

    path: Path
    label: int
    mirrored: bool = False
    as_stored: bool = False  # not turned as EXIF says

    def load(self, size: int) -> np.ndarray:
        """[size, size, 3] uint8; raises DataError."""
        image = center_crop(read_image(self.path, as_stored=self.as_stored), size)
        return np.asarray(ImageOps.mirror(image) if self.mirrored else image)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a folder, and their classes' names in the order of the ids."""

    folder: Path
    class_names: tuple[str, ...]
    pictures: tuple[Picture, ...]
    size: int  # pixels, of the side of what `read` answers
    empty: int = 0  # classes without images, which keep their ids
    skipped: Skipped = field(default_factory=Skipped)  # files that are no images

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

    @property
    def settings(self) -> dict[str, Any]:
        """How the pictures are read."""
        first = self.pictures[0]
        mirrored = any(picture.mirrored for picture in self.pictures)
        how = {"flip": mirrored, "ignore_orientation": first.as_stored, "reading_rules": _RULES}
        return {"image_size": self.size, **how}

    def identity(self) -> list[str]:
        """For each, what tells it from others, and from another file put in its place."""
        return [self._identity(picture) for picture in self.pictures]

    def _identity(self, picture: Picture) -> str:
        try:
            file = picture.path.stat()
            content = f"{file.st_size} bytes, {file.st_mtime_ns} ns"
        except FileNotFoundError:
            content = "gone"
        name = picture.path.relative_to(self.folder)
        return f"{picture.label} {name} {picture.mirrored}: {content}"


def list_pictures(
    folder: Path,
    size: int,
    *,
    flip: bool = False,
    skip_bad: bool = False,
    as_stored: bool = False,
) -> Pictures:
    """The images of `folder`, which `flip` lists twice, once mirrored; nothing is decoded yet.

    Raises DataError for a folder without class folders or images, and, unless `skip_bad`, for a
    class folder without images; with it the class keeps its id. OSError for one that cannot be
    read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    skipped = Skipped()
    classes = _class_folders(folder, skipped)
    if not classes:
        raise DataError(f"{folder} has no subfolders: one for each class is needed")
    files = [find_images(each, skipped, folder) for each in classes]
    empty = [each for each, found in zip(classes, files, strict=True) if not found]
    if len(empty) == len(classes) or (empty and not skip_bad):
        found = f" (other files there: {skipped})" if skipped else ""
        raise DataError(
            f"{empty[0]} has no images ({', '.join(SUFFIXES)}){found}; --skip-bad goes on with a "
            "class that has none"
        )
    pictures = tuple(
        Picture(path, label, mirrored, as_stored)
        for label, found in enumerate(files)
        for path in found
        for mirrored in ((False, True) if flip else (False,))
    )
    names = tuple(each.name for each in classes)
    return Pictures(folder, names, pictures, size, len(empty), skipped)


def unused(left_out: Sequence[str], skipped: Skipped | None = None) -> Iterator[str]:
    """Lines that say what is not used, and why: images `left_out`, and files that are none."""
    if skipped:
        yield f"skipped: {skipped}"
    yield from (f"left out: {reason}" for reason in left_out[:_SHOWN])
    if len(left_out) > _SHOWN:
        yield f"left out: {len(left_out) - _SHOWN} more"


def _class_folders(folder: Path, skipped: Skipped) -> Sequence[Path]:
    found = []
    for entry in _entries(folder, skipped):
        if entry.is_dir():
            found.append(Path(entry.path))
        else:
            skipped.add(Path(entry.path), "beside the class folders, not in one")
    return found


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square, `size` pixels wide, as ADM's `center_crop_arr` cuts and scales it."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    wide, high = round(image.width * scale), round(image.height * scale)
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
