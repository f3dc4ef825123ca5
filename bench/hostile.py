"""Hostile HTTP requests to the gateway: `python -m bench.hostile`.

Broken HTTP, broken JSON, broken forms, broken images, wrong types, sizes out of all bounds. Half of
them are made here, the others by schemathesis from the gateway's OpenAPI document. Every request
must be answered in time, none with a status of 500 or more, and the gateway must not grow. Writes a
JSON file.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from flowturbo_client import FlowTurboError
from PIL import Image
from tqdm import tqdm

from bench.faults import served
from bench.gateway import running_gateway
from bench.observe import hardware, resident_bytes, write_json
from flowturbo.command import positive, run_command
from flowturbo.errors import FlowTurboError as ServiceError

ANSWERED_S = 20.0  # a request that has no answer by then hangs
CALLERS = 8
GROWTH_MB = 64  # a growth below is no leak: pools fill
# What schemathesis loads first. It otherwise makes the files of forms of bytes, and sometimes stops
# with "Unsupported type: 'Binary'" while it checks them (4.32). `attack` sends files of all kinds.
_HOOKS = """import schemathesis
from hypothesis import strategies

schemathesis.openapi.format("binary", strategies.text())
"""
_SEEN = 200  # bytes of an answer that are looked at
_WARM = 2000  # requests, until memory is measured first
_GENERATIONS, _EDITS = "/v1/images/generations", "/v1/images/edits"
_PATHS = (_GENERATIONS, _EDITS, "/v1/models", "/v1/models/x", "/images/x", "/", "/healthz",
          "/openapi.json", "/../../etc/passwd", "/images/..%2f..%2fetc%2fpasswd", "/%00", "/v1/"
          + "a" * 5000)  # fmt: skip
_NAMES = ("prompt", "model", "n", "size", "quality", "response_format", "output_format", "user",
          "output_compression", "background", "stream", "partial_images", "seed", "schedule",
          "guidance_scale", "negative_prompt", "label", "strip_metadata", "strength", "feather",
          "image", "mask", "images", "__class__", "", "n\0")  # fmt: skip
_VALUES: Sequence[Any] = (
    None, True, False, 0, -1, 1, 65, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, "", "A", "é",
    "\ud800", "\0", "a" * 40_000, "H999", "L99", "H1P5R3" * 200, "@", "1x1", "auto", [], [1],
    "99999x99999", [1] * 65, {}, {"a": 1}, [[[[]]]], "http://127.0.0.1/",
    {"image_url": "file:///etc/passwd"}, "data:image/png;base64,",
)  # fmt: skip


def _image(form: str, size: tuple[int, int] = (64, 64), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(file, form, **options)
    return file.getvalue()


def _bomb() -> bytes:
    """A PNG file of some bytes that says it has 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 6, 0, 0, 0)
    found = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 999)), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(kind + data))
        found += struct.pack(">I", len(data)) + kind + data + check
    return found


_FILES = (b"", b"GIF89a", b"<svg/>", _bomb(), _image("png"), _image("jpeg"), _image("webp"),
          _image("png")[:60], _image("jpeg")[:200], _image("tiff"), _image("gif"), b"\0" * 5000,
          _image("png", (1, 1)), _image("png", (1, 3000)))  # fmt: skip


def _json(chance: random.Random) -> bytes:
    """JSON, or nearly."""
    kind = chance.randrange(8)
    if kind == 0:
        return b"[" * chance.choice((10, 100_000))
    if kind == 1:
        return bytes(chance.randrange(256) for _ in range(chance.randrange(200)))
    if kind == 2:
        return b'{"prompt": "A", "guidance_scale": NaN, "n": 1, "n": 2}'
    count = chance.randrange(1, 6)
    fields = {chance.choice(_NAMES): chance.choice(_VALUES) for _ in range(count)}
    if chance.random() < 0.5:
        fields |= {"prompt": "A", "model": "glyphs"}
    if chance.random() < 0.3:
        fields["image"] = base64.b64encode(chance.choice(_FILES)).decode()
    text = json.dumps(fields).encode()
    return text[: chance.randrange(len(text) + 1)] if kind == 3 else text


def _form(chance: random.Random) -> tuple[bytes, str]:
    """A form, or nearly, and its content type."""
    boundary = chance.choice((b"x", b"-" * 70, b"\xff", b""))
    parts = []
    for _ in range(chance.choice((0, 1, 3, 6, 150))):
        name = chance.choice((*_NAMES, "image[]", "seed[]")).encode(errors="replace")
        end = b""
        content = str(chance.choice(_VALUES)).encode(errors="replace")
        if name.startswith((b"image", b"mask")) or chance.random() < 0.1:
            end = b'; filename="../../%s.png"' % (b"a" * chance.choice((1, 3000)))
            content = chance.choice(_FILES)
        head = b'Content-Disposition: form-data; name="%s"%s\r\n\r\n' % (name, end)
        parts.append(b"--" + boundary + b"\r\n" + head + content + b"\r\n")
    body = b"".join(parts) + b"--" + boundary + b"--\r\n"
    if chance.random() < 0.3:
        body = body[: chance.randrange(len(body))]
    return body, f"multipart/form-data; boundary={boundary.decode('latin-1')}"


def request(chance: random.Random, host: str) -> bytes:
    """The bytes of one request."""
    kind = chance.randrange(10)
    if kind == 0:  # no HTTP
        return bytes(chance.randrange(256) for _ in range(chance.randrange(1, 400))) + b"\r\n\r\n"
    method = chance.choice(
        ("POST",) * 8 + ("GET", "PUT", "DELETE", "TRACE", "HEAD", "OPTIONS", "X")
    )
    path = chance.choice((_GENERATIONS, _EDITS) * 4 + _PATHS)
    body, given = _json(chance), "application/json"
    if kind in (1, 2, 3, 4):
        body, given = _form(chance)
    if kind == 5:
        given = chance.choice(("text/plain", "", "application/json; charset=utf-16", "a/b" * 999))
    length = chance.choice((len(body),) * 12 + (0, -1, 10**12))
    headers = [f"Host: {host}", f"Content-Type: {given}", f"Content-Length: {length}"]
    if chance.random() < 0.1:
        headers.append(chance.choice((
            "Authorization: Bearer " + "k" * 7000, "Origin: http://evil.example",
            "Transfer-Encoding: chunked", "X: " + "y" * 60_000, "Expect: 100-continue",
            "Content-Encoding: gzip", "Range: bytes=0-1,5-", "X-Request-Id: \x01",
            "Origin: http://[", "Origin: null", "Host: [", "X: " + "y" * 300_000,
            "\r\n".join(f"X-{k}: y" for k in range(5000)), "Cookie: " + "a=b; " * 9000,
        )))  # fmt: skip
    head = f"{method} {path} HTTP/1.1\r\n" + "\r\n".join(headers) + "\r\nConnection: close\r\n\r\n"
    return head.encode("latin-1", errors="replace") + body


def ask(where: tuple[str, int], content: bytes) -> str:
    """The status of the answer; "closed" without one, "hangs" if it does not come in time.

    The write side is closed after the request, as by a caller that has no more to say.
    """
    until = time.monotonic() + ANSWERED_S
    answer = b""
    try:
        with socket.create_connection(where, timeout=ANSWERED_S) as caller:
            with contextlib.suppress(ConnectionError):  # refused before it was read
                caller.sendall(content)
                caller.shutdown(socket.SHUT_WR)
            while part := caller.recv(1 << 16):
                answer += part if len(answer) < _SEEN else b""
                caller.settimeout(max(0.01, until - time.monotonic()))
    except TimeoutError:
        return "hangs"
    except OSError:
        pass
    found = re.findall(rb"HTTP/1\.[01] ([2-5]\d{2})", answer)  # 100 announces another one
    return found[0].decode() if found else "closed"


def attack(
    address: str, count: int, seed: int = 0, seen: Callable[[], object] = lambda: None
) -> Counter[str]:
    """Sends `count` requests and returns how they were answered; `seen` is called after each."""
    at = urlsplit(address)
    assert at.hostname and at.port
    where = at.hostname, at.port

    def one(index: int) -> str:
        made = ask(where, request(random.Random(seed + index), at.netloc))
        seen()
        return made

    with ThreadPoolExecutor(CALLERS) as pool:
        return Counter(pool.map(one, range(count)))


def schemathesis(address: str, examples: int) -> dict[str, Any]:
    """Runs schemathesis with so many examples per route and phase.

    Raises FlowTurboError with its report if it finds a fault.
    """
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"]
    checks = "not_a_server_error,content_type_conformance,status_code_conformance"
    command += ["--checks", checks, "--max-examples", str(examples), "--no-color"]
    command += ["--request-timeout", str(ANSWERED_S), "--phases", "examples,coverage,fuzzing"]
    with tempfile.TemporaryDirectory() as folder:  # it keeps a database of examples
        hooks = Path(folder) / "hooks.py"
        hooks.write_text(_HOOKS)
        loading = os.environ | {"SCHEMATHESIS_HOOKS": str(hooks)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=loading)
    if done.returncode:
        raise FlowTurboError(f"schemathesis: {done.stdout[-6000:]}{done.stderr[-2000:]}")
    found = re.findall(r"(\d[\d,]*) generated", done.stdout)
    return {"generated": sum(int(each.replace(",", "")) for each in found)}


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description=__doc__)
    add = parser.add_argument
    add("--repository", type=Path, default=Path("model_repository"))
    add("--requests", type=positive, default=50_000)
    add("--examples", type=positive, default=1500, help="of schemathesis per route and phase")
    add("--json", type=Path, default=Path("docs/benchmarks/hostile.json"))
    args = parser.parse_args(argv)
    errors = (FlowTurboError, ServiceError, OSError, ValueError)
    return run_command("hostile", lambda: _run(args), errors)


def _run(args: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(served(args.repository, scratch / "server.log"))
        gateway = stack.enter_context(running_gateway(server.grpc))
        bar = stack.enter_context(tqdm(total=args.requests))
        outcomes = attack(gateway.address, min(_WARM, args.requests), seen=bar.update)
        before = resident_bytes([gateway.pid])
        outcomes += attack(
            gateway.address, max(0, args.requests - _WARM), seed=_WARM, seen=bar.update
        )
        generated = schemathesis(gateway.address, args.examples)
        grown = (resident_bytes([gateway.pid]) - before) / 2**20
    found = {"hardware": hardware(), "outcomes": dict(outcomes), "schemathesis": generated}
    write_json(found | {"grown_mb": grown}, args.json)
    print(found, f"grown by {grown:.0f} MB")
    if wrong := faults(outcomes):
        raise FlowTurboError(f"answers that must not be: {wrong}")
    if grown > GROWTH_MB:
        raise FlowTurboError(f"the gateway has grown by {grown:.0f} MB")


def faults(outcomes: Counter[str]) -> dict[str, int]:
    """What no request may end in. A busy service (503) is no fault."""
    return {
        each: count
        for each, count in outcomes.items()
        if each == "hangs" or (each.isdigit() and int(each) >= 500 and each != "503")
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
