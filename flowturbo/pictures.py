"""Reads the image files that callers send, and resizes them."""

import base64
import binascii
import io
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowturbo.errors import RequestError

MAX_PIXELS = 50_000_000
KINDS = ("PNG", "JPEG", "WEBP")
_ORIENTATION = 0x0112  # Exif: from 5 on, width and height change places
_LEVEL = 128  # of a mask, from which a pixel is repainted
_one_at_a_time = threading.Lock()  # a decoded file can take 200 MB


@dataclass(frozen=True)
class Picture:
    """A file (bytes) whose header has been read, or an array [H, W] or [H, W, 3] uint8.

    `name` is its input, for messages. `size` is (H, W), after the file's orientation.
    """

    name: str
    source: Any
    size: tuple[int, int]

    @classmethod
    def of_array(cls, name: str, array: np.ndarray) -> "Picture":
        """An array; raises RequestError if it is empty or too large."""
        height, width = array.shape[:2]
        if not array.size:
            raise RequestError(f"{name} must have pixels, got {height} x {width}")
        _check_pixels(name, width, height)
        return cls(name, array, (height, width))

    @classmethod
    def of_file(cls, name: str, data: Any) -> "Picture":
        """A file, or its base64 text. Only the header is read. Raises RequestError."""
        data = _file(data if isinstance(data, bytes) else str(data).encode())
        image = _opened(name, data)
        width, height = image.size
        _check_pixels(name, width, height)
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # a photograph with its preview
            raise RequestError(f"{name} must be a single image, got {frames} frames")
        return cls(name, data, (width, height) if _is_turned(image) else (height, width))

    def image(self, size: tuple[int, int]) -> np.ndarray:
        """[H, W, 3] uint8 of `size`; what is transparent is white. Raises RequestError."""
        from PIL import Image

        with _one_at_a_time:
            found = self._decoded("RGB")
            if found.size != size[::-1]:
                found = found.resize(size[::-1], Image.Resampling.LANCZOS)
            return np.asarray(found)

    def mask(self, size: tuple[int, int]) -> np.ndarray:
        """[H, W] bool of `size`: where to repaint. Raises RequestError.

        A pixel is repainted if any part of it is, so that resizing loses no thin stroke.
        """
        from PIL import Image

        with _one_at_a_time:
            chosen = np.asarray(self._decoded("L")) >= _LEVEL
            if chosen.shape != size:
                share = Image.fromarray(chosen.astype(np.float32))
                chosen = np.asarray(share.resize(size[::-1], Image.Resampling.BOX)) > 0
        if not chosen.any():
            raise RequestError(
                f"{self.name} must be {_LEVEL} or more where to repaint, got a mask that is black "
                "everywhere"
            )
        return chosen

    def _decoded(self, mode: str) -> Any:
        """A PIL image of `mode`, turned upright."""
        from PIL import Image, ImageOps

        if isinstance(self.source, np.ndarray):
            return Image.fromarray(self.source)
        try:
            image = ImageOps.exif_transpose(_opened(self.name, self.source))
            return self._grey(image) if mode == "L" else _on_white(image)
        except RequestError:
            raise
        except Exception as error:  # a broken file can raise anything
            raise RequestError(
                f"{self.name} cannot be read: {type(error).__name__}: {error}"
            ) from None

    def _grey(self, image: Any) -> Any:
        image = _eight_bits(image)
        if _is_transparent(image) and np.asarray(image.convert("RGBA"))[:, :, 3].min() < 255:
            raise RequestError(
                f"{self.name} must be an opaque image, 255 where to repaint, got transparent "
                "pixels; the client's mask='alpha' makes a mask of them"
            )
        return image.convert("L")


def _file(data: bytes) -> bytes:
    """`data`, decoded if it is base64 text or a data URL: JSON cannot carry files."""
    text = data.partition(b";base64,")[2] if data.startswith(b"data:") else data
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error:
        return data


def _opened(name: str, data: bytes) -> Any:
    """A PIL image whose pixels are not decoded yet."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=KINDS)
        getattr(image, "n_frames", 1)  # reads more of the file
        return image
    except Image.DecompressionBombError:
        raise RequestError(f"{name} must have at most {MAX_PIXELS} pixels") from None
    except Exception as error:  # a broken file can raise anything
        raise RequestError(
            f"{name} must be a whole file of {', '.join(KINDS)}, got {len(data)} bytes that "
            f"cannot be read ({type(error).__name__})"
        ) from None


def _check_pixels(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise RequestError(f"{name} must have at most {MAX_PIXELS} pixels, got {width} x {height}")


def _is_turned(image: Any) -> bool:
    from PIL import Image

    try:  # the base class's: that of PNG files would decode the image
        return 5 <= int(Image.Image.getexif(image).get(_ORIENTATION, 1)) <= 8
    except Exception:  # metadata that cannot be read turn nothing
        return False


def _is_transparent(image: Any) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _on_white(image: Any) -> Any:
    from PIL import Image

    image = _eight_bits(image)
    if not _is_transparent(image):
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _eight_bits(image: Any) -> Any:
    """PIL cuts 16 bits at 255 when it converts them."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).astype(np.int64) >> 8
    # What such a file states as transparent is a level of 16 bits.
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))
