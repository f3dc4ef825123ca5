"""The settings of a client, and the health of its server."""

import math
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import tritonclient.grpc.aio

from .address import is_local
from .errors import FlowTurboError, InvalidRequestError, translated

_MAX_TIMEOUT_S = 1e9
_SCHEMES = ("dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds")  # gRPC's own
# These arguments replace all of tritonclient's, hence the message sizes (-1: unbounded).
# While gRPC waits to reconnect, every call fails at once. By default it waits a second, then
# longer. That exceeds the pause before a retry, so a retry would never reach the network.
_CHANNEL_ARGS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


@dataclass(frozen=True)
class Health:
    """State of the server and of the model at one moment."""

    url: str
    server_version: str
    live: bool
    ready: bool
    model: str
    model_ready: bool
    inputs: tuple[str, ...]

    @property
    def can_generate(self) -> bool:
        """The server is live and the model is ready."""
        return self.live and self.model_ready


@dataclass(frozen=True)
class Settings:
    """Address and limits of the sync and the async client; checked at creation."""

    url: str
    model: str
    timeout_s: float
    retries: int
    credentials: grpc.ChannelCredentials | None

    def __post_init__(self) -> None:
        """Raise InvalidRequestError for values that no call could use."""
        if not isinstance(self.url, str) or not self.url:
            raise InvalidRequestError(f"url must be host:port, got {self.url!r}")
        scheme, separator, _ = self.url.partition("://")
        if separator and scheme.strip().lower() not in _SCHEMES:
            raise InvalidRequestError(
                f"url must be the host:port of the gRPC endpoint, without {scheme}://, got "
                f"{self.url!r}"
            )
        if not isinstance(self.model, str) or not self.model:
            raise InvalidRequestError(f"model must be a model name, got {self.model!r}")
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise InvalidRequestError(f"retries must be an integer >= 0, got {self.retries!r}")
        check_timeout_s(self.timeout_s)

    def channel(self) -> dict[str, Any]:
        """Arguments of tritonclient's InferenceServerClient, sync and aio alike."""
        # A proxy on another machine cannot reach a server on this one.
        direct = [("grpc.enable_http_proxy", 0)] if is_local(self.url) else []
        return {
            "url": self.url,
            "creds": self.credentials,
            "channel_args": [*_CHANNEL_ARGS, *direct],
        }

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        """A connection for the running event loop alone."""
        triton = tritonclient.grpc.aio.InferenceServerClient(**self.channel())
        try:
            yield triton
        finally:
            await triton.close()

    def translated(self, timeout_s: float, model: str = "") -> AbstractContextManager[None]:
        """Turn tritonclient's exceptions into this package's, naming this server and `model`."""
        return translated(url=self.url, model=model or self.model, timeout_s=timeout_s)

    def health(
        self, *, live: bool, ready: bool, model_ready: bool, server: Any, metadata: Any
    ) -> Health:
        """Assemble the server's answers; `metadata` is the model's, None if not ready."""
        inputs = () if metadata is None else tuple(tensor.name for tensor in metadata.inputs)
        return Health(
            self.url, server.version, bool(live), bool(ready), self.model, bool(model_ready), inputs
        )


def check_timeout_s(timeout_s: float) -> float:
    """Return `timeout_s` in seconds if it is in (0, 1e9], else raise InvalidRequestError."""
    is_number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if not is_number or math.isnan(timeout_s) or not 0 < timeout_s <= _MAX_TIMEOUT_S:
        raise InvalidRequestError(
            f"timeout_s must be seconds > 0 and at most {_MAX_TIMEOUT_S:g}, got {timeout_s!r}"
        )
    return float(timeout_s)


def closed_error() -> FlowTurboError:
    """Return the error for a call on a closed client."""
    return FlowTurboError("this client is closed: create another one")
