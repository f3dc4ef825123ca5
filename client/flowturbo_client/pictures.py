"""Convert images and masks to input tensors, and make masks and noise for the verbs."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tritonclient.grpc import InferInput
from tritonclient.utils import np_to_triton_dtype

from .errors import InvalidRequestError
from .tensors import whole

Picture: TypeAlias = str | Path | bytes | Image.Image | NDArray[np.uint8]
Pictures: TypeAlias = Picture | Sequence[Picture]
_OF_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_MOST_PIXELS = 50_000_000  # of the server
ALPHA = "alpha"  # a mask of the transparent pixels of the image


def picture_tensors(image: Pictures | None, mask: Pictures | None, n: int) -> list[InferInput]:
    """Return the inputs for an image, or n, and a mask, or n, to repaint where it is white.

    `mask` "alpha" repaints where the image is transparent. Raises InvalidRequestError.
    """
    if image is None:
        if mask is not None:
            raise InvalidRequestError("mask needs an image: give image too")
        return []
    images = _listed("image", image, dims=3)
    masks = None
    if isinstance(mask, str) and mask == ALPHA:
        masks = [alpha_mask(each) for each in images]
    elif mask is not None:
        masks = _listed("mask", mask, dims=2)
    for name, given in (("image", images), ("mask", masks)):
        if given is not None and len(given) not in (1, n):
            raise InvalidRequestError(
                f"{name} must be one, or one per image, {n} here, got {len(given)}"
            )
    return [*_tensor("image", images), *_tensor("mask", masks or [])]


def count(image: Pictures) -> int:
    """Return how many images `image` has."""
    return len(_listed("image", image, dims=3))


def padded(image: Picture, left: int, top: int, right: int, bottom: int) -> tuple[Any, Any]:
    """Return a larger image, and the mask of its new border: outpainting.

    The border repeats the edge of `image`. Sizes are in pixels. Raises InvalidRequestError.
    """
    sides = tuple(whole("the border", side, 0) for side in (left, top, right, bottom))
    if not any(sides):
        raise InvalidRequestError(f"the border must have pixels, got {sides}")
    opened = _opened("image", image)
    if "A" in opened.getbands() or "transparency" in opened.info:  # as the server does
        opened = opened.convert("RGBA")
        opened = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened)
    pixels = np.asarray(opened.convert("RGB"))
    if pixels.size // 3 * (1 + sum(sides) // min(pixels.shape[:2])) > _MOST_PIXELS:
        raise InvalidRequestError(f"the border is too large for the image, got {sides}")
    around = ((top, bottom), (left, right))
    mask = np.pad(np.zeros(pixels.shape[:2], np.uint8), around, constant_values=255)
    return np.pad(pixels, (*around, (0, 0)), mode="edge"), mask


def noise_between(
    first: int, last: int, count: int, latent_shape: Sequence[int]
) -> NDArray[np.float32]:
    """Return noise [count, C, h, w] on the arc from seed `first` to seed `last`.

    The ends are the noise that the server makes of these seeds. Raises InvalidRequestError.
    """
    whole("count", count, 2)
    one, other = (
        np.random.Generator(np.random.Philox(whole("a seed", seed, 0))).standard_normal(
            tuple(latent_shape), dtype=np.float32
        )
        for seed in (first, last)
    )
    if first == last:
        return np.stack([one] * count)
    # Standard normal numbers stay so on the arc: sine and cosine have squares that add up to 1.
    angles = np.linspace(0, np.pi / 2, count)
    arc = [np.cos(angle) * one + np.sin(angle) * other for angle in angles]
    return np.stack([one, *arc[1:-1], other]).astype(np.float32)


def _listed(name: str, value: Any, dims: int) -> list[Any]:
    if isinstance(value, np.ndarray):
        if value.dtype == np.bool_:
            value = value.astype(np.uint8) * 255
        if value.dtype != np.uint8 or value.ndim not in (dims, dims + 1):
            raise InvalidRequestError(
                f"{name} must be uint8 of {dims} or {dims + 1} dimensions, got {value.dtype} "
                f"{list(value.shape)}"
            )
        return list(value) if value.ndim == dims + 1 else [value]
    if isinstance(value, str | Path | bytes | Image.Image):
        return [value]
    if isinstance(value, Sequence):
        return [single for each in value for single in _listed(name, each, dims)]
    raise InvalidRequestError(
        f"{name} must be a path, the bytes of a file, a PIL image or an array, got "
        f"{type(value).__name__}"
    )


def _tensor(name: str, given: list[Any]) -> list[InferInput]:
    if not given:
        return []
    if all(isinstance(each, np.ndarray) and each.shape[2:] in ((), (3,)) for each in given):
        if len({each.shape for each in given}) > 1:
            given = [Image.fromarray(each) for each in given]
        else:
            return [_input(name, np.stack(given))]
    files = np.array([_file(name, each) for each in given], dtype=np.object_)
    return [_input(f"{name}_file", files)]


def _input(name: str, array: NDArray[Any]) -> InferInput:
    tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


def _file(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str | Path):
        try:
            return Path(value).read_bytes()
        except OSError as error:
            raise InvalidRequestError(f"{name} cannot be read: {error}") from error
    buffer = io.BytesIO()
    try:
        image = Image.fromarray(value) if isinstance(value, np.ndarray) else value
        image = image if image.mode in _OF_PNG else image.convert("RGB")
        image.save(buffer, "PNG")
    except (OSError, TypeError, ValueError) as error:
        raise InvalidRequestError(f"{name} cannot be sent: {error}") from error
    return buffer.getvalue()


def _opened(name: str, value: Any) -> Image.Image:
    """Return a PIL image, turned upright as the server does, with its pixels read."""
    try:
        if isinstance(value, np.ndarray):
            return Image.fromarray(value)
        opened = value if isinstance(value, Image.Image) else None
        opened = opened or Image.open(io.BytesIO(_file(name, value)))
        turned: Image.Image = ImageOps.exif_transpose(opened)
        turned.load()
        return turned
    except InvalidRequestError:
        raise
    except Exception as error:  # a broken file can raise anything
        raise InvalidRequestError(f"{name} is no image: {error}") from error


def alpha_mask(image: Any) -> NDArray[np.uint8]:
    """Return the mask [H, W] of the transparent pixels of an image; InvalidRequestError if none."""
    opened = _opened("image", image)
    if "A" not in opened.getbands() and "transparency" not in opened.info:
        raise InvalidRequestError('mask "alpha" needs an image with transparency')
    alpha = np.asarray(opened.convert("RGBA"))[:, :, 3]
    return np.asarray(255 - alpha, dtype=np.uint8)
