"""Streams: previews of the images, then the images."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import InferRequestedOutput
from tritonclient.utils import InferenceServerException

from .errors import RequestCancelledError, ServerError
from .protocol import Generation, Request, decoded, has, preview_arrays

SUFFIX = "_stream"  # of the model's name
_STEP, _FINAL = "step", "final"
# Errors then come as gRPC statuses, as without a stream.
_HEADERS = {"triton_grpc_error": "true"}
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
        inputs_iterator=requests(), stream_timeout=limit_s + _MARGIN_S, headers=_HEADERS
    )
    try:
        async for result, error in answers:
            if error is not None:
                raise error
            update = _update(request, result, seconds())
            yield update
            if update.final:
                return
    except grpc.RpcError as error:  # tritonclient translates none of a stream
        status: Any = error
        raise InferenceServerException(msg=status.details(), status=str(status.code())) from error
    finally:
        answers.cancel()
    raise ServerError(f"the stream of {model} ended without its answer")


def _update(request: Request, result: Any, seconds: float) -> Update:
    try:
        step, final = (result.as_numpy(name)[0] for name in (_STEP, _FINAL))
    except (TypeError, IndexError) as error:
        raise ServerError(f"the server's answer has no {_STEP} or {_FINAL}") from error
    if bool(final):
        made = request.parse(result, seconds)
        return Update(int(step), made.images, made.encoded, made)
    found = preview_arrays(result, [name for name in request.output_names if has(result, name)])
    encoded = found.get("encoded_image")
    return Update(
        step=int(step),
        images=found.get("image"),
        encoded=None if encoded is None else tuple(bytes(data) for data in encoded),
        generation=None,
    )


class Running:
    """A stream that runs in a thread of its own, for callers without an event loop.

    `make` makes the asynchronous iterator within that thread's loop.
    """

    def __init__(self, make: Callable[[], AsyncIterator[Update]]) -> None:
        self._make = make
        self._found: queue.Queue[Update | BaseException | None] = queue.Queue()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flowturbo stream", daemon=True)
        self._thread.start()
        self._started.wait()

    def __iter__(self) -> Iterator[Update]:
        """Yield the updates; raise what ended them."""
        while (found := self._found.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found

    def cancel(self) -> None:
        """End the stream, from any thread; does nothing if it has ended."""
        if self._thread.is_alive():
            try:
                self._loop.call_soon_threadsafe(self._task.cancel)
            except RuntimeError:  # the loop has ended meanwhile
                return

    def join(self) -> None:
        """Wait for the thread to end."""
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._pump())
        except asyncio.CancelledError:
            self._found.put(RequestCancelledError("the stream was closed"))
        except BaseException as error:
            self._found.put(error)
        finally:
            self._started.set()
            self._found.put(None)

    async def _pump(self) -> None:
        task = asyncio.current_task()
        assert task
        self._loop, self._task = asyncio.get_running_loop(), task
        self._started.set()
        found: Any = self._make()
        try:
            async for update in found:
                self._found.put(update)
        finally:
            await found.aclose()
