"""Folders of images: every file is used, or counted and named with the reason.

Training reads ImageNet's layout, a subfolder for each class, whose sorted order is the class ids.
`find_images` and `read_image` are the one rule for all who read images from files: training and
`research.quality`.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

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
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_RULES = 3  # of `read_image`: latents made by other rules are others
_FOLDER, _FILE = "folder", "file"
_BROKEN, _CIRCLE = "broken link", "link to a folder above it"
_ORIENTATION, _BITS, _PHOTOMETRIC = 274, 258, 262  # TIFF's tags, which EXIF has too
_BLACK_IS_0 = 1
# What turns an image that is stored in an orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow multiplies grey levels of few bits by, but not the one that is transparent.
_FEW_BITS = {"L;2": 85, "L;4": 17}


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
            examples = ", ".join(map(printable, paths[:_EXAMPLES]))
            more = ", ..." if len(paths) > _EXAMPLES else ""
            shown.append(f"{len(paths)} {reason} ({examples}{more})")
        return "; ".join(shown) or "none"


def printable(path: Path) -> str:
    """A path as one line of text."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def shown(names: Sequence[str]) -> str:
    """How many classes there are, and the first of their names."""
    more = ", ..." if len(names) > _EXAMPLES else ""
    return f"{len(names)} classes ({', '.join(names[:_EXAMPLES])}{more})"


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
        path, kind = Path(entry.path), _kind(entry)
        if kind == _FOLDER:
            real = path.resolve() if entry.is_symlink() else above[-1] / entry.name
            if real in above:
                skipped.add(path, _CIRCLE)
            else:
                yield from _walk(path, skipped, (*above, real))
        elif kind != _FILE:
            skipped.add(path, kind)
        elif path.suffix.lower() not in SUFFIXES:
            skipped.add(path, f"no image file ({path.suffix.lower() or 'no suffix'})")
        else:
            yield path


def _kind(entry: "os.DirEntry[str]") -> str:
    try:
        if entry.is_dir():
            return _FOLDER
        if entry.is_file():
            return _FILE
    except OSError:  # a link to itself, or through a file
        pass
    return _BROKEN if entry.is_symlink() else "no regular file"


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

    Of several frames it is the first. Grey of more than 8 bits keeps its upper 8, as Pillow reads
    16-bit colour. Transparent parts are shown on white. Raises DataError, also for pixels whose
    range is not known: of 32 bits, with a sign, or of floating point.
    """
    try:
        with Image.open(path) as file:
            if max(file.size) > _LONGEST * min(file.size):  # of no use, but of much memory
                raise ValueError(f"{file.width} x {file.height} pixels are too thin")
            _scale_transparency(file)
            tags = dict(file.tag_v2) if isinstance(file, TiffImageFile) else {}
            # Taken out, so that Pillow itself turns no kind of file when it reads the pixels. Its
            # function that turns images writes all EXIF data anew, and fails at odd ones.
            turn = _UPRIGHT.get(file.getexif().pop(_ORIENTATION, 1))
            image = file.copy()
            if turn is not None and not as_stored:
                image = image.transpose(turn)
            return _to_rgb(_to_8_bits(image, tags, file.format))
    except Exception as error:  # Pillow's decoders raise whatever the bytes make them do
        reason = " ".join(str(error).split())
        raise DataError(f"{printable(path)} is not a readable image: {reason}") from error


def _scale_transparency(file: Image.Image) -> None:
    """Brings the level that is transparent in a PNG to the scale that its pixels are read in."""
    if isinstance(file, PngImageFile) and "transparency" in file.info and file.tile:
        layout = file.tile[0].args
        if layout == "RGB;16B":  # of which Pillow keeps 8 bits, and so would make more transparent
            raise ValueError("a transparent colour of 16 bits is not read")
        if layout in _FEW_BITS:
            file.info["transparency"] *= _FEW_BITS[layout]


def _to_8_bits(image: Image.Image, tags: Mapping[int, Any], form: str | None) -> Image.Image:
    """Levels of 16 bits to their upper 8; `tags` are a TIFF's, `form` is the file's format."""
    if image.mode == "I" and form == "PPM":  # which Pillow scales to 16 bits
        bits, black = 16, _BLACK_IS_0
    elif image.mode.startswith("I;16"):
        bits, black = tags.get(_BITS, (16,))[0], tags.get(_PHOTOMETRIC, _BLACK_IS_0)
    elif image.mode in ("I", "F"):
        raise ValueError(f"the range of its {image.mode} pixels is not known")
    else:
        return image
    levels = np.asarray(image).astype(np.int64)
    transparent = levels == image.info.get("transparency", -1)
    grey = levels >> (bits - 8)
    grey = grey if black == _BLACK_IS_0 else 255 - grey
    return Image.fromarray(np.where(transparent, 255, grey).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
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
    empty: tuple[str, ...] = ()  # classes without images, which keep their ids
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

    @property
    def unused(self) -> dict[str, Any]:
        """What was found and not used: files by the reason, classes without images."""
        files = {
            reason: [printable(path) for path in paths]
            for reason, paths in self.skipped.paths.items()
        }
        return {"other_files": files, "empty_classes": list(self.empty)}

    def name(self, row: int) -> str:
        """The file of the picture at `row`."""
        return printable(self.pictures[row].path)

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
    files = [find_images(each, skipped, folder) if each.is_dir() else [] for each in classes]
    _check_classes(folder, classes)
    empty = [each for each, found in zip(classes, files, strict=True) if not found]
    if len(empty) == len(classes) or (empty and not skip_bad):
        found = f" (other files there: {skipped})" if skipped else ""
        broken = "is a link to what is not there, and " if empty[0].is_symlink() else ""
        raise DataError(
            f"{empty[0]} {broken}has no images ({', '.join(SUFFIXES)}){found}; --skip-bad goes on "
            "with a class that has none"
        )
    pictures = tuple(
        Picture(path, label, mirrored, as_stored)
        for label, found in enumerate(files)
        for path in found
        for mirrored in ((False, True) if flip else (False,))
    )
    names = tuple(each.name for each in classes)
    without = tuple(each.name for each in empty)
    return Pictures(folder, names, pictures, size, without, skipped)


def unused(
    left_out: Sequence[str], skipped: Skipped | None = None, empty: Sequence[str] = ()
) -> Iterator[str]:
    """Lines that say what is not used, and why: images `left_out`, files that are none, classes."""
    if skipped:
        yield f"skipped: {skipped}"
    if empty:
        yield f"without images: {shown(empty)}"
    yield from (f"left out: {reason}" for reason in left_out[:_SHOWN])
    if len(left_out) > _SHOWN:
        yield f"left out: {len(left_out) - _SHOWN} more"


def _class_folders(folder: Path, skipped: Skipped) -> Sequence[Path]:
    """Also broken links: the ids of the other classes do not hang on whether a disk is there."""
    found, real = [], folder.resolve()
    above = {real, *real.parents}
    for entry in _entries(folder, skipped):
        path, kind = Path(entry.path), _kind(entry)
        if kind == _FOLDER and entry.is_symlink() and path.resolve() in above:
            skipped.add(path, _CIRCLE)
        elif kind == _FOLDER or kind == _BROKEN and path.suffix.lower() not in SUFFIXES:
            found.append(path)
        else:
            skipped.add(path, "beside the class folders, not in one")
    return found


def _check_classes(folder: Path, classes: Sequence[Path]) -> None:
    """Raises DataError for parts of a data set; says where ids are not the names' numbers."""
    names = [each.name for each in classes]
    if _SPLITS.issuperset(name.lower() for name in names):
        raise DataError(
            f"{folder} has {', '.join(names)}, which are parts of a data set and no classes: give "
            f"one of them, such as {folder / names[0]}"
        )
    if all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        moved = next(k for k, name in enumerate(sorted(names, key=int)) if names[k] != name)
        print(
            f"{folder}: ids follow the names as text, as torchvision's ImageFolder orders them: "
            f"class id {moved} is folder {names[moved]!r}. Names of one length, such as "
            f"{0:0{max(map(len, names))}d}, give ids in the order of the numbers",
            file=sys.stderr,
        )


def check_outside(option: str, path: Path, data: Path) -> None:
    """Raises DataError if what is written at `path` would become a part of the `data`."""
    if data.resolve() in (path.resolve(), *path.resolve().parents):
        raise DataError(
            f"{option} {path} lies in the data {data}, and would become a part of them: take a "
            "folder outside"
        )


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square, `size` pixels wide, as ADM's `center_crop_arr` cuts and scales it."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    wide, high = round(image.width * scale), round(image.height * scale)
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
