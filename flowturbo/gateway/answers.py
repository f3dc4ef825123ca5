"""What the gateway answers when it cannot answer an image: OpenAI's error object."""

import math
from typing import Any

from flowturbo_client import (
    DeadlineExceededError,
    FlowTurboError,
    InvalidRequestError,
    ServerBusyError,
    ServerError,
)
from pydantic import BaseModel, ValidationError

_RETRY_S = 2.0  # a service that cannot be reached may be back by then
_SHOWN = 60  # characters of a value


class Refused(Exception):
    """An answer with an HTTP `status`; `param` is the field that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": told}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, if there is a time to wait."""
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


def refusal_of(error: FlowTurboError) -> Refused:
    """How the gateway tells an error of the service."""
    told = error.server_message or str(error)
    if isinstance(error, InvalidRequestError):
        return Refused(400, told)
    if isinstance(error, ServerBusyError):
        wait_s = error.retry_after_s or 1.0
        return Refused(503, told, code="busy", retry_after_s=wait_s)
    if isinstance(error, DeadlineExceededError):
        return Refused(504, told, code="timeout")
    if isinstance(error, ServerError):
        return Refused(502, told, code="service_failed")
    return Refused(
        503, "the image service cannot be reached", code="unavailable", retry_after_s=_RETRY_S
    )


def refusal_of_fields(error: ValidationError, kind: type[BaseModel]) -> Refused:
    """The first field that is wrong, its value, and what is allowed."""
    errors = error.errors(include_url=False, include_context=False)
    first = errors[0]
    if first["type"] in ("json_invalid", "model_type"):
        return Refused(400, f"the body must be a JSON object: {first['msg']}")
    param = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return Refused(
            400,
            f"unknown field {param[:_SHOWN]!r}, known are {', '.join(kind.model_fields)}",
            param=param[:_SHOWN],
            code="unknown_parameter",
        )
    if first["type"] == "missing":
        return Refused(400, f"{param} is missing", param=param, code="missing_required_parameter")
    # A field that may be one thing or another has an error for each. One about the value says more
    # than one about its type, and one inside a list more than one about the list.
    of_field = [each for each in errors if each["loc"][:1] == first["loc"][:1]]
    told = max(of_field, key=lambda each: (not each["type"].endswith("_type"), len(each["loc"])))
    reason = told["msg"].removeprefix("Value error, ")
    only_types = len(of_field) > 1 and told["type"].endswith("_type")
    if told["type"] == "string_pattern_mismatch" or only_types:
        reason = (kind.model_fields[param].description or reason).rstrip(".")
    value = repr(told["input"])
    shown = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
    message = f"{param}: {reason}, got {shown}" if param else reason
    return Refused(400, message, param=param or None, code="invalid_value")
