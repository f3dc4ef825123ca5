"""The model's contract: one request out, one `Generation` in. Both clients use only this."""

import base64
import binascii
import io
import json
import secrets
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import InferInput, InferRequestedOutput, InferResult

from . import pictures, tensors
from .errors import InvalidRequestError, ServerError

OUTPUTS = ("image", "latent")
CALLER_HEADER = "flowturbo-caller"
Answer = TypeVar("Answer")  # what is read of a server's answer
_SEED_BITS = 32  # of drawn seeds: short enough to write down
# The server's own deadline error says more than gRPC's, so the transport waits a little longer.
_REPORT_MARGIN_S = 0.5


@dataclass(frozen=True)
class Generation:
    """n generated images and what made them. Arrays are read-only."""

    images: NDArray[np.uint8] | None
    """[n, H, W, 3], or None if not requested raw."""
    encoded: tuple[bytes, ...] | None
    """n image files in the requested `output_format`, or None; formats that end in _base64 give
    text."""
    latents: NDArray[np.float32] | None
    """[n, C, h, w], or None if not requested."""
    seeds: NDArray[np.int64]
    """[n]; includes seeds that the server chose."""
    class_names: tuple[str, ...]
    """n names, for images of classes; else empty."""
    truncated: tuple[bool, ...]
    """n, for images of prompts: whether the text was too long and was cut; else empty."""
    start_time: float
    """Where the time grid started: 0 is noise; an edit of little strength starts near 1."""
    settings: dict[str, Any]
    """What the server used, including defaults: pipeline, schedule, guidance_scale, ..."""
    latency_s: float
    """From sending the answered attempt to receiving its answer."""

    def pil(self) -> list[Image.Image]:
        """Return the n images as PIL images; InvalidRequestError if none were requested."""
        if self.images is not None:
            return [Image.fromarray(image) for image in self.images]
        if self.encoded is not None:
            return [decoded(data) for data in self.encoded]
        raise InvalidRequestError('there are no images: request them with outputs=("image",)')


@dataclass(frozen=True)
class Request:
    """One checked ModelInfer request; may be sent more than once."""

    n: int
    inputs: tuple[InferInput, ...]
    output_names: tuple[str, ...]
    headers: dict[str, str] = field(default_factory=dict)

    def arguments(self, model: str, remaining_s: float) -> dict[str, Any]:
        """Arguments of tritonclient's `infer`, with `remaining_s` as the server's deadline."""
        return {
            "model_name": model,
            "inputs": list(self.inputs),
            "outputs": [InferRequestedOutput(name) for name in self.output_names],
            "timeout": max(1, round(remaining_s * 1e6)),  # microseconds; 0 would mean no timeout
            "client_timeout": remaining_s + _REPORT_MARGIN_S,
            "headers": self.headers,
        }

    def parse(self, result: InferResult, latency_s: float) -> Generation:
        """Read the answer; ServerError if it breaks the contract."""
        try:
            found = {name: _array(result, name, self.n) for name in self.output_names}
            class_names = tuple(bytes(name).decode() for name in found.get("class_name", ()))
            settings = _json(found["settings"], dict, "an object")
        except (ValueError, TypeError, struct.error) as error:
            raise ServerError(f"the server's answer cannot be read: {error}") from error
        encoded = found.get("encoded_image")
        return Generation(
            images=found.get("image"),
            encoded=None if encoded is None else tuple(bytes(data) for data in encoded),
            latents=found.get("latent"),
            seeds=found["seed"],
            class_names=class_names,
            truncated=tuple(bool(cut) for cut in found.get("truncated", ())),
            start_time=float(found["start_time"][0]) if "start_time" in found else 0.0,
            settings=settings,
            latency_s=latency_s,
        )


def build_request(
    labels: tensors.Labels | None = None,
    seeds: tensors.Seeds | None = None,
    schedule: str | None = None,
    guidance_scale: float | None = None,
    *,
    prompts: tensors.Prompts | None = None,
    negative_prompts: tensors.Prompts | None = None,
    prompts_to: tensors.Prompts | None = None,
    mix: Sequence[float] | None = None,
    size: tensors.Size | None = None,
    pipeline: str | None = None,
    times: Sequence[float] | None = None,
    guidance_interval: Sequence[float] | None = None,
    initial_noise: NDArray[Any] | None = None,
    image: pictures.Pictures | None = None,
    mask: pictures.Pictures | None = None,
    strength: float | None = None,
    feather: int | None = None,
    invert: bool = False,
    preview_every: int | None = None,
    output_format: str | None = None,
    output_quality: int | None = None,
    strip_metadata: bool = False,
    outputs: Sequence[str] = ("image",),
    caller: str | None = None,
) -> Request:
    """Check what needs no server and build the request; None means the server's default.

    Raises InvalidRequestError.
    """
    if (labels is None) == (prompts is None):
        found = "neither" if labels is None else "both"
        raise InvalidRequestError(f"give either labels or prompts, got {found}")
    if labels is not None:
        inputs = [tensors.label_tensor(labels)]
    else:
        assert prompts is not None
        inputs = [tensors.prompt_tensor("prompt", prompts)]
    n = int(inputs[0].shape()[0])
    if prompts is not None and n == 1:  # one text serves all seeds
        if seeds is not None:
            n = tensors.count(seeds)
        elif initial_noise is not None:
            n = len(initial_noise)
        elif image is not None:
            n = pictures.count(image)
    if negative_prompts is not None:
        inputs.append(tensors.prompt_tensor("negative_prompt", negative_prompts))
    if prompts_to is not None:
        inputs.append(tensors.prompt_tensor("prompt_to", prompts_to))
    if mix is not None:
        inputs.append(tensors.times_tensor("mix", mix))
    if size is not None:
        inputs.append(tensors.size_tensor(size))
    if pipeline is not None:
        inputs.append(tensors.text_tensor("pipeline", [pipeline]))
    if seeds is None and initial_noise is None and not invert:
        # Fixed before the first attempt: every attempt asks for the same images.
        seeds = [secrets.randbits(_SEED_BITS) for _ in range(n)]
    if seeds is not None:
        inputs.append(tensors.seed_tensor(seeds, n))
    if schedule is not None:
        inputs.append(tensors.text_tensor("schedule", [schedule]))
    if times is not None:
        inputs.append(tensors.times_tensor("times", times))
    if guidance_scale is not None:
        inputs.append(tensors.float_tensor("guidance_scale", [guidance_scale]))
    if guidance_interval is not None:
        inputs.append(tensors.interval_tensor("guidance_interval", guidance_interval))
    if initial_noise is not None:
        inputs.append(tensors.noise_tensor(initial_noise, n))
    inputs += pictures.picture_tensors(image, mask, n)
    if strength is not None:
        inputs.append(tensors.float_tensor("strength", [strength]))
    if feather is not None:
        inputs.append(tensors.integer_tensor("feather", feather))
    if invert:
        inputs.append(tensors.true_tensor("invert"))
    if preview_every is not None:
        inputs.append(tensors.integer_tensor("preview_every", preview_every))
    if output_format is not None:
        inputs.append(tensors.text_tensor("output_format", [output_format]))
    if output_quality is not None:
        inputs.append(tensors.integer_tensor("output_quality", output_quality))
    if strip_metadata:
        inputs.append(tensors.true_tensor("strip_metadata"))
    named = "class_name" if prompts is None else "truncated"
    edits = ("start_time",) if image is not None else ()
    names = (*_output_names(outputs, output_format), *edits, named)
    return Request(n, tuple(inputs), names, {} if caller is None else {CALLER_HEADER: caller})


def pipelines_request() -> Request:
    """Return the request for the server's pipelines; it has no input."""
    return Request(0, (), ("pipelines",))


def parse_pipelines(result: InferResult) -> list[dict[str, Any]]:
    """Return one description per pipeline; ServerError if the answer breaks the contract."""
    try:
        found: list[dict[str, Any]] = _json(_array(result, "pipelines", 0), list, "a list")
    except (ValueError, TypeError, struct.error) as error:
        raise ServerError(f"the server's answer cannot be read: {error}") from error
    return found


def latent_shape(
    pipelines: Sequence[dict[str, Any]], name: str | None, size: tensors.Size | None = None
) -> list[int]:
    """Return the latent shape (C, h, w) of the pipeline `name`, else of the server's default.

    `size` is that of the images, if not the pipeline's. Raises InvalidRequestError for an unknown
    name.
    """
    for each in pipelines:
        if each["name"] == name or (name is None and each["default"]):
            channels, height, width = each["latent_shape"]
            if size is not None:
                high, wide = tensors.height_width(size)
                height = height * high // each["size"][0]
                width = width * wide // each["size"][1]
            return [channels, height, width]
    known = ", ".join(each["name"] for each in pipelines)
    raise InvalidRequestError(f"pipeline {name!r} is unknown, known are {known}")


def _output_names(outputs: Sequence[str], output_format: str | None) -> tuple[str, ...]:
    wanted = [outputs] if isinstance(outputs, str) else list(outputs)
    if not wanted or not set(wanted) <= set(OUTPUTS):
        raise InvalidRequestError(f"outputs must be some of {OUTPUTS}, got {outputs!r}")
    image = "image" if output_format in (None, "raw") else "encoded_image"
    names = [image if name == "image" else name for name in dict.fromkeys(wanted)]
    return (*names, "seed", "settings")


# Data type and shape of each output; None is any size, "n" the number of images.
_CONTRACT: dict[str, tuple[type[np.generic], tuple[int | str | None, ...]]] = {
    "image": (np.uint8, ("n", None, None, 3)),
    "encoded_image": (np.object_, ("n",)),
    "latent": (np.float32, ("n", None, None, None)),
    "seed": (np.int64, ("n",)),
    "start_time": (np.float32, (1,)),
    "class_name": (np.object_, ("n",)),
    "truncated": (np.bool_, ("n",)),
    "settings": (np.object_, (1,)),
    "pipelines": (np.object_, (1,)),
}


def _array(result: InferResult, name: str, n: int) -> Any:
    array = result.as_numpy(name)
    dtype, dims = _CONTRACT[name]
    want = [n if size == "n" else size for size in dims]
    if array is None:
        raise ValueError(f"output {name!r} is missing")
    fits = len(want) == array.ndim and all(
        size in (None, got) for size, got in zip(want, array.shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        shape = ["any" if size is None else size for size in want]
        raise ValueError(
            f"output {name!r} must be {np.dtype(dtype)} {shape}, "
            f"got {array.dtype} {list(array.shape)}"
        )
    return array


def _json(array: Any, kind: type, what: str) -> Any:
    found = json.loads(bytes(array[0]))
    if not isinstance(found, kind):
        raise ValueError(f"its JSON must be {what}, got {str(found)[:40]}")
    return found


def decoded(data: bytes) -> Image.Image:
    """Return an image file, or its base64 text, as a PIL image."""
    with suppress(binascii.Error):  # not base64: already a file
        data = base64.b64decode(data, validate=True)
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")
