"""Bounds of what uvicorn's faster parser does not bound: headers, and callers that do not read."""

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_BYTES = 64 << 10
SECONDS = 30.0  # from the connection, or the first byte of a later request, to the last header
UNREAD_S = 30.0  # a caller that takes nothing of what was sent to it for so long is cut off


def bounded_listener(
    address: tuple[str, int], family: socket.AddressFamily, unread_s: float = UNREAD_S
) -> socket.socket:
    """A listening socket. The kernel ends connections whose callers do not read."""
    made = socket.create_server(address, family=family)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * unread_s))
    return made


class BoundedHead(HttpToolsProtocol):
    """Closes a connection whose headers are too long or too slow."""

    _head_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # Low: a route waits as soon as its caller falls behind. Headers still leave with the body.
        transport.set_write_buffer_limits(high=4096)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._timer is None:  # a body comes
            return
        self._head_bytes += len(data)
        if self._head_bytes > MOST_BYTES:
            self._close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:
            self._begin()

    def on_headers_complete(self) -> None:
        self._end()
        super().on_headers_complete()

    def _begin(self) -> None:
        self._head_bytes = 0
        self._timer = self.loop.call_later(SECONDS, self._close)

    def _end(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None

    def _close(self) -> None:
        self._end()
        self.transport.abort()
