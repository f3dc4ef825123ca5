"""The parts of the gateway that need no service."""

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from pydantic import ValidationError

from flowturbo.errors import RequestError
from flowturbo.gateway import heads
from flowturbo.gateway.answers import Refused, refusal_of_fields
from flowturbo.gateway.edge import Bounds, Edge
from flowturbo.gateway.fields import Edit, Generation
from flowturbo.gateway.filters import Filter
from flowturbo.gateway.kept import Kept
from flowturbo.gateway.keys import Bucket, KeyFileError, Keys, main
from flowturbo.gateway.masks import white_where_transparent
from flowturbo.gateway.metrics import Metrics
from flowturbo.gateway.service import evaluations

pytestmark = pytest.mark.unit


def png(array: np.ndarray) -> bytes:
    found = io.BytesIO()
    Image.fromarray(array).save(found, "png")
    return found.getvalue()


GREY = png(np.full((4, 6, 3), 128, np.uint8))


@pytest.mark.parametrize(
    ("given", "told", "param"),
    [
        ({}, "give either prompt or label, got neither", None),
        ({"prompt": "a", "label": 1}, "give either prompt or label, got both", None),
        ({"prompt": "a", "n": 0}, "n: Input should be greater than or equal to 1, got 0", "n"),
        ({"prompt": "a", "n": True}, "n: Input should be a valid integer, got True", "n"),
        ({"prompt": "a", "style": "vivid"}, "unknown field 'style', known are prompt", "style"),
        ({"prompt": "a", "quality": "low", "schedule": "H8"}, "either quality or schedule", None),
        ({"prompt": "a", "output_compression": 50}, "got output_format png", None),
        ({"prompt": "a", "partial_images": 2}, "partial_images needs stream: true", None),
        ({"prompt": "a", "seed": [1, 2]}, "n is 1, got 2", None),
        ({"prompt": "a", "size": "64"}, "size: WIDTHxHEIGHT in pixels, or auto, got '64'", "size"),
        ({"prompt": "a", "seed": [1, -2], "n": 2}, "than or equal to 0, got -2", "seed"),
        ({"prompt": "a", "seed": -1}, "seed: Input should be greater than or equal to 0", "seed"),
        ({"label": -1}, "label: Input should be greater than or equal to 0, got -1", "label"),
        ({"prompt": "a", "seed": "x"}, "seed: A number, image i has", "seed"),
        ({"label": 1.5}, "label: A class by id (a number) or name", "label"),
        ({"prompt": "a", "background": "transparent"}, "background: Input should be", "background"),
        ({"prompt": "a", "stream": True, "response_format": "url"}, "b64_json", None),
    ],
)
def test_fields_that_are_refused(given: dict[str, Any], told: str, param: str | None) -> None:
    with pytest.raises(ValidationError) as caught:
        Generation.model_validate(given, strict=True)
    refused = refusal_of_fields(caught.value, Generation)
    assert told in refused.message
    assert (refused.status, refused.param) == (400, param)


def test_seeds_count_up_and_presets_have_names() -> None:
    asked = Generation.model_validate({"prompt": "a", "n": 3, "seed": 5, "quality": "high"})
    assert asked.seeds() == [5, 6, 7]
    assert asked.wanted_schedule == "best"
    assert Generation.model_validate({"prompt": "a"}).seeds() is None


def test_images_in_json() -> None:
    text = base64.b64encode(GREY).decode()
    for given in (
        {"image": text},
        {"image": f"data:image/png;base64,{text}"},
        {"images": [{"image_url": f"data:image/png;base64,{text}"}]},
    ):
        assert Edit.model_validate({"prompt": "a", **given}, strict=True).image == GREY
    for given in ({"image": "http://example.com/a.png"}, {"image": [text, text]}, {"image": "?"}):
        with pytest.raises(ValidationError):
            Edit.model_validate({"prompt": "a", **given}, strict=True)


def test_masks_are_white_where_they_were_transparent() -> None:
    alpha = np.full((2, 3, 4), 255, np.uint8)
    alpha[0, 1, 3] = 0
    assert white_where_transparent(png(alpha)).tolist() == [[0, 255, 0], [0, 0, 0]]
    with pytest.raises(Refused, match="opaque everywhere"):
        white_where_transparent(GREY)
    with pytest.raises(RequestError, match="mask must be a whole file"):
        white_where_transparent(b"no image")


def test_evaluations_of_schedules() -> None:
    """Heun's step has two; the refiner's steps begin with the predictor's last."""
    assert [evaluations(text) for text in ("H8", "H1P5R3", "L4", "A10@3")] == [16, 7, 4, 10]


def test_kept_files_end_by_time_and_by_space() -> None:
    now = [0.0]
    kept = Kept(10, 60, lambda: now[0])
    (first,) = kept.add([b"12345"], "png")
    (second,) = kept.add([b"12345"], "png")
    assert kept.get(first) and kept.get(second) and kept.bytes == 10
    (third,) = kept.add([b"123"], "jpeg")
    assert kept.get(first) is None and kept.bytes == 8
    found = kept.get(third)
    assert found and found.media_type == "image/jpeg"
    now[0] = 61
    assert kept.get(second) is None and kept.bytes == 0
    pair = kept.add([b"12345", b"6789"], "png")
    assert [kept.get(name).data for name in pair] == [b"12345", b"6789"]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="images of 11 bytes, at most 10"):  # one would end another
        kept.add([b"123456", b"78901"], "png")
    assert kept.bytes == 9


def test_bucket() -> None:
    now = [0.0]
    bucket = Bucket(60, lambda: now[0])
    assert bucket.take(60) == 0
    assert bucket.take(3) == 3.0
    now[0] = 3.0
    assert bucket.take(3) == 0
    bucket.give_back(2)
    assert bucket.take(2) == 0


def test_keys_have_digests_and_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, now = tmp_path / "keys.json", [0.0]
    options = ["--keys", str(path)]
    assert main(["add", "alice", *options, "--images-per-minute", "6", "--concurrent", "1"]) == 0
    text = capsys.readouterr().out.strip()
    assert text not in path.read_text() and path.stat().st_mode & 0o077 == 0
    keys = Keys(path, lambda: now[0])
    key = keys.caller(f"Bearer {text}")
    assert key and key.name == "alice"
    for wrong in (None, "Bearer other", f"Basic {text}", f"Bearer {text}x"):
        with pytest.raises(Refused) as refused:
            keys.caller(wrong)
        assert refused.value.status == 401
    with keys.place(key):
        with pytest.raises(Refused, match="1 requests in flight") as refused:
            with keys.place(key):
                pass
        assert refused.value.status == 429
    with pytest.raises(Refused, match="no such schedule"), keys.images(key, 6):
        raise Refused(400, "no such schedule")  # its images are given back
    with pytest.raises(Refused, match="the service failed"), keys.images(key, 6):
        raise Refused(502, "the service failed")  # they may have been computed
    with pytest.raises(Refused, match="6 images per minute") as refused:
        with keys.images(key, 2):
            pass
    assert refused.value.headers == {"Retry-After": "20"}
    with pytest.raises(Refused, match="asks for 7") as refused:
        with keys.images(key, 7):
            pass
    assert refused.value.status == 400
    now[0] = 20.0
    with keys.images(key, 2):
        pass
    assert main(["remove", "alice", *options]) == 0
    with pytest.raises(Refused, match="unknown"):
        keys.caller(f"Bearer {text}")
    assert main(["remove", "alice", *options]) == 2


def test_a_file_of_keys_that_breaks_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with pytest.raises(OSError):
        Keys(path)
    path.write_text("{}")
    with pytest.raises(KeyFileError):
        Keys(path)
    path.write_text('{"keys": []}')
    keys = Keys(path)
    path.write_text("broken")
    with pytest.raises(Refused):
        keys.caller("Bearer x")


def test_a_filter_refuses_requests_and_images() -> None:
    class Hook:
        async def before(self, asked: Generation) -> str | None:
            return "no cats" if "cat" in str(asked.prompt) else None

        async def after(self, asked: Generation, image: bytes) -> str | None:
            return "too dark" if image == b"dark" else None

    chosen = Filter(Hook())
    asked = Generation(prompt="a cat")
    with pytest.raises(Refused, match="no cats") as refused:
        asyncio.run(chosen.before(asked))
    assert refused.value.body["error"]["code"] == "content_policy_violation"
    asyncio.run(chosen.before(Generation(prompt="a dog")))
    asyncio.run(chosen.after(asked, b"light"))
    with pytest.raises(Refused, match="too dark"):
        asyncio.run(chosen.after(asked, b"dark"))
    with pytest.raises(ValueError, match="MODULE:FACTORY"):
        Filter.load("nothing_here:make")
    with pytest.raises(ValueError, match="neither"):
        Filter(object())


class Caller:
    """One HTTP request to an ASGI application, without a network."""

    def __init__(self, *parts: bytes, path: str = "/v1/x", method: str = "POST", **headers: str):
        named = {"host": "localhost:8080", **headers}
        raw = [(n.replace("_", "-").encode(), v.encode()) for n, v in named.items()]
        self.scope = {"type": "http", "path": path, "method": method, "headers": raw}
        self.parts, self.sent = list(parts), []  # type: ignore[var-annotated]

    async def receive(self) -> dict[str, Any]:
        if not self.parts:
            await asyncio.sleep(3600)
        part = self.parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(self.parts)}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def ask(self, app: Any) -> tuple[int, Any]:
        asyncio.run(app(self.scope, self.receive, self.send))
        return self.sent[0]["status"], json.loads(self.sent[1]["body"])


BOUNDS = Bounds(body_bytes=2 << 20, body_s=5.0, requests=2, hosts=None)


def edge(**bounds: Any) -> Edge:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(len(body)).encode()})

    return Edge(app, replace(BOUNDS, **bounds), Metrics(lambda: 0))


def test_the_edge_bounds_bodies() -> None:
    assert Caller(b"abc", b"de").ask(edge()) == (200, 5)
    status, told = Caller(b"x" * (2 << 20), b"y").ask(edge())
    assert (status, told["error"]["message"]) == (413, "the body must have at most 2 MB")
    status, _ = Caller(b"x", content_length=str(3 << 20)).ask(edge())
    assert status == 413
    status, told = Caller().ask(edge(body_s=0.01))
    assert (status, told["error"]["type"]) == (408, "invalid_request_error")


def test_the_edge_refuses_other_origins_hosts_and_too_many() -> None:
    assert Caller(b"", origin="http://localhost:8080").ask(edge())[0] == 200
    for other in ("http://evil.example", "http://[", "null"):
        assert Caller(b"", origin=other).ask(edge())[0] == 403
    public = edge(public_host="images.example")
    assert Caller(b"", origin="https://images.example").ask(public)[0] == 200
    local = frozenset({"localhost"})
    assert Caller(b"").ask(edge(hosts=local))[0] == 200
    assert Caller(b"", host="evil.example").ask(edge(hosts=local))[0] == 403
    assert Caller(b"", host="[").ask(edge(hosts=local))[0] == 403
    status, told = Caller(b"").ask(edge(requests=0))
    assert (status, told["error"]["code"]) == (503, "busy")


def test_long_answers_are_sent_in_pieces() -> None:
    """So a request counts against the limit until its answer has been taken."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ab" * 100_000})

    caller = Caller(b"")
    asyncio.run(Edge(app, BOUNDS, Metrics(lambda: 0))(caller.scope, caller.receive, caller.send))
    bodies = caller.sent[1:]
    assert b"".join(each["body"] for each in bodies) == b"ab" * 100_000
    assert max(len(each["body"]) for each in bodies) <= 64 << 10
    assert [each.get("more_body", False) for each in bodies] == [True] * (len(bodies) - 1) + [False]


def test_every_answer_has_an_id() -> None:
    caller = Caller(b"")
    caller.ask(edge())
    names = dict(caller.sent[0]["headers"])
    assert len(names[b"x-request-id"]) == 32 and b"content-security-policy" in names


@pytest.fixture
def endless() -> Iterator[tuple[int, threading.Event]]:
    """A server whose answer has no end: its port, and whether the answer was given up."""
    given_up = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        leaving = asyncio.ensure_future(receive())
        while not leaving.done():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)
        given_up.set()

    config = uvicorn.Config(app, http=heads.BoundedHead, lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    with heads.bounded_listener(("127.0.0.1", 0), socket.AF_INET, unread_s=1.0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield listener.getsockname()[1], given_up
        server.should_exit = server.force_exit = True
        thread.join()


def test_a_caller_that_does_not_read_is_cut_off(endless: tuple[int, threading.Event]) -> None:
    """And one that reads slowly is not."""
    port, given_up = endless
    with socket.create_connection(("127.0.0.1", port), timeout=20) as caller:
        caller.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        until = time.monotonic() + 4.0
        while time.monotonic() < until:
            assert caller.recv(1 << 20)
            time.sleep(0.2)
        assert not given_up.is_set()
        assert given_up.wait(20)
