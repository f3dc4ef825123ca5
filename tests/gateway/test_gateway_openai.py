"""The gateway before a real service, asked by OpenAI's own package."""

import asyncio
import base64
import contextlib
import io
import itertools
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
from flowturbo_client import FlowTurboClient
from PIL import Image
from support import ROOT

from flowturbo.serving.tritonserver import ServerAddress

PROMPT = "a red circle"


def pixels(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


def of(image: openai.types.Image) -> np.ndarray:
    assert image.b64_json
    return pixels(base64.b64decode(image.b64_json))


def png(array: np.ndarray) -> bytes:
    found = io.BytesIO()
    Image.fromarray(array).save(found, "png")
    return found.getvalue()


def test_images_are_the_services_own(api: openai.OpenAI, glyphs_server: ServerAddress) -> None:
    answer = api.images.generate(
        prompt=PROMPT, model="scenes", n=2, extra_body={"seed": 7, "schedule": "H1P5R3"}
    )
    assert answer.data and [each.seed for each in answer.data] == [7, 8]  # type: ignore[attr-defined]
    with FlowTurboClient(glyphs_server.grpc) as client:
        known = client.generate(
            prompts=[PROMPT] * 2, seeds=[7, 8], schedule="H1P5R3", pipeline="scenes"
        )
    assert known.images is not None
    for image, expected in zip(answer.data, known.images, strict=True):
        assert np.abs(of(image) - expected).max() <= 2  # other batches round differently
    made = answer.flowturbo  # type: ignore[attr-defined]
    assert (made["schedule"], made["evaluations"], made["model"]) == ("H1P5R3", 7, "scenes")
    assert answer.size == "128x128" or answer.size


@pytest.mark.parametrize(
    ("quality", "preset"), [("low", "fast"), ("medium", "balanced"), ("high", "best")]
)
def test_qualities_are_presets(
    api: openai.OpenAI, glyphs_server: ServerAddress, quality: str, preset: str
) -> None:
    with FlowTurboClient(glyphs_server.grpc) as client:
        presets = {each["name"]: each["presets"] for each in client.pipelines()}["glyphs"]
    answer = api.images.generate(prompt="A", model="glyphs", quality=quality)  # type: ignore[call-overload]
    assert answer.flowturbo["schedule"] == presets[preset].split(" or ")[0]


def test_formats_and_addresses(api: openai.OpenAI, gateway: str) -> None:
    sizes = {}
    for form, compression in (("jpeg", 20), ("jpeg", 95), ("webp", 20)):
        answer = api.images.generate(
            prompt="A",
            model="glyphs",
            output_format=form,  # type: ignore[arg-type]
            output_compression=compression,
            response_format="url",
            extra_body={"seed": 1},
        )
        assert answer.data and answer.data[0].url and answer.data[0].url.startswith(gateway)
        with urllib.request.urlopen(answer.data[0].url) as got:
            assert got.headers["content-type"] == f"image/{form}"
            sizes[form, compression] = len(got.read())
    assert sizes["jpeg", 20] < sizes["jpeg", 95]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{gateway}/images/{'x' * 43}.png")


def test_partial_images_come_nearer_and_the_last_is_the_image(api: openai.OpenAI) -> None:
    asked = {"prompt": PROMPT, "model": "scenes"}
    extra = {"seed": 3, "schedule": "A8"}
    plain = api.images.generate(**asked, extra_body=extra)  # type: ignore[call-overload]
    events = list(
        api.images.generate(**asked, stream=True, partial_images=3, extra_body=extra)  # type: ignore[call-overload]
    )
    *partial, last = [event.type for event in events]
    assert last == "image_generation.completed"
    # A busy service may drop some on the way.
    assert set(partial) == {"image_generation.partial_image"} and len(partial) <= 3
    assert [event.partial_image_index for event in events[:-1]] == list(range(len(partial)))
    final = of(plain.data[0])
    off = [np.abs(pixels(base64.b64decode(each.b64_json)) - final).mean() for each in events]
    assert all(one > other for one, other in itertools.pairwise(off))
    assert off[-1] < 0.1  # its batches may be others
    assert events[-1].seed == 3


def test_streams_without_partial_images_and_of_several_images(api: openai.OpenAI) -> None:
    events = list(
        api.images.generate(
            prompt="B", model="glyphs", n=2, stream=True, extra_body={"seed": [1, 9]}
        )
    )
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert [(event.image_index, event.seed) for event in events] == [(0, 1), (1, 9)]  # type: ignore[union-attr]


def test_edits(api: openai.OpenAI) -> None:
    image = of(api.images.generate(prompt="A", model="glyphs", extra_body={"seed": 1}).data[0])  # type: ignore[index]
    file = png(image.astype(np.uint8))
    changed = api.images.edit(
        image=file, prompt="B", model="glyphs", extra_body={"strength": 0.3, "seed": 4}
    )
    assert changed.data and 0 < np.abs(of(changed.data[0]) - image).mean() < 60
    mask = np.full((*image.shape[:2], 4), 255, np.uint8)
    mask[:, image.shape[1] // 2 :, 3] = 0
    filled = api.images.edit(
        image=file, mask=png(mask), prompt="A", model="glyphs", extra_body={"seed": 4}
    )
    assert filled.data
    repainted = of(filled.data[0]) != image
    assert repainted[:, image.shape[1] // 2 :].any()
    assert not repainted[:, : image.shape[1] // 2].any()
    events = list(
        api.images.edit(
            image=[("a.png", file)],
            mask=png(mask),
            prompt="A",
            model="glyphs",
            stream=True,
            partial_images=2,
            extra_body={"seed": 4},
        )
    )
    assert [event.type for event in events][-1] == "image_edit.completed"
    assert all(event.type == "image_edit.partial_image" for event in events[:-1])


def test_asynchronous(gateway: str) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{gateway}/v1", api_key="none") as api:
            one, stream = await asyncio.gather(
                api.images.generate(prompt=PROMPT, model="gpt-image-1"),
                api.images.generate(
                    prompt=PROMPT, model="gpt-image-1", stream=True, partial_images=1
                ),
            )
            assert one.flowturbo["model"] == "scenes"  # type: ignore[attr-defined]
            return [event.type async for event in stream]

    assert asyncio.run(ask())[-1] == "image_generation.completed"


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"prompt": "no class", "model": "glyphs"}, openai.BadRequestError, "unknown, known are"),
        ({"prompt": "A", "model": "dall-e-3"}, openai.NotFoundError, "known are glyphs"),
        ({"prompt": "A", "style": "vivid"}, openai.BadRequestError, "unknown field 'style'"),
        ({"prompt": "A", "size": "7x7", "model": "glyphs"}, openai.BadRequestError, "64x64"),
        ({"prompt": "A", "extra_body": {"schedule": "Q9"}}, openai.BadRequestError, "unknown step"),
        ({"prompt": "A", "extra_body": {"seed": -1}}, openai.BadRequestError, "seed"),
        (
            {"prompt": "A", "stream": True, "partial_images": 1, "extra_body": {"schedule": "Q9"}},
            openai.BadRequestError,
            "unknown step",
        ),
    ],
)
def test_errors_have_openais_form(
    api: openai.OpenAI, fields: dict, error: type[openai.APIStatusError], told: str
) -> None:
    with pytest.raises(error, match=told) as caught:
        api.images.generate(**fields)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id and len(caught.value.request_id) == 32


def test_models(api: openai.OpenAI) -> None:
    assert {model.id for model in api.models.list()} == {"glyphs", "scenes", "gpt-image-1"}
    assert api.models.retrieve("gpt-image-1").id == "gpt-image-1"
    assert api.models.retrieve("scenes").owned_by == "flowturbo"


def test_a_caller_that_leaves_stops_its_work(
    gateway: str,
    glyphs_server: ServerAddress,
    read_metrics: Callable[[ServerAddress], dict[str, float]],
) -> None:
    """Whether it streams or not."""
    address = urlsplit(gateway)
    cancelled = 'flowturbo_requests_total{outcome="cancelled",pipeline="glyphs"}'

    def count() -> float:
        found = read_metrics(glyphs_server)
        return sum(v for name, v in found.items() if "cancelled" in name and "glyphs" in name)

    for more in ("", ', "stream": true, "partial_images": 3'):
        before = count()
        body = f'{{"prompt": "A", "model": "glyphs", "n": 64, "schedule": "H100"{more}}}'
        with socket.create_connection((address.hostname, address.port)) as caller:
            caller.sendall(
                f"POST /v1/images/generations HTTP/1.1\r\nHost: {address.netloc}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                f"{body}".encode()
            )
            time.sleep(1.0)  # it runs by now; all of it takes many seconds
        until = time.monotonic() + 10
        while count() == before:
            assert time.monotonic() < until, cancelled
            time.sleep(0.05)


def test_health_and_metrics(api: openai.OpenAI, gateway: str) -> None:
    api.images.generate(prompt="A", model="glyphs")
    for path in ("healthz", "readyz"):
        with urllib.request.urlopen(f"{gateway}/{path}") as answer:
            assert answer.status == 200
    with urllib.request.urlopen(f"{gateway}/metrics") as answer:
        text = answer.read().decode()
    assert 'flowturbo_gateway_requests_total{route="/v1/images/generations",status="200"}' in text


def test_the_curl_lines_of_the_docs_run(api: openai.OpenAI, gateway: str, tmp_path: Path) -> None:
    image = api.images.generate(prompt=PROMPT, model="scenes").data[0]  # type: ignore[index]
    array = of(image).astype(np.uint8)
    (tmp_path / "image.png").write_bytes(png(array))
    alpha = np.full((*array.shape[:2], 1), 255, np.uint8)
    alpha[: len(alpha) // 2] = 0
    (tmp_path / "mask.png").write_bytes(png(np.concatenate([array, alpha], 2)))
    text = (ROOT / "docs" / "gateway.md").read_text()
    fences = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for fence in fences for line in fence.replace("\\\n", " ").splitlines()]
    commands = [line for line in lines if line.startswith("curl ")]
    assert len(commands) == 4
    for command in commands:
        at_gateway = command.replace("http://127.0.0.1:8080", gateway)
        done = subprocess.run(
            ["bash", "-c", at_gateway], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert '"b64_json"' in done.stdout and '"error"' not in done.stdout, done.stdout


def test_headers_are_bounded(gateway: str) -> None:
    """A caller whose headers do not end is cut off, and others are served."""
    address = urlsplit(gateway)
    with socket.create_connection((address.hostname, address.port), timeout=20) as caller:
        with contextlib.suppress(ConnectionError):
            caller.sendall(b"GET /healthz HTTP/1.1\r\nX: " + b"y" * (4 << 20))
            assert caller.recv(1) == b""
    with urllib.request.urlopen(f"{gateway}/healthz") as answer:
        assert answer.status == 200
