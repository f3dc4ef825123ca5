"""Makes noise from seeds, and files from images."""

import base64
import io
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

_FILES = ("png", "jpeg", "webp")
BASE64 = "_base64"  # suffix of formats whose files are text, for JSON
FORMATS = ("raw", *_FILES, *(f"{name}{BASE64}" for name in _FILES))
MAX_SEED = 2**63 - 1
QUALITY = 95  # of JPEG and WebP files


def draw_seeds(count: int) -> np.ndarray:
    """Random seeds, [count] int64, of only 32 bits: short enough to write down."""
    return np.array([secrets.randbits(32) for _ in range(count)], dtype=np.int64)


def noise(seeds: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Standard normal noise [n, C, h, w] float32. The noise of an image depends only on its seed.

    `seeds` is [n] int64 in 0..2**63-1, `shape` is (C, h, w). Philox is counter-based, so the
    numbers are the same on every machine.
    """
    generators = (np.random.Generator(np.random.Philox(int(seed))) for seed in seeds)
    return np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])


def encode_images(
    images: np.ndarray, output_format: str, quality: int = QUALITY, exif: Sequence[bytes] = ()
) -> np.ndarray:
    """Images [n, H, W, 3] uint8 as files, [n] of bytes. `output_format` is any FORMATS but raw.

    `quality` counts for JPEG and WebP. `exif` has the metadata of each image, or is empty.
    """
    name = output_format.removesuffix(BASE64)
    files = [
        _encode(image, name, quality, metadata)
        for image, metadata in zip(images, exif or [b""] * len(images), strict=True)
    ]
    if output_format.endswith(BASE64):
        files = [base64.b64encode(file) for file in files]
    return np.array(files, object)


def _encode(image: np.ndarray, output_format: str, quality: int, exif: bytes) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    options: dict[str, Any] = {} if output_format == "png" else {"quality": quality}
    Image.fromarray(image).save(
        buffer, output_format, **options, **({"exif": exif} if exif else {})
    )
    return buffer.getvalue()
