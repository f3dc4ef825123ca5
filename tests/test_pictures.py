"""Files of callers: what is read, how, and what is refused."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from flowturbo import pictures
from flowturbo.errors import RequestError
from flowturbo.pictures import Picture

pytestmark = pytest.mark.unit

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)


def file(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(data: bytes, size: tuple[int, int] = (6, 10)) -> np.ndarray:
    return Picture.of_file("image_file", data).image(size)


@pytest.mark.parametrize("options", [{"kind": "PNG"}, {"kind": "WEBP", "lossless": True}])
def test_files_without_loss(options: dict[str, Any]) -> None:
    np.testing.assert_array_equal(read(file(Image.fromarray(PIXELS), **options)), PIXELS)


def test_base64_for_json() -> None:
    text = base64.b64encode(file(Image.fromarray(PIXELS)))
    np.testing.assert_array_equal(read(text), PIXELS)


def test_jpeg_is_about_the_same() -> None:
    smooth = np.full((16, 16, 3), (200, 30, 90), np.uint8)
    found = read(file(Image.fromarray(smooth), "JPEG", quality=95), (16, 16))
    assert np.abs(found.astype(int) - smooth).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = orientation
    picture = Picture.of_file("image_file", file(image, exif=exif))
    high, wide = (10, 6) if orientation >= 5 else (6, 10)
    assert picture.size == (high, wide)
    turned = {1: PIXELS, 3: PIXELS[::-1, ::-1], 6: np.rot90(PIXELS, -1), 8: np.rot90(PIXELS)}
    if orientation in turned:
        np.testing.assert_array_equal(picture.image((high, wide)), turned[orientation])


def test_transparent_is_white() -> None:
    rgba = np.dstack([PIXELS, np.full((6, 10), 255, np.uint8)])
    rgba[:3, :, 3] = 0
    found = read(file(Image.fromarray(rgba)))
    assert (found[:3] == 255).all()
    np.testing.assert_array_equal(found[3:], PIXELS[3:])


def test_sixteen_bits_are_shifted_not_cut() -> None:
    levels = np.linspace(0, 65535, 60).reshape(6, 10).astype(np.uint16)
    found = read(file(Image.fromarray(levels)))
    np.testing.assert_array_equal(found[:, :, 0], levels >> 8)


def test_images_are_resized() -> None:
    assert read(file(Image.fromarray(PIXELS)), (12, 20)).shape == (12, 20, 3)


def test_a_thin_stroke_of_a_mask_survives_resizing() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 31] = 255
    small = Picture.of_array("mask", mask).mask((16, 16))
    assert small[:, 7].all() and small.sum() == 16


def test_a_mask_is_white_where_to_repaint() -> None:
    levels = np.array([[0, 127, 128, 255]], np.uint8)
    data = file(Image.fromarray(levels))
    found = Picture.of_file("mask_file", data).mask((1, 4))
    assert found.tolist() == [[False, False, True, True]]


def frames() -> bytes:
    first = Image.fromarray(PIXELS)
    rest = [Image.fromarray(255 - PIXELS)]
    return file(first, "WEBP", save_all=True, append_images=rest, duration=100)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "got 0 bytes that cannot be read"),
        (b"no image", "must be a whole file of PNG, JPEG, WEBP, got 8 bytes that cannot"),
        (file(Image.fromarray(PIXELS), "GIF"), "must be a whole file of PNG, JPEG, WEBP"),
        (frames(), "must be a single image, got 2 frames"),
    ],
)
def test_refused_headers(data: bytes, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Picture.of_file("image_file", data)


def test_a_file_that_ends_early() -> None:
    large = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = file(Image.fromarray(large))
    with pytest.raises(RequestError, match="image_file .*cannot be read"):
        read(data[: len(data) // 2], (64, 64))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("side", [7100, 9000, 20000])
def test_too_many_pixels_are_refused_before_decoding(
    side: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a few kilobytes can have a gigapixel."""
    data = file(Image.new("1", (side, side)), kind)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(RequestError, match="at most 50000000 pixels"):
        Picture.of_file("image_file", data)


def test_only_headers_are_read_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for kind in ("PNG", "JPEG", "WEBP"):
        assert Picture.of_file("image_file", file(Image.fromarray(PIXELS), kind)).size == (6, 10)


def test_an_unknown_orientation_turns_nothing() -> None:
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 9
    picture = Picture.of_file("image_file", file(image, exif=exif))
    np.testing.assert_array_equal(picture.image((6, 10)), PIXELS)


def test_a_dot_of_a_mask_survives_resizing() -> None:
    mask = np.zeros((2048, 2048), np.uint8)
    mask[77, 1999] = 255
    assert Picture.of_array("mask", mask).mask((64, 64)).sum() == 1


def test_wrapped_base64_and_data_urls() -> None:
    data = file(Image.fromarray(PIXELS))
    text = base64.encodebytes(data)
    for given in (text, b"data:image/png;base64," + base64.b64encode(data)):
        np.testing.assert_array_equal(read(given), PIXELS)


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3)])
def test_empty_arrays_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="must have pixels"):
        Picture.of_array("image", np.zeros(shape, np.uint8))


def test_large_arrays_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", 59)
    with pytest.raises(RequestError, match="at most 59 pixels, got 10 x 6"):
        Picture.of_array("image", PIXELS)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (Image.new("L", (10, 6), 127), "black everywhere"),
        (Image.new("RGBA", (10, 6), (255, 255, 255, 0)), "opaque image.*mask='alpha'"),
    ],
)
def test_refused_masks(mask: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Picture.of_file("mask_file", file(mask)).mask((6, 10))
