"""The way of a stream's requests: from the process of their model to the orchestrator's, and back.

Triton refuses unary requests of a model that answers many times. So streams are a second model,
with a process of its own. It only passes on what comes, so that streams share batches, limits and
metrics with all other requests. Both processes speak over a Unix socket in a folder that no other
user can open. One connection carries one request: the request there, messages back. A connection
that ends before its answer cancels the request.
"""

import asyncio
import math
import os
import pickle
import shutil
import stat
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowturbo.errors import (
    CancelledError,
    FlowTurboError,
    RepositoryError,
    UnavailableError,
)
from flowturbo.rows import Tensors
from flowturbo.serving.endpoint import DRAIN, LENGTH_BYTES, packed
from flowturbo.serving.service import Asked, Sender

_CANCEL_CHECK_S = 0.05  # asking the server whether a caller is still there costs a round trip
_LATE_S = 2.0  # after its deadline a request has been answered, or the other process hangs
_CLOSING_S = 5.0
_BACKLOG = 1024
_OTHER = "the orchestrator's process"


@dataclass(frozen=True)
class Message:
    """A preview (`final` is false), or the answer, or the error in its place."""

    result: Tensors | FlowTurboError
    final: bool


class Reply:
    """The sender of one stream's messages; `told` is what a caller is told of an error."""

    def __init__(
        self, post: Callable[[bytes], None], told: Callable[[BaseException], FlowTurboError]
    ) -> None:
        self._post = post
        self._told = told
        self.left = False

    def response(self, result: Tensors | BaseException) -> Tensors | FlowTurboError:
        return self._told(result) if isinstance(result, BaseException) else result

    def preview(self, response: Tensors | FlowTurboError) -> None:
        self._post(packed(Message(response, final=False)))

    def send(self, response: Tensors | FlowTurboError) -> None:
        self._post(packed(Message(response, final=True)))

    def is_cancelled(self) -> bool:
        return self.left


class Endpoint:
    """Takes the streams' requests at `path`; each goes to `handle(asked, post)`.

    `handle` returns at once; its result is told that the caller has left (`Reply.left`). It must
    not raise. `drain` is called where a message says so, and may take its time. Raises
    RepositoryError if nothing can listen at `path`, or its folder is another user's.
    """

    def __init__(
        self,
        path: Path,
        handle: Callable[[Asked, Callable[[bytes], None]], Reply],
        drain: Callable[[], None],
    ) -> None:
        self._path = path
        self._handle = handle
        self._drain = drain
        self._open: set[asyncio.Task[None]] = set()
        self._loop = _Loop("streams")
        try:
            _make_private(path.parent)
            path.unlink(missing_ok=True)  # of a server that was killed and had the same process id
            listening = asyncio.start_unix_server(self._serve, path, backlog=_BACKLOG)
            self._server = self._loop.run(listening)
        except OSError as error:
            raise RepositoryError(
                f"cannot listen on {path}: {error}; set TMPDIR to a folder with a short name in "
                "which files can be made"
            ) from error

    def close(self) -> None:
        """Takes nothing more. Call it once all requests are answered: it delivers the answers."""

        async def close() -> None:
            self._server.close()
            if self._open:
                await asyncio.wait(self._open, timeout=_CLOSING_S)

        self._loop.run(close())
        self._loop.close()
        shutil.rmtree(self._path.parent, ignore_errors=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        loop = asyncio.get_running_loop()

        def post(message: bytes) -> None:
            loop.call_soon_threadsafe(writer.write, message)

        try:
            asked = await _read(reader)
            if asked == DRAIN:
                await loop.run_in_executor(None, self._drain)
                writer.write(packed(DRAIN))
                await writer.drain()
                return
            reply = self._handle(asked, post)
            await reader.read()  # ends when the other side closes
            reply.left = True
        except (OSError, EOFError):
            pass  # it left before it had asked
        finally:
            self._open.discard(task)
            writer.close()


class Relay:
    """Passes the requests of streams on to the endpoint at `path`, and messages back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._loop = _Loop("relay")
        self._closed = False

    def start(self, asked: Asked, sender: Sender) -> None:
        """Takes a request over; `sender` gets its previews and exactly one answer."""
        self._loop.start(self._pass_on(asked, sender))

    def close(self) -> None:
        """Waits for the answers of all requests."""
        self._loop.close()

    async def _pass_on(self, asked: Asked, sender: Sender) -> None:
        answer: Tensors | BaseException
        writer = None
        try:
            reader, writer = await asyncio.open_unix_connection(self._path)
            writer.write(packed(asked))
            answer = await self._answer(reader, asked.timeout_s, sender)
        except (OSError, EOFError):
            answer = UnavailableError(f"{_OTHER} has ended or cannot be reached")
        except Exception as error:
            answer = error
        finally:
            if writer:
                writer.close()
        sender.send(sender.response(answer))

    async def _answer(
        self, reader: asyncio.StreamReader, timeout_s: float | None, sender: Sender
    ) -> Tensors | FlowTurboError:
        """The answer, once all previews before it have been passed on."""
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s + _LATE_S
        while True:
            reading = asyncio.ensure_future(_read(reader))
            while not (await asyncio.wait({reading}, timeout=_CANCEL_CHECK_S))[0]:
                if sender.is_cancelled():
                    reading.cancel()
                    return CancelledError("the request was cancelled by its caller")
                if time.monotonic() > end:
                    reading.cancel()
                    return UnavailableError(f"{_OTHER} does not answer")
            message: Message = reading.result()
            if message.final:
                return message.result
            sender.preview(sender.response(message.result))


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs `work` in the loop and waits for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` in the loop."""

        def begin() -> None:
            task = self._loop.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._loop.call_soon_threadsafe(begin)

    def close(self) -> None:
        """Waits for all that was started, and ends the thread."""

        async def rest() -> None:
            while self._tasks:
                await asyncio.wait(self._tasks)

        self.run(rest())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _make_private(folder: Path) -> None:
    """A folder that no other user can open."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RepositoryError(f"{folder} must be a folder of this user alone: remove it")


async def _read(reader: asyncio.StreamReader) -> Any:
    """The next request or message. Raises OSError or EOFError once the other side is gone."""
    length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "little")
    return pickle.loads(await reader.readexactly(length))
