"""Requests with an image on a real server, over gRPC and HTTP."""

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from flowturbo_client import FlowTurboClient, InvalidRequestError
from PIL import Image
from support import post

from flowturbo.serving.tritonserver import ServerAddress

TOLERANCE = 0.05  # of the largest value: bf16's rounding in other batches
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
HALF = np.zeros((64, 64), np.uint8)
HALF[:, 32:] = 255


@pytest.fixture
def client(glyphs_server: ServerAddress) -> Iterator[FlowTurboClient]:
    with FlowTurboClient(glyphs_server.grpc) as connected:
        yield connected


@pytest.fixture
def image(client: FlowTurboClient) -> np.ndarray:
    made = client.generate("R", seeds=7, schedule="H8")
    assert made.images is not None
    return np.asarray(made.images[0])


def file(image: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def near(one: Any, other: Any) -> bool:
    return bool(np.abs(one - other).max() <= TOLERANCE * np.abs(other).max())


def test_strength_one_is_plain_generation(client: FlowTurboClient, image: np.ndarray) -> None:
    both = {"seeds": 3, "outputs": ("latent",), "schedule": "H1P5R3"}
    edited = client.edit(image, "K", strength=1.0, **both)
    assert edited.start_time == 0
    assert near(edited.latents, client.generate("K", **both).latents)


def test_strength_tells_how_much_is_kept(client: FlowTurboClient, image: np.ndarray) -> None:
    apart = []
    for strength in (0.1, 0.4, 0.9):
        made = client.edit(image, "K", strength=strength, seeds=3)
        assert made.start_time == pytest.approx(made.settings["edit"]["start_time"])
        assert made.images is not None
        apart.append(np.abs(made.images[0].astype(int) - image).mean())
    assert apart == sorted(apart)


def test_a_file_is_what_its_pixels_are(client: FlowTurboClient, image: np.ndarray) -> None:
    given = {"strength": 0.5, "seeds": 3, "outputs": ("latent",)}
    assert near(
        client.edit(file(image), "K", **given).latents, client.edit(image, "K", **given).latents
    )


@pytest.mark.parametrize("schedule", ["H1P5R3", "fast", "A6", "M5"])
def test_inpainting_keeps_other_pixels(
    client: FlowTurboClient, image: np.ndarray, schedule: str
) -> None:
    made = client.inpaint(image, HALF, "R", seeds=4, schedule=schedule)
    assert made.images is not None
    np.testing.assert_array_equal(made.images[0][:, :32], image[:, :32])
    assert (made.images[0][:, 32:] != image[:, 32:]).mean() > 0.5


def test_noise_of_an_image_leads_back_to_it(client: FlowTurboClient, image: np.ndarray) -> None:
    found = client.invert(image, "R", schedule="M17@2")
    assert found.images is None and found.latents is not None and found.start_time == 1
    assert 0.5 < found.latents.std() < 1.2
    back = client.generate("R", initial_noise=found.latents, schedule="M17@2", guidance_scale=1.0)
    assert back.images is not None
    assert np.abs(back.images[0].astype(int) - image).mean() < 8


def test_edits_share_batches_with_others(client: FlowTurboClient, image: np.ndarray) -> None:
    """And each answer is the one that it gets alone."""
    shared: dict[str, Any] = {"seeds": 5, "outputs": ("latent",), "schedule": "H1P5R3"}

    def work(kind: int) -> np.ndarray:
        if kind % 3 == 0:
            made = client.generate("R", **shared)
        elif kind % 3 == 1:
            made = client.inpaint(image, HALF, "R", **shared)
        else:
            made = client.edit(image, "R", strength=0.6, **shared)
        assert made.latents is not None
        return np.asarray(made.latents)

    alone = [work(kind) for kind in range(3)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(work, range(24)))
    assert all(near(of, alone[k % 3]) for k, of in enumerate(together))


def test_interpolation_starts_and_ends_at_its_seeds(client: FlowTurboClient) -> None:
    made = client.interpolate(3, 4, 4, "R", outputs=("latent",), schedule="H1P5R3")
    ends = client.generate(["R", "R"], [3, 4], outputs=("latent",), schedule="H1P5R3")
    assert made.latents is not None and ends.latents is not None
    assert near(made.latents[[0, -1]], ends.latents)


def test_json_carries_base64(glyphs_server: ServerAddress, image: np.ndarray) -> None:
    given = {
        "inputs": [
            {"name": "class_name", "datatype": "BYTES", "shape": [1], "data": ["K"]},
            {
                "name": "image_file",
                "datatype": "BYTES",
                "shape": [1],
                "data": [base64.b64encode(file(image)).decode()],
            },
            {"name": "strength", "datatype": "FP32", "shape": [1], "data": [0.5]},
        ],
        "outputs": [{"name": "start_time"}],
    }
    status, answer = post(glyphs_server, "infer", given)
    assert status == 200
    assert 0 < answer["outputs"][0]["data"][0] < 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"image": b"no image"}, "image_file must be a whole file of"),
        ({"image": file(NOISE)[:2000]}, "image_file .*cannot be read"),
        ({"mask": np.zeros_like(HALF)}, "black everywhere"),
        ({"mask": HALF[:32]}, "mask must have the size of its image"),
        ({"strength": 0.0}, "strength must be 0.001 to 1"),
        ({"strength": float("nan")}, "strength must be 0.001 to 1"),
        ({"invert": True, "outputs": ("image",)}, "ask for latent"),
        ({"invert": True, "outputs": ("latent",), "schedule": "H1P5R3"}, "leave R out"),
        ({"image": np.zeros((2, 64, 64, 3), np.uint8)}, "one per image"),
    ],
)
def test_refused(
    client: FlowTurboClient, image: np.ndarray, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        client.generate("K", **{"image": image, **given})
