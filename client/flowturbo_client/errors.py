"""All errors that the client raises; `FlowTurboError` is their base."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tritonclient.utils import InferenceServerException

from .address import proxy_hint

# Server messages when a model's process has ended or memory is full. The transport has no such
# messages.
_STUB_GONE = "is not healthy"  # Triton's own message for a process that has ended
_RETRY_AFTER = re.compile(r"retry after (\d+(?:\.\d+)?) s$")  # a busy server's hint
_GONE = ("has to be restarted", "out of memory", "no memory for this request")


class FlowTurboError(Exception):
    """Base of all errors of this client."""

    server_message: str | None = None
    """What the server said, without the client's words around it; None if it said nothing."""


class InvalidRequestError(FlowTurboError, ValueError):
    """The request is invalid; the client or the server refused it."""


class ServerBusyError(FlowTurboError):
    """The server is busy and refused the request before it began; try again later."""

    retry_after_s: float | None = None
    """After how many seconds the server expects to take the request; None if it did not say."""


class ConnectionFailedError(FlowTurboError):
    """The server could not be reached, or the connection broke."""


class DeadlineExceededError(FlowTurboError, TimeoutError):
    """No answer within `timeout_s`."""


class RequestCancelledError(FlowTurboError):
    """The request was cancelled before it finished."""


class ModelNotReadyError(FlowTurboError):
    """The server answers but the model is not loaded, or still loading."""


class ServerError(FlowTurboError):
    """The server failed, or gave an answer that breaks the contract."""


def from_status(
    status: str, message: str, *, url: str, model: str, timeout_s: float
) -> FlowTurboError:
    """Return the error for a gRPC status name ("UNAVAILABLE") and the server's message."""
    text = message.lower()
    if status == "INVALID_ARGUMENT":
        return InvalidRequestError(f"the server at {url} refused the request: {message}")
    if status == "DEADLINE_EXCEEDED" or (status == "CANCELLED" and "deadline" in text):
        return DeadlineExceededError(
            f"no answer from {url} within {timeout_s:g} s ({message}): "
            f"raise timeout_s, or ask for fewer images or steps{proxy_hint(url)}"
        )
    if status == "CANCELLED":
        return RequestCancelledError(f"the request to {url} was cancelled: {message}")
    if status == "NOT_FOUND" or (status == "UNAVAILABLE" and "unknown model" in text):
        return ModelNotReadyError(
            f"model {model!r} is not ready at {url} ({message}): "
            "check its name, or wait until it is loaded"
        )
    if status == "UNAVAILABLE":
        return _unavailable(message, url)
    if _STUB_GONE in text:
        return ConnectionFailedError(
            f"the server at {url} cannot answer, the model's process has ended ({message}): "
            "the server has to be restarted"
        )
    return ServerError(f"the server at {url} failed ({status}): {message}")


def _unavailable(message: str, url: str) -> FlowTurboError:
    # The server and the transport share this status, so only the text tells them apart.
    hint = _RETRY_AFTER.search(message)
    if hint or message.lower().startswith("server is full"):
        busy = ServerBusyError(f"{url} refused the request ({message}): try again later")
        busy.retry_after_s = float(hint[1]) if hint else None
        return busy
    if any(part in message for part in _GONE):
        return ConnectionFailedError(f"the server at {url} cannot answer: {message}")
    return ConnectionFailedError(
        f"cannot reach {url} ({message}): check that the server runs and that "
        f"this is its gRPC port (8001 by default){proxy_hint(url)}"
    )


@contextmanager
def translated(*, url: str, model: str, timeout_s: float) -> Iterator[None]:
    """Turn tritonclient's exception into an error of this module, chained to its cause."""
    try:
        yield
    except InferenceServerException as error:
        # "StatusCode.UNAVAILABLE", or None if tritonclient itself raised it.
        status = (error.status() or "tritonclient").removeprefix("StatusCode.")
        message = error.message() or "no message"
        found = from_status(status, message, url=url, model=model, timeout_s=timeout_s)
        found.server_message = message
        raise found from error
