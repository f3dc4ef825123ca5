"""How an image file was made, read from its metadata, and the same image made again."""

import hashlib
import io
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .client import FlowTurboClient
from .errors import InvalidRequestError
from .pictures import alpha_mask

_EXIF, _COMMENT = 0x8769, 0x9286
_ASCII = b"ASCII\0\0\0"
_DIGITS = 16
ROUNDING = 4  # levels of 0 to 255: batches of other sizes round differently
_NOISE = "initial_noise_sha256"
# Keys that are arguments of `generate` under the same name, and those under another one.
_SAME = ("pipeline", "schedule", "guidance_scale", "guidance_interval", "strength", "feather")
_OTHER = {"seed": "seeds", "label": "labels", "prompt": "prompts"}
_OTHER |= {"negative_prompt": "negative_prompts", "prompt_to": "prompts_to"}


@dataclass(frozen=True)
class Replayed:
    """An image that was made again."""

    image: Image.Image
    encoded: bytes
    largest_difference: int
    """Of any colour of any pixel, in levels of 0 to 255; 0 is the same picture."""
    other: tuple[str, ...]
    """The models and solvers that differ from those that made the file."""


def read_metadata(file: Path | bytes) -> dict[str, Any]:
    """Return what a file says of its making; InvalidRequestError if it says nothing."""
    name = file if isinstance(file, Path) else "the file"
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            comment = image.getexif().get_ifd(_EXIF).get(_COMMENT, b"")
        if isinstance(comment, str):
            comment = comment.encode()
        found = json.loads(comment.removeprefix(_ASCII))
        if not isinstance(found, dict) or "digests" not in found:
            raise ValueError("it is from another program")
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidRequestError(f"{name} does not say how it was made: {error}") from error
    return found


def replay(
    client: FlowTurboClient, path: Path, image: Path | None = None, mask: Path | None = None
) -> Replayed:
    """Make the image of the file again and compare them.

    `image` and `mask` are the files of an edit: metadata have only their digests. Raises
    InvalidRequestError.
    """
    made = read_metadata(path)
    if _NOISE in made:
        raise InvalidRequestError(f"{path} was made of a noise that was given: it has no seed")
    arguments = {name: made[name] for name in _SAME if name in made}
    arguments |= {given: [made[name]] for name, given in _OTHER.items() if name in made}
    if "mix" in made:
        arguments["mix"] = [made["mix"]]
    if "size" in made:
        arguments["size"] = (made["size"][1], made["size"][0])
    if "times" in made:
        arguments["times"] = made["times"]
    for name, file in (("image", image), ("mask", mask)):
        arguments |= _checked(path, made.get(f"{name}_sha256"), name, file)
    with Image.open(path) as opened:
        form = (opened.format or "").lower()
        known = np.asarray(opened.convert("RGB"), dtype=int)
    if "output_quality" in made:
        arguments["output_quality"] = made["output_quality"]
    answer = client.generate(**arguments, output_format=form)
    assert answer.encoded
    (again,) = answer.pil()
    pixels = np.asarray(again, dtype=int)
    if pixels.shape != known.shape:
        raise InvalidRequestError(
            f"{path} was resized: it has {known.shape[1]}x{known.shape[0]} pixels, made were "
            f"{pixels.shape[1]}x{pixels.shape[0]}"
        )
    return Replayed(
        again, answer.encoded[0], int(np.abs(pixels - known).max()), _other(made, answer.encoded[0])
    )


def _checked(path: Path, digest: str | None, name: str, file: Path | None) -> dict[str, Any]:
    """The argument `name`: the file that the metadata of `path` mean, if they mean one."""
    if (digest is None) != (file is None):
        told = f"give --{name}: {path} was made of one" if digest else f"{path} has no {name}"
        raise InvalidRequestError(told)
    if file is None:
        return {}
    data = file.read_bytes()
    if _sha256(data) == digest:
        return {name: data}
    if name == "mask":  # it may have been made of what is transparent
        with suppress(InvalidRequestError):
            mask = alpha_mask(data)
            if _sha256(mask.tobytes()) == digest:
                return {name: mask}
    raise InvalidRequestError(f"{file} is not the {name} that {path} was made of")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


def _other(made: dict[str, Any], again: bytes) -> tuple[str, ...]:
    now = read_metadata(again)
    names = made["digests"].keys() | now["digests"].keys()
    found = [name for name in names if made["digests"].get(name) != now["digests"].get(name)]
    found += ["variant"] * (made.get("variant") != now.get("variant"))
    return tuple(sorted(found))
