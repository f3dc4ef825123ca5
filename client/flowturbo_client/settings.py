"""The settings of a client, and the health of its server."""

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import tritonclient.grpc.aio

from .address import is_local
from .errors import FlowTurboError, InvalidRequestError, translated
from .retry import RetryPlan

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
    # A server whose machine has vanished is noticed while a call waits. `flowturbo.serve` allows
    # such pings; Triton's own default would end connections after three of them.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
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
    """Addresses and limits of the sync and the async client; checked at creation."""

    urls: tuple[str, ...]
    model: str
    timeout_s: float
    retries: int | None
    credentials: grpc.ChannelCredentials | None

    def __post_init__(self) -> None:
        """Raise InvalidRequestError for values that no call could use."""
        if not self.urls:
            raise InvalidRequestError("url must be host:port, or a list of them, got an empty list")
        for url in self.urls:
            _check_url(url)
        if not isinstance(self.model, str) or not self.model:
            raise InvalidRequestError(f"model must be a model name, got {self.model!r}")
        known = isinstance(self.retries, int) and not isinstance(self.retries, bool)
        if self.retries is not None and not (known and self.retries >= 0):
            raise InvalidRequestError(
                f"retries must be an integer >= 0, or None for as many as fit, got {self.retries!r}"
            )
        check_timeout_s(self.timeout_s)

    @classmethod
    def of(
        cls,
        url: str | Sequence[str],
        model: str,
        timeout_s: float,
        retries: int | None,
        credentials: grpc.ChannelCredentials | None,
    ) -> "Settings":
        """With one address or several."""
        urls = tuple(url) if isinstance(url, (list, tuple)) else (url,)
        return cls(urls, model, timeout_s, retries, credentials)

    def channel(self, server: int = 0) -> dict[str, Any]:
        """Arguments of tritonclient's InferenceServerClient, sync and aio alike."""
        url = self.urls[server]
        # A proxy on another machine cannot reach a server on this one.
        direct = [("grpc.enable_http_proxy", 0)] if is_local(url) else []
        return {
            "url": url,
            "creds": self.credentials,
            "channel_args": [*_CHANNEL_ARGS, *direct],
        }

    @asynccontextmanager
    async def connection(self, server: int = 0) -> AsyncIterator[Any]:
        """A connection for the running event loop alone."""
        triton = tritonclient.grpc.aio.InferenceServerClient(**self.channel(server))
        try:
            yield triton
        finally:
            await triton.close()

    def plan(self, timeout_s: float, first: int, *, reached: bool) -> RetryPlan:
        """The attempts of a generation; the first is for the server `first`."""
        return RetryPlan(
            self.retries, timeout_s, servers=len(self.urls), first=first, reached=reached
        )

    def translated(
        self, timeout_s: float, model: str = "", server: int = 0
    ) -> AbstractContextManager[None]:
        """Turn tritonclient's exceptions into this package's, naming this server and `model`."""
        url = self.urls[server]
        return translated(url=url, model=model or self.model, timeout_s=timeout_s)

    def health(
        self, url: str, *, live: bool, ready: bool, model_ready: bool, server: Any, metadata: Any
    ) -> Health:
        """Assemble the server's answers; `metadata` is the model's, None if not ready."""
        inputs = () if metadata is None else tuple(tensor.name for tensor in metadata.inputs)
        return Health(
            url, server.version, bool(live), bool(ready), self.model, bool(model_ready), inputs
        )


def _check_url(url: str) -> None:
    if not isinstance(url, str) or not url:
        raise InvalidRequestError(f"url must be host:port, got {url!r}")
    scheme, separator, _ = url.partition("://")
    if separator and scheme.strip().lower() not in _SCHEMES:
        raise InvalidRequestError(
            f"url must be the host:port of the gRPC endpoint, without {scheme}://, got {url!r}"
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
