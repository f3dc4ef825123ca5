"""How a request ended: the outcome under which it is counted, its gRPC code, and its message."""

import re
from collections.abc import Iterable
from typing import Any

from flowturbo import errors

# Outcomes of failed requests and their codes in pb_utils.TritonError.
CODES = {
    "invalid": "INVALID_ARG",
    "busy": "UNAVAILABLE",
    "unavailable": "UNAVAILABLE",
    "deadline": "CANCELLED",  # Triton has no code for a deadline; the message tells the two apart
    "cancelled": "CANCELLED",
    "error": "INTERNAL",
}
_OUTCOMES = (  # a deadline is a cancellation too: first match wins
    (errors.RequestError, "invalid"),
    (errors.BusyError, "busy"),
    (errors.UnavailableError, "unavailable"),
    (errors.DeadlineError, "deadline"),
    (errors.CancelledError, "cancelled"),
)
_OUT_OF_MEMORY = "the server is out of memory"
# The server's own sentences about a process, a model or its version. A model's message may say of
# something else that it is "not available".
_DEAD = re.compile(
    r"stub process|broken pipe|is not healthy"
    r"|(model|version) \S+ (version \S+ )?(is not ready|is not at ready state|is not available)",
    re.IGNORECASE,
)
_STOPPING = ("server is stopping", "server not ready", "server is not ready")
_NO_MEMORY = (
    *("shared memory pool", "shared memory region", "shared memory key"),
    *("out of memory", "memoryerror", "bad_alloc", "bad allocation"),
    *("cannot allocate", "unable to allocate", "failed to allocate"),
)
# In the Python backend's messages: the process of a model's instance, and a stack.
_STUB = re.compile(r"stub process '([\w-]+?)_\d+_\d+'", re.IGNORECASE)
_STACK = re.compile(r"\s*\bAt:\n.*", re.DOTALL)


def outcome_of(result: Any) -> str:
    """The outcome under which an answer, or an exception, is counted."""
    if not isinstance(result, BaseException):
        return "ok"
    told = as_told(result)
    return next((name for kind, name in _OUTCOMES if isinstance(told, kind)), "error")


def as_told(error: BaseException) -> errors.FlowTurboError:
    """`error` as a caller is told it: a sentence, whatever was raised."""
    if isinstance(error, errors.FlowTurboError):
        return error
    kind, reason = type(error).__name__, str(error) or "no reason given"
    if isinstance(error, MemoryError) or _has(reason, _NO_MEMORY):
        return errors.UnavailableError(
            f"{_OUT_OF_MEMORY} ({kind}: {reason}): ask for fewer images, or try again "
            "later; its --shm-mb and the container's shared memory may be too small"
        )
    return errors.FlowTurboError(
        f"the server failed on this request ({kind}: {reason}); its log has the details"
    )


def failure(model: str, message: str) -> errors.FlowTurboError:
    """The error of a request whose call of `model` failed with `message`.

    The message of an ensemble may name the process of another model.
    """
    message = re.sub(_STACK, "", message)
    if _has(message, (_OUT_OF_MEMORY,)):
        return errors.UnavailableError(f"{model}: {message}")
    if found := re.search(_STUB, message):
        model = found[1]
    if _DEAD.search(message):
        return errors.UnavailableError(
            f"{model} cannot answer, its process has ended or hangs ({message.rstrip('.')}): "
            "the server has to be restarted"
        )
    if _has(message, _STOPPING):
        return errors.UnavailableError(
            f"the server is stopping or starting ({message.rstrip('.')}): ask another, or try "
            "again later"
        )
    if _has(message, _NO_MEMORY):
        return errors.UnavailableError(
            f"{model} has no memory for this request ({message.rstrip('.')}): ask for fewer "
            "images, or try again later"
        )
    return errors.FlowTurboError(f"{model}: {message}")


def incomplete(model: str, missing: Iterable[str]) -> errors.UnavailableError:
    """The error of a request whose call of `model` came back without some outputs."""
    return errors.UnavailableError(
        f"{model} answered without {', '.join(missing)}, as happens when its process ends "
        "meanwhile: the server has to be restarted"
    )


def _has(text: str, parts: Iterable[str]) -> bool:
    return any(part in text.lower() for part in parts)
