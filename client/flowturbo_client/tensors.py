"""Convert Python values to input tensors, with the checks that need no server."""

from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferInput
from tritonclient.utils import np_to_triton_dtype

from .errors import InvalidRequestError

Labels: TypeAlias = int | str | Sequence[int] | Sequence[str] | NDArray[np.integer[Any]]
Prompts: TypeAlias = str | Sequence[str]
Size: TypeAlias = str | tuple[int, int]
Seeds: TypeAlias = int | Sequence[int] | NDArray[np.integer[Any]]

_INT64 = np.iinfo(np.int64)


def label_tensor(labels: Labels) -> InferInput:
    """Return `label` INT64 [n] for class ids, `class_name` BYTES [n] for names; n >= 1."""
    items = _items("labels", labels)
    if not items:
        raise InvalidRequestError("labels is empty: ask for at least one image")
    if all(isinstance(item, str) for item in items):
        return text_tensor("class_name", items)
    if all(_is_integer(item) for item in items):
        return _tensor("label", _int64("labels", items, lowest=_INT64.min))
    kinds = sorted({type(item).__name__ for item in items})
    raise InvalidRequestError(
        f"labels must be all class ids (int) or all class names (str), got {', '.join(kinds)}"
    )


def prompt_tensor(name: str, prompts: Prompts) -> InferInput:
    """Return BYTES [n] of texts; n >= 1."""
    items = _items(f"{name}s", prompts)
    if not items:
        raise InvalidRequestError(f"{name}s is empty: give at least one text")
    return text_tensor(name, items)


def size_tensor(size: Size) -> InferInput:
    """Return `size` INT64 [2], height then width, of (width, height) or "WIDTHxHEIGHT"."""
    return _tensor("size", _int64("size", list(height_width(size)), lowest=1))


def height_width(size: Size) -> tuple[int, int]:
    """Return (height, width) of (width, height) or "WIDTHxHEIGHT"."""
    parts: Any = size.lower().split("x") if isinstance(size, str) else size
    try:
        width, height = (int(part) for part in parts)
    except (TypeError, ValueError):
        raise InvalidRequestError(
            f'size must be "WIDTHxHEIGHT" or (width, height) in pixels, got {size!r}'
        ) from None
    return height, width


def whole(name: str, value: Any, least: int) -> int:
    """Return `value` if it is an integer from `least` on."""
    if not _is_integer(value) or value < least:
        raise InvalidRequestError(f"{name} must be an integer from {least} on, got {value!r}")
    return int(value)


def repeated(labels: Labels, times: int) -> Any:
    """Return one label `times` times; several labels unchanged."""
    items = _items("labels", labels)
    return items * times if len(items) == 1 else items


def count(value: Any) -> int:
    """Return how many values `value` has: 1 for a number or a text."""
    return len(_items("seeds", value))


def seed_tensor(seeds: Seeds, n: int) -> InferInput:
    """Return `seed` INT64 [n], each >= 0."""
    items = _items("seeds", seeds)
    if len(items) != n:
        raise InvalidRequestError(f"seeds must be one per image: {n} images, {len(items)} seeds")
    for item in items:
        if not _is_integer(item):
            raise InvalidRequestError(f"seeds must be integers, got {item!r}")
    return _tensor("seed", _int64("seeds", items, lowest=0))


def text_tensor(name: str, items: Sequence[str]) -> InferInput:
    """Return BYTES [len(items)], UTF-8."""
    return _tensor(name, np.array([_utf8(name, item) for item in items], dtype=np.object_))


def float_tensor(name: str, values: Sequence[float]) -> InferInput:
    """Return FP32 [len(values)]; the server checks their range."""
    for value in values:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise InvalidRequestError(f"{name} must be a number, got {value!r}")
    with np.errstate(over="ignore"):  # becomes inf, which the server refuses
        return _tensor(name, np.array([float(value) for value in values], dtype=np.float32))


def integer_tensor(name: str, value: int) -> InferInput:
    """Return INT64 [1], >= 0."""
    if not _is_integer(value):
        raise InvalidRequestError(f"{name} must be an integer, got {value!r}")
    return _tensor(name, _int64(name, [value], lowest=0))


def true_tensor(name: str) -> InferInput:
    """Return BOOL [1]: true."""
    return _tensor(name, np.array([True]))


def times_tensor(name: str, times: Sequence[float]) -> InferInput:
    """Return FP32 [len(times)]."""
    if not isinstance(times, (Sequence, np.ndarray)) or isinstance(times, str):
        raise InvalidRequestError(f"{name} must be a sequence of numbers, got {times!r}")
    return float_tensor(name, list(times))


def interval_tensor(name: str, interval: Sequence[float]) -> InferInput:
    """Return FP32 [2]: lower and upper end."""
    if not isinstance(interval, (Sequence, np.ndarray)) or len(interval) != 2:
        raise InvalidRequestError(f"{name} must be two numbers (low, high), got {interval!r}")
    return float_tensor(name, list(interval))


def noise_tensor(noise: NDArray[Any], n: int) -> InferInput:
    """Return `initial_noise` FP32 [n, C, h, w]."""
    if not isinstance(noise, np.ndarray) or noise.dtype.kind != "f":
        kind = noise.dtype if isinstance(noise, np.ndarray) else type(noise).__name__
        raise InvalidRequestError(f"initial_noise must be a numpy float array, got {kind}")
    if noise.ndim != 4 or noise.shape[0] != n:
        raise InvalidRequestError(
            f"initial_noise must have shape [{n}, C, h, w], got {list(noise.shape)}"
        )
    with np.errstate(over="ignore"):
        return _tensor("initial_noise", noise.astype(np.float32))


def _items(name: str, value: Any) -> list[Any]:
    if isinstance(value, str) or _is_integer(value):
        return [value]
    is_list = isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview))
    if is_list or (isinstance(value, np.ndarray) and value.ndim == 1):
        return list(value)
    what = f"array of shape {value.shape}" if isinstance(value, np.ndarray) else repr(value)
    raise InvalidRequestError(f"{name} must be one value or a sequence of them, got {what}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _int64(name: str, items: list[Any], *, lowest: int) -> NDArray[np.int64]:
    for item in items:
        if not lowest <= int(item) <= _INT64.max:
            raise InvalidRequestError(f"{name} must be in {lowest}..{_INT64.max}, got {item}")
    return np.array([int(item) for item in items], dtype=np.int64)


def _utf8(name: str, text: str) -> bytes:
    if not isinstance(text, str):
        raise InvalidRequestError(f"{name} must be a string, got {text!r}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{name} is not valid text: {text!r}") from error


def _tensor(name: str, array: NDArray[Any]) -> InferInput:
    tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    return tensor.set_data_from_numpy(array)
