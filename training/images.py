"""Folders of images: every file is used, or counted and named with the reason.

Training reads ImageNet's layout: one subfolder per class. The sorted order of the subfolders gives
the class ids. Training and `research.quality` both read image files by `find_images` and
`read_image`.
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
_LONGEST = 50  # largest allowed ratio of the long side to the short side
_EXAMPLES = 3
_SHOWN = 20  # images that are left out, one line each
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
# Folders that archives, file servers and file systems add to a data set.
_SYSTEM = {
    *("__MACOSX", "@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot"),
    *("lost+found", "$RECYCLE.BIN", "System Volume Information"),
}
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_RULES = 3  # version of the rules of `read_image`: another version gives other latents
_FOLDER, _FILE = "folder", "file"
_BROKEN, _CIRCLE = "broken link", "link to a folder above it"
_ORIENTATION, _BITS, _PHOTOMETRIC = 274, 258, 262  # tags of TIFF and EXIF
_BLACK_IS_0 = 1
# EXIF orientation to the operation that turns the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow multiplies grey levels of few bits by these, but not the transparent level.
_FEW_BITS = {"L;2": 85, "L;4": 17}


class DataError(FlowTurboError):
    """Training data cannot be used: the message names the file and what is allowed."""


@dataclass
class Skipped:
    """Files and folders that are not used, by reason. As text it is one line."""

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
    """The number of classes, and the first of their names."""
    more = ", ..." if len(names) > _EXAMPLES else ""
    return f"{len(names)} classes ({', '.join(names[:_EXAMPLES])}{more})"


def find_images(folder: Path, skipped: Skipped, *above: Path) -> list[Path]:
    """The image files below `folder`, sorted. Other files are added to `skipped`.

    Links are followed, except links to the folder itself or to the folders `above` it. Raises
    OSError for a folder that cannot be read.
    """
    closed = tuple(each.resolve() for each in (*above, folder))
    return sorted(_walk(folder, skipped, closed))


def _walk(folder: Path, skipped: Skipped, above: tuple[Path, ...]) -> Iterator[Path]:
    """`above` are the folder and its parents, with links resolved: a link to one is a circle."""
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
    """The entries of `folder`, sorted. Hidden and system entries are skipped with their content."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda each: each.name):
            if entry.name in _SYSTEM:
                skipped.add(Path(entry.path), "system folder")
            elif entry.name.startswith("."):
                skipped.add(Path(entry.path), "hidden")
            else:
                yield entry


def read_image(path: Path, *, as_stored: bool = False) -> Image.Image:
    """The image in a file, 8-bit RGB, upright by its EXIF orientation unless `as_stored`.

    Reads the first frame. Grey levels of more than 8 bits keep their upper 8 bits, as Pillow reads
    16-bit colour. Transparent parts become white. Raises DataError for unreadable files, and for
    pixels of unknown range: 32-bit, signed or floating-point.
    """
    try:
        with Image.open(path) as file:
            if max(file.size) > _LONGEST * min(file.size):  # useless, and needs much memory
                raise ValueError(f"{file.width} x {file.height} pixels are too thin")
            _scale_transparency(file)
            tags = dict(file.tag_v2) if isinstance(file, TiffImageFile) else {}
            # pop() keeps Pillow from rotating some formats itself when it reads the pixels.
            # ImageOps.exif_transpose() is not used: it rewrites all EXIF data and can fail.
            turn = _UPRIGHT.get(file.getexif().pop(_ORIENTATION, 1))
            image = file.copy()
            if turn is not None and not as_stored:
                image = image.transpose(turn)
            return _to_rgb(_to_8_bits(image, tags, file.format))
    except Exception as error:  # broken bytes can raise anything in Pillow's decoders
        reason = " ".join(str(error).split())
        raise DataError(f"{printable(path)} is not a readable image: {reason}") from error


def _scale_transparency(file: Image.Image) -> None:
    """Scales the transparent level of a PNG as Pillow scales the pixels."""
    if isinstance(file, PngImageFile) and "transparency" in file.info and file.tile:
        layout = file.tile[0].args
        if layout == "RGB;16B":  # Pillow keeps 8 bits, so more colours would become transparent
            raise ValueError("a transparent colour of 16 bits is not supported")
        if layout in _FEW_BITS:
            file.info["transparency"] *= _FEW_BITS[layout]


def _to_8_bits(image: Image.Image, tags: Mapping[int, Any], form: str | None) -> Image.Image:
    """Levels of 16 bits to their upper 8 bits. `tags` are of a TIFF, `form` is the file format."""
    if image.mode == "I" and form == "PPM":  # Pillow scales these to 16 bits
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
    """One image file of class id `label`; optionally mirrored left to right."""

    path: Path
    label: int
    mirrored: bool = False
    as_stored: bool = False  # ignore the EXIF orientation

    def load(self, size: int) -> np.ndarray:
        """[size, size, 3] uint8; raises DataError."""
        image = center_crop(read_image(self.path, as_stored=self.as_stored), size)
        return np.asarray(ImageOps.mirror(image) if self.mirrored else image)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a folder, and the class names in the order of the ids."""

    folder: Path
    class_names: tuple[str, ...]
    pictures: tuple[Picture, ...]
    size: int  # side of the images from `read`, in pixels
    empty: tuple[str, ...] = ()  # classes without images; they keep their ids
    skipped: Skipped = field(default_factory=Skipped)  # files that are not images

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, rows: Iterable[int]) -> Iterator[tuple[np.ndarray | DataError, int]]:
        """Images [size, size, 3] uint8 (or the error of an unreadable one) and class ids."""

        def load(row: int) -> tuple[np.ndarray | DataError, int]:
            picture = self.pictures[row]
            try:
                return picture.load(self.size), picture.label
            except DataError as error:
                return error, picture.label

        # Threads, because Pillow decodes and resizes without the interpreter's lock. In chunks, so
        # that memory does not hold all images.
        order = list(rows)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(order), _CHUNK):
                yield from pool.map(load, order[start : start + _CHUNK])

    @property
    def unused(self) -> dict[str, Any]:
        """What was found and not used: files by reason, and classes without images."""
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
        """The options for reading the pictures."""
        first = self.pictures[0]
        mirrored = any(picture.mirrored for picture in self.pictures)
        how = {"flip": mirrored, "ignore_orientation": first.as_stored, "reading_rules": _RULES}
        return {"image_size": self.size, **how}

    def identity(self) -> list[str]:
        """For each picture a text that changes if the picture or its file changes."""
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
    """Lists the images of `folder`, without decoding them. `flip` adds a mirrored copy of each.

    Raises DataError for a folder without class folders or images. Raises it also for a class folder
    without images; with `skip_bad` the class keeps its id instead. Raises OSError for a folder that
    cannot be read.
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
        broken = "is a broken link and " if empty[0].is_symlink() else ""
        raise DataError(
            f"{empty[0]} {broken}has no images ({', '.join(SUFFIXES)}){found}; --skip-bad allows "
            "a class without images"
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
    """Yields lines on what is not used: images `left_out`, `skipped` files, `empty` classes."""
    if skipped:
        yield f"skipped: {skipped}"
    if empty:
        yield f"without images: {shown(empty)}"
    yield from (f"left out: {reason}" for reason in left_out[:_SHOWN])
    if len(left_out) > _SHOWN:
        yield f"left out: {len(left_out) - _SHOWN} more"


def _class_folders(folder: Path, skipped: Skipped) -> Sequence[Path]:
    """The class folders, broken links included: a missing disk must not change the class ids."""
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
    """Raises DataError for splits of a data set. Prints a note if ids differ from numeric names."""
    names = [each.name for each in classes]
    if _SPLITS.issuperset(name.lower() for name in names):
        raise DataError(
            f"{folder} has {', '.join(names)}, which are parts of a data set, not classes: give "
            f"one of them, such as {folder / names[0]}"
        )
    if all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        moved = next(k for k, name in enumerate(sorted(names, key=int)) if names[k] != name)
        print(
            f"{folder}: class ids follow the names sorted as text, as in torchvision's "
            f"ImageFolder: class id {moved} is folder {names[moved]!r}. For numeric order give all "
            f"names the same length, such as {0:0{max(map(len, names))}d}",
            file=sys.stderr,
        )


def check_outside(option: str, path: Path, data: Path) -> None:
    """Raises DataError if output at `path` would become part of the `data`."""
    if data.resolve() in (path.resolve(), *path.resolve().parents):
        raise DataError(
            f"{option} {path} is inside the data folder {data} and would become part of the data: "
            "choose a folder outside"
        )


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square, `size` pixels wide, cropped and scaled as ADM's `center_crop_arr`."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    wide, high = round(image.width * scale), round(image.height * scale)
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
