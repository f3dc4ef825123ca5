"""Bounds of what uvicorn's faster parser does not bound: headers, and callers that do not read."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_BYTES = 64 << 10
SECONDS = 30.0  # from the connection, or the first byte of a later request, to the last header
_UNWATCHED = 4096  # bytes; headers go together with what follows
UNREAD_S = 30.0  # in which a caller reads nothing of what waits for it


class BoundedHead(HttpToolsProtocol):
    """Closes a connection whose headers are too long or too slow, or that nobody reads from."""

    _head_bytes = 0
    _timer: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # Of an image, what a caller does not take at once waits under `pause_writing`.
        transport.set_write_buffer_limits(high=_UNWATCHED)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        self._stop_reading()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reading(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stop_reading()
        super().resume_writing()

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

    def _watch_reading(self, waiting: int) -> None:
        """`waiting` bytes are to be read."""

        def look() -> None:
            left = self.transport.get_write_buffer_size()
            if left >= waiting:
                self.transport.abort()
            else:
                self._watch_reading(left)

        self._reading = self.loop.call_later(UNREAD_S, look)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading.cancel()
        self._reading = None

    def _close(self) -> None:
        self._end()
        self.transport.abort()
