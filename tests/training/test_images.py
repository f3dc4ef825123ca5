"""Image folders: every file is used, or counted and named; one rule for all kinds of pixels."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from research.quality import judges
from training.images import (
    SUFFIXES,
    DataError,
    Picture,
    Pictures,
    Skipped,
    center_crop,
    find_images,
    list_pictures,
    read_image,
)

pytestmark = pytest.mark.unit

RNG = np.random.default_rng(0)
RED_LEFT = np.zeros((80, 80, 3), np.uint8)
RED_LEFT[:, :40, 0] = 255


def picture(path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures each of cat and dog."""
    for name in ("cat", "dog"):
        for k in range(3):
            picture(tmp_path / "train" / name / f"{k}.jpg")
    return tmp_path / "train"


def test_the_crop_is_the_middle_of_the_shorter_side() -> None:
    """A wide image whose left, middle and right third differ, shrunk and enlarged."""
    thirds = np.repeat(np.array([10, 120, 240], np.uint8), 200)
    image = Image.fromarray(np.tile(thirds[None, :, None], (200, 1, 3)))
    for size in (32, 150, 256):
        cut = np.asarray(center_crop(image, size))
        assert cut.shape == (size, size, 3)
        # Bicubic resampling mixes the edges of the third.
        assert (cut[:, size // 8 : -size // 8] == 120).all()
    assert np.array_equal(np.asarray(center_crop(image, 200)), np.full((200, 200, 3), 120))


def test_every_suffix_is_read(folder: Path) -> None:
    formats = {"jfif": "JPEG", "jpe": "JPEG", "pnm": "PPM", "pbm": "PPM", "pgm": "PPM"}
    for suffix in SUFFIXES:
        name = suffix.removeprefix(".")
        options = {"format": formats[name]} if name in formats else {}
        picture(folder / "cat" / f"x{suffix.upper()}", **options)
    pictures = list_pictures(folder, 64)
    assert len(pictures) == 6 + len(SUFFIXES)
    assert not any(isinstance(read, DataError) for read, _ in pictures.read(range(len(pictures))))


def links(folder: Path) -> None:
    picture(folder.parent / "disk" / "more" / "0.png")
    os.symlink(folder.parent / "disk", folder / "cat" / "linked")
    picture(folder.parent / "birds" / "0.png")
    os.symlink(folder.parent / "birds", folder / "bird")


def looping_links(folder: Path) -> None:
    os.symlink("loop.jpg", folder / "cat" / "loop.jpg")
    os.symlink("0.jpg/x.jpg", folder / "cat" / "through.jpg")
    os.symlink("x" * 300, folder / "cat" / "long.jpg")


Change = Callable[[Path], object]
CASES: dict[str, tuple[Change, int, dict[str, int]]] = {
    "a hidden file": (
        lambda f: (f / "cat" / "._0.jpg").write_bytes(b"\0\5\x16\7"),
        6,
        {"hidden": 1},
    ),
    "a hidden folder": (
        lambda f: picture(f / "cat" / ".ipynb_checkpoints" / "0-checkpoint.jpg"),
        6,
        {"hidden": 1},
    ),
    "an archive's folder": (
        lambda f: picture(f / "__MACOSX" / "cat" / "0.jpg"),
        6,
        {"system folder": 1},
    ),
    "a file server's folder": (
        lambda f: picture(f / "cat" / "@eaDir" / "0.jpg" / "THUMB_M.jpg"),
        6,
        {"system folder": 1},
    ),
    "a file system's folder": (lambda f: (f / "lost+found").mkdir(), 6, {"system folder": 1}),
    "no images": (
        lambda f: [(f / "cat" / name).write_text("") for name in ("a.txt", "b.txt", "c")],
        6,
        {"no image file (.txt)": 2, "no image file (no suffix)": 1},
    ),
    "an image beside the classes": (
        lambda f: picture(f / "stray.jpg"),
        6,
        {"beside the class folders, not in one": 1},
    ),
    "a broken link": (
        lambda f: os.symlink("/nowhere/1.jpg", f / "cat" / "9.jpg"),
        6,
        {"broken link": 1},
    ),
    "links that lead nowhere": (looping_links, 6, {"broken link": 3}),
    "a class that is the folder": (
        lambda f: os.symlink(".", f / "all"),
        6,
        {"link to a folder above it": 1},
    ),
    "a class that is above the folder": (
        lambda f: os.symlink("..", f / "up"),
        6,
        {"link to a folder above it": 1},
    ),
    "a link to a folder above": (
        lambda f: os.symlink(f, f / "cat" / "up"),
        6,
        {"link to a folder above it": 1},
    ),
    "a pipe": (lambda f: os.mkfifo(f / "cat" / "9.jpg"), 6, {"no regular file": 1}),
    "links": (links, 8, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_files_are_used_or_counted(folder: Path, name: str) -> None:
    change, count, reasons = CASES[name]
    change(folder)
    pictures = list_pictures(folder, 64)
    assert len(pictures) == count
    assert pictures.class_names == (("bird", "cat", "dog") if name == "links" else ("cat", "dog"))
    assert {reason: len(paths) for reason, paths in pictures.skipped.paths.items()} == reasons
    assert len(pictures.skipped) == sum(reasons.values())
    for reason, paths in pictures.skipped.paths.items():
        assert f"{len(paths)} {reason} ({paths[0]}" in str(pictures.skipped)


def test_parts_of_a_data_set_are_no_classes(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(RED_LEFT).save(tmp_path / part / name / "0.png")
    with pytest.raises(DataError, match=f"not classes: give one of them, such as {tmp_path}/train"):
        list_pictures(tmp_path, 64)
    assert list_pictures(tmp_path / "train", 64).class_names == ("ant", "bee")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["0", "1", "10", "2"], "class id 2 is folder '10'. For numeric order give all"),
        (["0", "1", "2"], ""),
        (["00", "01", "10"], ""),
    ],
)
def test_ids_that_are_not_the_numbers_of_folders_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], said: str
) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        Image.fromarray(RED_LEFT).save(tmp_path / name / "0.png")
    list_pictures(tmp_path, 64)
    told = capsys.readouterr().err
    assert said in told and bool(told) == bool(said)


def test_a_class_without_images_keeps_its_id(folder: Path) -> None:
    (folder / "bird").mkdir()
    (folder / "cow").mkdir()
    with pytest.raises(DataError, match="bird has no images"):
        list_pictures(folder, 64)
    pictures = list_pictures(folder, 64, skip_bad=True)
    assert pictures.class_names == ("bird", "cat", "cow", "dog")
    assert pictures.empty == ("bird", "cow")
    assert [picture.label for picture in pictures.pictures] == [1, 1, 1, 3, 3, 3]


def test_a_class_on_a_disk_that_is_not_there(folder: Path) -> None:
    """The other classes keep their ids."""
    picture(folder.parent / "disk" / "0.png")
    os.symlink(folder.parent / "disk", folder / "ant")
    labels = [each.label for each in list_pictures(folder, 64).pictures]
    (folder.parent / "disk").rename(folder.parent / "elsewhere")
    with pytest.raises(DataError, match="ant is a broken link and has no images"):
        list_pictures(folder, 64)
    left = list_pictures(folder, 64, skip_bad=True)
    assert left.empty == ("ant",)
    assert [each.label for each in left.pictures] == labels[1:]


def test_names_are_one_line(folder: Path) -> None:
    (folder / "cat" / "two\nlines.txt").touch()
    assert r"two\nlines.txt" in str(list_pictures(folder, 64).skipped)


def test_folders_that_cannot_be_used(folder: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        list_pictures(folder / "nowhere", 64)
    with pytest.raises(DataError, match="cat has no subfolders"):
        list_pictures(folder / "cat", 64)
    for path in folder.rglob("*.jpg"):
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(DataError, match=r"cat has no images \(.avif, .*: 6 no image file \(.heic"):
        list_pictures(folder, 64, skip_bad=True)


def load(image: Image.Image, tmp_path: Path, suffix: str = ".png", **options: object) -> np.ndarray:
    image.save(tmp_path / f"image{suffix}", **options)
    return Picture(tmp_path / f"image{suffix}", 0).load(64)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_images_are_turned_as_their_exif_says(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left as stored is the top as shown
    pixels = load(Image.fromarray(RED_LEFT), tmp_path, suffix, exif=exif)
    assert (pixels[:24, :, 0] > 200).all() and (pixels[40:, :, 0] < 60).all()
    stored = Picture(tmp_path / f"image{suffix}", 0, as_stored=True).load(64)
    assert (stored[:, :24, 0] > 200).all() and (stored[:, 40:, 0] < 60).all()


@pytest.mark.parametrize("suffix", [".tif", ".png", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    """As stored, though Pillow turns TIFF files when it reads them, and as Pillow turns others."""
    pixels, exif = RNG.integers(0, 256, (80, 64, 3), dtype=np.uint8), Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image{suffix}"
    Image.fromarray(pixels).save(path, exif=exif, lossless=True)
    assert np.array_equal(np.asarray(read_image(path, as_stored=True)), pixels)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(np.asarray(read_image(path)), upright)


@pytest.mark.parametrize(("tag", "value"), [(282, "72"), (256, "64"), (259, b"\1")])
def test_odd_tags_beside_an_orientation(tmp_path: Path, tag: int, value: Any) -> None:
    """A resolution, a width and a compression of the wrong types: the pixels are fine."""
    entries = [(274, 3, 1, struct.pack("<HH", 6, 0)), _entry(tag, value)]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    exif = b"Exif\0\0" + head + body + bytes(4)
    Image.fromarray(RED_LEFT).save(tmp_path / "image.jpg", exif=exif)
    pixels = np.asarray(read_image(tmp_path / "image.jpg"))
    assert (pixels[:24, :, 0] > 200).all() and (pixels[56:, :, 0] < 60).all()


def _entry(tag: int, value: Any) -> tuple[int, int, int, bytes]:
    data = value.encode() if isinstance(value, str) else value
    return tag, 2 if isinstance(value, str) else 7, len(data), data.ljust(4, b"\0")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_modes_that_have_no_transparency(tmp_path: Path, mode: str) -> None:
    white_left = Image.fromarray(np.where(RED_LEFT[..., :1] > 0, 255, 0).repeat(3, 2).astype("u1"))
    pixels = load(
        white_left.convert(mode), tmp_path, ".jpg" if mode in ("CMYK", "YCbCr") else ".png"
    )
    assert (pixels[:, :24] > 250).all() and (pixels[:, 40:] < 5).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparent_parts_are_white(tmp_path: Path, mode: str) -> None:
    pixels = np.zeros((80, 80, 4), np.uint8)
    pixels[:, :40, 3] = 255  # black on the left, nothing on the right
    image, options = Image.fromarray(pixels).convert(mode), {}
    if mode == "P":
        image = Image.fromarray(np.repeat([[0] * 40 + [1] * 40], 80, 0).astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 9, 9, 9])
        options = {"transparency": 1}
    shown = load(image, tmp_path, **options)
    assert (shown[:, :24] == 0).all() and (shown[:, 40:] == 255).all()


def test_16_bit_pixels_keep_their_upper_bits(tmp_path: Path) -> None:
    grey = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    for suffix in (".png", ".tif"):
        shown = load(Image.fromarray(grey), tmp_path, suffix)
        assert np.array_equal(shown, (grey >> 8)[..., None].repeat(3, 2))


def tiff(path: Path, levels: np.ndarray, bits: int, photometric: int) -> Path:
    """Grey of `bits` bits a pixel, written by hand: Pillow writes neither kind."""
    if bits == 12:
        pairs = levels.reshape(-1, 2).astype(int)
        packed = [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255]
        data = np.stack(packed, 1).astype(np.uint8).tobytes()
    else:
        data = levels.astype("<u2").tobytes()
    high, wide = levels.shape
    entries = {256: wide, 257: high, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: high}
    entries[279], entries[273] = len(data), 8 + 2 + 12 * (len(entries) + 1) + 4
    fields = (struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    header = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    path.write_bytes(header + b"".join(fields) + bytes(4) + data)
    return path


@pytest.mark.parametrize(
    ("bits", "shift", "black_is_0"), [(16, 8, True), (16, 8, False), (12, 4, True)]
)
def test_tiffs_of_other_depths(tmp_path: Path, bits: int, shift: int, black_is_0: bool) -> None:
    levels = RNG.integers(0, 1 << bits, (8, 8))
    path = tiff(tmp_path / "image.tif", levels, bits, int(black_is_0))
    shown = np.asarray(read_image(path))[..., 0]
    assert np.array_equal(shown, levels >> shift if black_is_0 else 255 - (levels >> shift))


@pytest.mark.parametrize("most", [4095, 65535])
def test_a_grey_map_of_16_bits(tmp_path: Path, most: int) -> None:
    levels = RNG.integers(0, most + 1, (8, 8))
    content = b"P5 8 8 %d\n" % most + levels.astype(">u2").tobytes()
    (tmp_path / "image.pgm").write_bytes(content)
    shown = np.asarray(read_image(tmp_path / "image.pgm"))[..., 0]
    assert np.abs(shown - levels * (256 / (most + 1))).max() <= 1


def png(path: Path, depth: int, colour: int, row: bytes, transparent: bytes) -> Path:
    """8 rows of 8 pixels, of which one level is transparent; Pillow does not write all of these."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * 8)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", pixels), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks))
    return path


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_grey_level_that_is_transparent(tmp_path: Path, depth: int) -> None:
    """The first four pixels of each row are of that level, the others black."""
    level = {1: 1, 2: 1, 4: 5, 8: 77, 16: 0x8001}[depth]
    bits = "".join(f"{value:0{depth}b}" for value in [level] * 4 + [0] * 4)
    row = int(bits, 2).to_bytes(depth, "big")
    path = png(tmp_path / "image.png", depth, 0, row, struct.pack(">H", level))
    shown = np.asarray(read_image(path))
    assert (shown[:, :4] == 255).all() and (shown[:, 4:] == 0).all()


def test_a_transparent_colour_of_16_bits_is_refused(tmp_path: Path) -> None:
    """Pillow keeps 8 bits of each, and would show others white too."""
    path = png(tmp_path / "image.png", 16, 2, bytes(48), bytes(6))
    with pytest.raises(DataError, match="a transparent colour of 16 bits is not supported"):
        read_image(path)


def test_the_first_frame_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    for suffix in (".gif", ".webp", ".tif"):
        options = {"save_all": True, "append_images": frames[1:]}
        shown = load(frames[0], tmp_path, suffix, **options)
        assert (shown[..., 0] > 240).all() and (shown[..., 2] < 15).all()


@pytest.mark.parametrize(
    ("image", "suffix", "said"),
    [
        (Image.new("I", (64, 64), 70_000), ".tif", "range of its I pixels"),
        (Image.new("F", (64, 64), 0.5), ".tif", "range of its F pixels"),
        (Image.new("RGB", (1, 51)), ".png", "1 x 51 pixels are too thin"),
    ],
)
def test_images_that_would_not_be_themselves(
    tmp_path: Path, image: Image.Image, suffix: str, said: str
) -> None:
    with pytest.raises(DataError, match=f"image{suffix} is not a readable image: .*{said}"):
        load(image, tmp_path, suffix)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = picture(tmp_path / "0.jpg")
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match="0.jpg is not a readable image"):
        read_image(path)


def test_the_identity_tells_files_and_settings_apart(folder: Path) -> None:
    def stated(**options: bool) -> tuple[object, ...]:
        pictures: Pictures = list_pictures(folder, 64, **options)
        return pictures.identity(), pictures.settings

    before = stated()
    assert stated() == before
    for option in ("flip", "as_stored"):
        assert stated(**{option: True}) != before
    path = folder / "cat" / "0.jpg"
    there = path.stat()
    os.utime(path, ns=(there.st_atime_ns, there.st_mtime_ns + 1))
    touched = stated()
    assert touched != before
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(there.st_atime_ns, there.st_mtime_ns))
    assert stated() not in (before, touched)
    path.rename(folder / "dog" / "9.jpg")
    assert len(stated()[0]) == 6 and stated() != before


def test_the_bench_reads_folders_as_training_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reference of 16-bit, transparent and BMP images, beside a hidden file."""
    grey = np.full((64, 64), 0x8000, np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.new("RGBA", (64, 64)).save(tmp_path / "b.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "c.bmp")
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")
    found = np.concatenate(list(judges._pictures(tmp_path)))
    assert [image[0, 0].tolist() for image in found] == [[128] * 3, [255] * 3, [255, 0, 0]]
    assert f"skipped: 1 hidden ({tmp_path / '._a.png'})" in capsys.readouterr().err
    skipped = Skipped()
    assert len(find_images(tmp_path, skipped)) == 3
