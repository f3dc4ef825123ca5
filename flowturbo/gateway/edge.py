"""The outermost layer: what every request has to pass, and what every answer carries.

Bodies are bounded in size and time, and so is the number of requests. A page of another origin
cannot make a browser send requests here. Each answer has a request id.
"""

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from flowturbo.gateway.answers import Refused
from flowturbo.gateway.metrics import Metrics

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
               Awaitable[None]]  # fmt: skip
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'self'; "
        b"frame-ancestors 'none'",
    ),
]
_PIECE = 64 << 10  # bytes of an answer
_WATCHED = "/v1/"  # the paths whose requests count against the limit


@dataclass(frozen=True)
class Bounds:
    """The limits. `hosts` are the names that requests may address; None allows all.

    `public_host` is what browsers address if a proxy in front says something else.
    """

    body_bytes: int
    body_s: float
    requests: int
    hosts: frozenset[str] | None
    public_host: str | None = None


class Edge:
    """Wraps the application `app`."""

    def __init__(self, app: App, bounds: Bounds, metrics: Metrics) -> None:
        self._app, self._bounds, self._metrics = app, bounds, metrics
        self._inside = 0

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [*_HEADERS, (b"x-request-id", request_id.encode())]
                message["headers"] = [*message.get("headers", []), *own]
            body = message.get("body", b"")
            if len(body) > _PIECE:  # each waits until the caller has taken the one before it
                for start in range(0, len(body), _PIECE):
                    part = {**message, "body": body[start : start + _PIECE], "more_body": True}
                    await send(part)
                message = {**message, "body": b""}
            await send(message)

        watched = scope["path"].startswith(_WATCHED)
        self._inside += watched
        try:
            self._check(scope, watched)
            await self._app(scope, _Bounded(scope, receive, self._bounds), answer)
        except Refused as refused:  # from here or while the body came: nothing has been sent
            if not status:
                await _send(refused, answer)
        finally:
            self._inside -= watched
            self._metrics.answered(scope, status, time.perf_counter() - started)

    def _check(self, scope: Message, watched: bool) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        public = self._bounds.public_host
        if self._bounds.hosts is not None and _parts(f"//{host}")[1] not in self._bounds.hosts:
            raise Refused(
                403, f"this gateway answers to {', '.join(sorted(self._bounds.hosts))} only"
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and scope["method"] != "GET" and _parts(origin)[0] not in (host, public or host):
            raise Refused(403, "requests from pages of another origin are refused")
        if watched and self._inside > self._bounds.requests:
            raise Refused(
                503,
                f"the gateway is full: at most {self._bounds.requests} requests at a time",
                code="busy",
                retry_after_s=1.0,
            )
        stated = headers.get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > self._bounds.body_bytes:
            raise _too_large(self._bounds)


class _Bounded:
    """`receive` for a body of bounded size that comes in bounded time."""

    def __init__(self, scope: Message, receive: Any, bounds: Bounds) -> None:
        self._receive, self._bounds = receive, bounds
        self._left, self._whole = bounds.body_bytes, False
        self._until = time.monotonic() + bounds.body_s

    async def __call__(self) -> Message:
        if self._whole:  # now it waits for the caller to leave
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._until - time.monotonic())):
                message: Message = await self._receive()
        except TimeoutError:
            raise Refused(408, f"the body did not come within {self._bounds.body_s:g} s") from None
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._left < 0:
                raise _too_large(self._bounds)
        return message


def _too_large(bounds: Bounds) -> Refused:
    return Refused(413, f"the body must have at most {bounds.body_bytes >> 20} MB")


def _parts(address: str) -> tuple[str | None, str | None]:
    """Host and port of an address as written, and the host's name; None for what is no address."""
    try:
        found = urlsplit(address)
        return found.netloc, found.hostname
    except ValueError:
        return None, None


async def _send(refused: Refused, send: Any) -> None:
    body = json.dumps(refused.body).encode()
    headers = [(name.lower().encode(), value.encode()) for name, value in refused.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(b"connection", b"close")]  # the rest of the body is not read
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
