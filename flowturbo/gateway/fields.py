"""The fields of a request: OpenAI's, and this service's own."""

import base64
import binascii
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from flowturbo.latents import MAX_SEED

MAX_IMAGES = 64
MAX_PARTIAL = 3
PRESETS = {"low": "fast", "medium": "balanced", "high": "best"}
_SIZE = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
_DATA_URL = re.compile(r"data:image/(png|jpeg|webp);base64,")

Text = Annotated[str, StringConstraints(min_length=1, max_length=32_000)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Number = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class Generation(BaseModel):
    """The fields of /v1/images/generations."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Text | None = Field(
        None, description="What to show. For a model of classes: the name of a class."
    )
    model: Name | None = Field(None, description="A pipeline of the service (/v1/models).")
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = Field(
        None, description="How many images. Default: 1."
    )
    size: str | None = Field(None, pattern=_SIZE, description="WIDTHxHEIGHT in pixels, or auto.")
    quality: Literal["auto", "low", "medium", "high"] | None = Field(
        None, description="The preset fast, balanced or best."
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="url: kept for a limited time. Default: b64_json."
    )
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(
        None, ge=1, le=100, description="Quality of JPEG and WebP files."
    )
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(
        None, ge=0, le=MAX_PARTIAL, description="Images on the way, at most; with stream."
    )
    user: Annotated[str, StringConstraints(max_length=200)] | None = Field(
        None, description="Not used."
    )
    seed: Seed | Annotated[list[Seed], Field(min_length=1, max_length=MAX_IMAGES)] | None = Field(
        None, description="A number, image i has seed + i; or a list of n numbers."
    )
    schedule: Name | None = Field(None, description="Such as H1P5R3, or a preset.")
    guidance_scale: Number | None = None
    negative_prompt: Text | None = None
    label: Annotated[int, Field(ge=0)] | Name | None = Field(
        None, description="A class by id (a number) or name, in place of the prompt."
    )
    strip_metadata: bool | None = Field(None, description="Leave out of the file how it was made.")

    @model_validator(mode="after")
    def _together(self) -> "Generation":
        if (self.prompt is None) == (self.label is None):
            raise ValueError(
                f"give either prompt or label, got {'neither' if self.prompt is None else 'both'}"
            )
        if self.quality not in (None, "auto") and self.schedule is not None:
            raise ValueError(f"give either quality or schedule, got {self.quality!r} and "
                             f"{self.schedule!r}")  # fmt: skip
        if self.output_compression is not None and self.form == "png":
            raise ValueError("output_compression is for jpeg and webp, got output_format png")
        if self.partial_images and not self.stream:
            raise ValueError("partial_images needs stream: true")
        if self.stream and self.response_format == "url":
            raise ValueError("a stream has its images in its events: response_format b64_json")
        if isinstance(self.seed, list) and len(self.seed) != self.count:
            raise ValueError(f"seed must be one number or n of them, n is {self.count}, got "
                             f"{len(self.seed)}")  # fmt: skip
        if isinstance(self.seed, int) and self.seed + self.count - 1 > MAX_SEED:
            raise ValueError(f"seed + n - 1 must be at most {MAX_SEED}, got {self.seed}")
        return self

    @property
    def count(self) -> int:
        """How many images."""
        return 1 if self.n is None else self.n

    @property
    def form(self) -> str:
        """The format of the files."""
        return self.output_format or "png"

    @property
    def wanted_schedule(self) -> str | None:
        """The schedule or preset; None for the model's default."""
        return self.schedule or PRESETS.get(self.quality or "")

    @property
    def wanted_size(self) -> str | None:
        """WIDTHxHEIGHT, None for the model's default."""
        return None if self.size in (None, "auto") else self.size

    def seeds(self) -> list[int] | None:
        """One per image; None if the service draws them."""
        if self.seed is None or isinstance(self.seed, list):
            return self.seed
        return [self.seed + k for k in range(self.count)]


class Reference(BaseModel):
    """An image as OpenAI's JSON has it."""

    model_config = ConfigDict(extra="forbid")

    image_url: str


def _file(value: Any) -> Any:
    """An image in a JSON body as the bytes of its file."""
    if isinstance(value, dict):
        value = Reference.model_validate(value).image_url
    if not isinstance(value, str):
        return value
    text = _DATA_URL.sub("", value, count=1)
    if text.startswith(("http:", "https:", "data:")):
        raise ValueError("an image must be base64 text or a data URL of a PNG, JPEG or WebP file; "
                         "other addresses are not fetched")  # fmt: skip
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("an image must be base64 text or a data URL") from None


class Edit(Generation):
    """The fields of /v1/images/edits."""

    image: bytes = Field(description="A PNG, JPEG or WebP file; in JSON as base64 or a data URL.")
    mask: bytes | None = Field(
        None, description="A PNG or WebP file, transparent where to repaint."
    )
    strength: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Share of the noise: little keeps the image."
    )
    feather: Annotated[int, Field(ge=0, le=256)] | None = Field(
        None, description="Pixels inside the mask over which the new image fades in."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_image(cls, given: Any) -> Any:
        """OpenAI's `images` and `image` may be lists; here there is one."""
        if not isinstance(given, dict):
            return given
        if "images" in given and "image" in given:
            raise ValueError("give either image or images, got both")
        found = {**given, "image": given["images"]} if "images" in given else dict(given)
        found.pop("images", None)
        if isinstance(found.get("image"), list):
            if len(found["image"]) != 1:
                raise ValueError(f"give one image, got {len(found['image'])}")
            found["image"] = found["image"][0]
        return found

    @field_validator("image", "mask", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return _file(value)

    @model_validator(mode="after")
    def _feathered(self) -> "Edit":
        if self.feather is not None and self.mask is None:
            raise ValueError("feather needs a mask")
        return self
