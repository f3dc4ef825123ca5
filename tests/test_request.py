"""Requests are checked at the edge, and errors say the value and what is allowed."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flowturbo import contract
from flowturbo.errors import RequestError
from flowturbo.latents import noise
from flowturbo.pipeline import Pipeline
from flowturbo.presets import built_in
from flowturbo.request import default_guidance_scale, parse_request
from flowturbo.settings import Settings

pytestmark = pytest.mark.unit

PIPELINE = Pipeline((4, 16, 16), 36, tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"), 64, True, True)
SETTINGS = Settings(max_images=8)


def text(value: str | bytes) -> np.ndarray:
    return np.array([value if isinstance(value, bytes) else value.encode()], dtype=object)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def parse(outputs: tuple[str, ...] = ("image",), **tensors: np.ndarray) -> Any:
    return parse_request(tensors, outputs, PIPELINE, SETTINGS)


def test_defaults_are_the_settings() -> None:
    request = parse(label=ints(3, 4))
    assert request.schedule == built_in()["fast"]
    assert request.guidance.scale == SETTINGS.default_guidance_scale
    assert len(set(request.seeds.tolist())) == 2
    np.testing.assert_array_equal(request.start(PIPELINE), noise(request.seeds, (4, 16, 16)))


def test_class_names() -> None:
    assert parse(class_name=np.array([b"B", b"9"], object)).labels.tolist() == [1, 35]


def test_noise_depends_on_the_seed_alone() -> None:
    together = noise(ints(7, 8, 2**63 - 1), (4, 16, 16))
    np.testing.assert_array_equal(noise(ints(8), (4, 16, 16))[0], together[1])
    assert together.std() == pytest.approx(1, abs=0.05)
    assert abs(np.corrcoef(together.reshape(3, -1)) - np.eye(3)).max() < 0.1


BAD: list[tuple[str, dict[str, np.ndarray]]] = [
    ("label must be 0 to 35, got 36", {"label": ints(36)}),
    ("label must be 0 to 35, got -1", {"label": ints(3, -1)}),
    ("1 to 8 images, got 0", {"label": ints()}),
    ("1 to 8 images, got 9", {"label": ints(*range(9))}),
    ("got neither", {"seed": ints(1)}),
    ("got both", {"label": ints(1), "class_name": text("A")}),
    ("'AB' is unknown, known are A, B", {"class_name": text("AB")}),
    ("UTF-8", {"class_name": text(b"\xff")}),
    ("label must be INT64, got float32", {"label": floats(1)}),
    (r"label must have shape \[n\], got \[1, 1\]", {"label": ints(1)[None]}),
    ("0 steps", {"label": ints(1), "schedule": text("H0")}),
    ("unknown step 'X'", {"label": ints(1), "schedule": text("H1P5R3X")}),
    ("guidance_scale must be .* got nan", {"label": ints(1), "guidance_scale": floats(np.nan)}),
    ("guidance_interval", {"label": ints(1), "guidance_interval": floats(0.5, 0.1)}),
    (r"shape \[2\], got \[3\]", {"label": ints(1), "guidance_interval": floats(0, 0, 1)}),
    ("one entry an image, 2 here, got 1", {"label": ints(1, 2), "seed": ints(1)}),
    ("seed must be 0 to", {"label": ints(1), "seed": ints(-5)}),
    (
        "either seed or initial_noise",
        {"label": ints(1), "seed": ints(1), "initial_noise": np.zeros((1, 4, 16, 16), np.float32)},
    ),
    (
        r"shape \[n, 4, 16, 16\], got \[1, 4, 8, 8\]",
        {"label": ints(1), "initial_noise": np.zeros((1, 4, 8, 8), np.float32)},
    ),
    (
        "finite",
        {"label": ints(1), "initial_noise": np.full((1, 4, 16, 16), np.nan, np.float32)},
    ),
    (
        "raw, png, jpeg, webp, png_base64, .*, got 'gif'",
        {"label": ints(1), "output_format": text("gif")},
    ),
    ("unknown input 'lable'", {"lable": ints(1)}),
]


@pytest.mark.parametrize(("said", "tensors"), BAD)
def test_refuses(said: str, tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(RequestError, match=said):
        parse(**tensors)


def test_refuses_what_the_server_lacks() -> None:
    latents_only = Pipeline((4, 16, 16), 36, (), 64, False, False)
    label = {"label": ints(1)}
    with pytest.raises(RequestError, match="no vae_decoder"):
        parse_request({**label, "schedule": text("H2")}, ["image"], latents_only, SETTINGS)
    with pytest.raises(RequestError, match="no velocity_refiner"):
        parse_request({**label, "schedule": text("H1R2")}, ["latent"], latents_only, SETTINGS)
    with pytest.raises(RequestError, match="have no names"):
        parse_request({"class_name": text("A")}, ["latent"], latents_only, SETTINGS)


def test_encoded_image_needs_a_format() -> None:
    with pytest.raises(RequestError, match="output_format png"):
        parse(("encoded_image",), label=ints(1))
    assert parse(("encoded_image",), label=ints(1), output_format=text("webp")).needs_decoder


def test_no_outputs_named_means_what_can_be_given() -> None:
    everything = tuple(spec.name for spec in contract.REQUEST_OUTPUTS)
    raw = parse(everything, label=ints(1))
    assert raw.outputs == ("image", "latent", "seed", "class_name")
    png = parse(everything, label=ints(1), output_format=text("png"))
    assert png.outputs == everything
    latents_only = Pipeline((4, 16, 16), 36, (), 64, True, False)
    request = parse_request({"label": ints(1)}, everything, latents_only, SETTINGS)
    assert request.outputs == ("latent", "seed", "class_name")


def test_outputs_keep_the_order_asked_for() -> None:
    assert parse(("seed", "image", "latent", "seed"), label=ints(1)).outputs == (
        *("seed", "image", "latent"),
    )


def test_networks_without_a_null_class_are_unguided() -> None:
    alone = replace(PIPELINE, null_class=False)

    def guidance(**tensors: np.ndarray) -> Any:
        label = {"label": ints(35)}
        return parse_request(label | tensors, ["latent"], alone, SETTINGS).guidance

    assert guidance().scale == 1 == default_guidance_scale(alone, SETTINGS)
    assert guidance(guidance_scale=floats(1)).scale == 1
    for scale in (0, 1.5, 3):
        with pytest.raises(RequestError, match=f"trained with classes alone.* 1, got {scale}"):
            guidance(guidance_scale=floats(scale))
