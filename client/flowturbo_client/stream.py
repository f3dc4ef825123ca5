"""Streams: previews of the images, then the images."""

import asyncio
import queue
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import InferRequestedOutput
from tritonclient.utils import InferenceServerException

from .errors import RequestCancelledError, ServerError
from .protocol import Generation, Request, decoded

SUFFIX = "_stream"  # of the model's name
_STEP, _FINAL = "step", "final"
# Answers of a stream have no codes, so the service writes them into its messages. Triton's own
# header for codes, triton_grpc_error, can end a server of release 24.10.
_CODED = re.compile(r"\[([A-Z_]+)\] (.*)", re.DOTALL)
_CLOSING_S = 2.0
_MARGIN_S = 0.5  # the server's own deadline error says more than the transport's


@dataclass(frozen=True)
class Update:
    """A preview after `step` steps of the schedule or, last of all, the generation."""

    step: int
    images: NDArray[np.uint8] | None
    """[n, H, W, 3], or None if not requested raw."""
    encoded: tuple[bytes, ...] | None
    """n image files in the requested `output_format`, or None."""
    generation: Generation | None
    """The answer, in the last update; else None."""

    @property
    def final(self) -> bool:
        """Whether this is the answer, and no preview."""
        return self.generation is not None

    def pil(self) -> list[Image.Image]:
        """Return the n images as PIL images."""
        if self.images is not None:
            return [Image.fromarray(image) for image in self.images]
        return [decoded(data) for data in self.encoded or ()]


async def updates(
    triton: Any, request: Request, model: str, limit_s: float, seconds: Callable[[], float]
) -> AsyncIterator[Update]:
    """Yield the updates of `request` from the stream of `model`; `seconds` is its age.

    Leaving the iterator cancels the request. Raises InferenceServerException, and ServerError for
    a stream that ends without its answer.
    """
    outputs = [InferRequestedOutput(name) for name in (*request.output_names, _STEP, _FINAL)]
    asked = {
        "model_name": model,
        "inputs": list(request.inputs),
        "outputs": outputs,
        "timeout": max(1, round(limit_s * 1e6)),  # microseconds
    }

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield asked

    answers = triton.stream_infer(
        inputs_iterator=requests(), stream_timeout=limit_s + _MARGIN_S, headers=request.headers
    )
    answered = False
    try:
        async for result, error in answers:
            if error is not None:
                answered = True
                raise _with_status(error)
            update = _update(request, result, seconds())
            answered = answered or update.final
            yield update
    except grpc.RpcError as error:  # tritonclient translates none of a stream
        status: Any = error
        raise InferenceServerException(msg=status.details(), status=str(status.code())) from error
    finally:
        # The server closes an answered stream itself. A cancellation at that moment can end
        # a server of release 24.10.
        if answered:
            await _drained(answers)
        else:
            answers.cancel()
    if not answered:
        raise ServerError(f"the stream of {model} ended without its answer")


def _with_status(error: InferenceServerException) -> InferenceServerException:
    """`error` with the status that its message states."""
    if found := _CODED.fullmatch(error.message() or ""):
        return InferenceServerException(msg=found[2], status=f"StatusCode.{found[1]}")
    return error


async def _drained(answers: Any) -> None:
    async def rest() -> None:
        async for _ in answers:
            pass

    with suppress(grpc.RpcError, asyncio.TimeoutError):
        await asyncio.wait_for(rest(), _CLOSING_S)


def _update(request: Request, result: Any, seconds: float) -> Update:
    try:
        step, final = (result.as_numpy(name)[0] for name in (_STEP, _FINAL))
    except (TypeError, IndexError) as error:
        raise ServerError(f"the server's answer has no {_STEP} or {_FINAL}") from error
    if bool(final):
        made = request.parse(result, seconds)
        return Update(int(step), made.images, made.encoded, made)
    given = [name for name in request.output_names if result.get_output(name) is not None]
    found = {name: result.as_numpy(name) for name in given}
    encoded = found.get("encoded_image")
    return Update(
        step=int(step),
        images=found.get("image"),
        encoded=None if encoded is None else tuple(bytes(data) for data in encoded),
        generation=None,
    )


class Running:
    """A stream that runs in this module's event loop, for callers without one.

    `make` makes the asynchronous iterator within that loop.
    """

    def __init__(self, make: Callable[[], AsyncIterator[Update]]) -> None:
        self._found: queue.Queue[Update | BaseException | None] = queue.Queue()
        self._running = asyncio.run_coroutine_threadsafe(self._pump(make), _event_loop())
        self._running.add_done_callback(lambda _: self._found.put(None))

    def __iter__(self) -> Iterator[Update]:
        """Yield the updates; raise what ended them."""
        while (found := self._found.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found

    def cancel(self) -> None:
        """End the stream, from any thread; does nothing if it has ended."""
        if not self._running.done():
            self._found.put(RequestCancelledError("the stream was closed"))
            self._running.cancel()

    async def _pump(self, make: Callable[[], AsyncIterator[Update]]) -> None:
        found: Any = make()
        try:
            async for update in found:
                self._found.put(update)
        except Exception as error:
            self._found.put(error)
        finally:
            await found.aclose()


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all streams, in a thread of its own: gRPC loses events of loops that end."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="flowturbo streams", daemon=True).start()
    return loop
