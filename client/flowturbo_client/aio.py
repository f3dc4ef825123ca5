"""The asyncio client: `FlowTurboClient` with `await`."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import grpc
import tritonclient.grpc.aio
from numpy.typing import NDArray
from tritonclient.grpc import InferResult

from .errors import (
    ConnectionFailedError,
    DeadlineExceededError,
    FlowTurboError,
    ModelNotReadyError,
    RequestCancelledError,
)
from .pictures import Pictures
from .protocol import (
    Answer,
    Generation,
    Request,
    build_request,
    parse_pipelines,
    pipelines_request,
)
from .settings import Health, Settings, check_timeout_s, closed_error
from .stream import SUFFIX, Update, updates
from .tensors import Labels, Prompts, Seeds, Size
from .verbs import Verbs, interpolated


def _being_cancelled() -> bool:
    """Whether the current task itself is being cancelled; always False before Python 3.11."""
    task = asyncio.current_task()
    return bool(task and hasattr(task, "cancelling") and task.cancelling())


class AsyncFlowTurboClient(Verbs):
    """A connection to a FlowTurbo server; each event loop that uses it has its own channel.

    Cancelling a task that awaits `generate` cancels the request on the server too.
    """

    def __init__(
        self,
        url: str | Sequence[str] = "localhost:8001",
        *,
        model: str = "flowturbo",
        timeout_s: float = 60.0,
        retries: int | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """As `FlowTurboClient`."""
        self._settings = Settings.of(url, model, timeout_s, retries, credentials)
        self._closed = False
        self._reached = False
        self._server = 0  # the one that answered last
        self._channels: dict[asyncio.AbstractEventLoop, dict[int, Any]] = {}
        self._lock = threading.Lock()  # loops may run in several threads

    async def generate(
        self,
        labels: Labels | None = None,
        seeds: Seeds | None = None,
        schedule: str | None = None,
        guidance_scale: float | None = None,
        *,
        prompts: Prompts | None = None,
        negative_prompts: Prompts | None = None,
        prompts_to: Prompts | None = None,
        mix: Sequence[float] | None = None,
        size: Size | None = None,
        pipeline: str | None = None,
        times: Sequence[float] | None = None,
        guidance_interval: Sequence[float] | None = None,
        initial_noise: NDArray[Any] | None = None,
        image: Pictures | None = None,
        mask: Pictures | None = None,
        strength: float | None = None,
        feather: int | None = None,
        invert: bool = False,
        output_format: str | None = None,
        output_quality: int | None = None,
        strip_metadata: bool = False,
        outputs: Sequence[str] = ("image",),
        caller: str | None = None,
        timeout_s: float | None = None,
    ) -> Generation:
        """As `FlowTurboClient.generate`."""
        request = build_request(
            labels,
            seeds,
            schedule,
            guidance_scale,
            prompts=prompts,
            negative_prompts=negative_prompts,
            prompts_to=prompts_to,
            mix=mix,
            size=size,
            pipeline=pipeline,
            times=times,
            guidance_interval=guidance_interval,
            initial_noise=initial_noise,
            image=image,
            mask=mask,
            strength=strength,
            feather=feather,
            invert=invert,
            output_format=output_format,
            output_quality=output_quality,
            strip_metadata=strip_metadata,
            outputs=outputs,
            caller=caller,
        )
        limit_s = check_timeout_s(self._settings.timeout_s if timeout_s is None else timeout_s)
        return await self._ask(request, limit_s, request.parse)

    async def stream(
        self,
        labels: Labels | None = None,
        *,
        preview_every: int = 1,
        timeout_s: float | None = None,
        **more: Any,
    ) -> AsyncIterator[Update]:
        """As `FlowTurboClient.stream`."""
        request = build_request(labels, preview_every=preview_every, **more)
        limit_s = check_timeout_s(self._settings.timeout_s if timeout_s is None else timeout_s)
        model, started_s = self._settings.model + SUFFIX, time.perf_counter()
        server = self._server
        with self._call(limit_s, model, server):
            found: Any = updates(
                self._triton(server),
                request,
                model,
                limit_s,
                lambda: time.perf_counter() - started_s,
            )
            try:
                async for update in found:
                    yield update
            except asyncio.CancelledError:
                if _being_cancelled() or not self._closed:
                    raise
                raise RequestCancelledError("the client was closed during the stream") from None
            finally:
                await found.aclose()

    async def interpolate(
        self, first: int, last: int, count: int, labels: Labels | None = None, **more: Any
    ) -> Generation:
        """Images of `count` noises on the arc from seed `first` to seed `last`.

        `labels` are one class, or `prompts` one text, for all. With `prompts_to` the text changes
        to that one on the way. `more` are arguments of `generate`.
        """
        found = await self.pipelines()
        return await self.generate(**interpolated(found, (first, last), count, labels, more))

    async def pipelines(self, *, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """As `FlowTurboClient.pipelines`."""
        limit_s = check_timeout_s(timeout_s)
        return await self._ask(
            pipelines_request(), limit_s, lambda result, _: parse_pipelines(result)
        )

    async def health(self, *, timeout_s: float = 5.0) -> Health:
        """As `FlowTurboClient.health`."""
        server, model, asked = self._server, self._settings.model, {"client_timeout": timeout_s}
        with self._call(check_timeout_s(timeout_s), server=server):
            triton = self._triton(server)
            live = await triton.is_server_live(**asked)
            model_ready = await triton.is_model_ready(model, **asked)
            metadata = await triton.get_model_metadata(model, **asked) if model_ready else None
            return self._settings.health(
                self._settings.urls[server],
                live=live,
                ready=await triton.is_server_ready(**asked),
                model_ready=model_ready,
                server=await triton.get_server_metadata(**asked),
                metadata=metadata,
            )

    async def is_ready(self, *, timeout_s: float = 5.0) -> bool:
        """As `FlowTurboClient.is_ready`."""
        asked = {"client_timeout": check_timeout_s(timeout_s)}
        for server in range(len(self._settings.urls)):
            try:
                with self._call(timeout_s, server=server):
                    triton = self._triton(server)
                    if await triton.is_server_live(**asked) and await triton.is_model_ready(
                        self._settings.model, **asked
                    ):
                        return True
            except (ConnectionFailedError, DeadlineExceededError, ModelNotReadyError):
                continue
        return False

    async def close(self) -> None:
        """Close the connection; requests still awaited in this event loop are cancelled."""
        self._closed = True
        with self._lock:
            channels = self._channels.pop(asyncio.get_running_loop(), {})
            self._channels.clear()  # the channels of other loops end with them
        for channel in channels.values():
            await channel.close()

    async def __aenter__(self) -> "AsyncFlowTurboClient":
        """Return this client."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        await self.close()

    async def _ask(
        self, request: Request, limit_s: float, parse: Callable[[InferResult, float], Answer]
    ) -> Answer:
        """As `FlowTurboClient._ask`."""
        plan = self._settings.plan(limit_s, self._server, reached=self._reached)
        while True:
            arguments = request.arguments(self._settings.model, plan.remaining_s())
            try:
                with self._call(limit_s, server=plan.server):
                    started_s = time.perf_counter()
                    result = await self._triton(plan.server).infer(**arguments)
                    self._server, self._reached = plan.server, True
                    return parse(result, time.perf_counter() - started_s)
            except asyncio.CancelledError:
                if not self._closed or _being_cancelled():
                    raise
                url = self._settings.urls[plan.server]
                told = f"the request to {url} was cancelled: the client was closed"
                raise RequestCancelledError(told) from None
            except FlowTurboError as error:
                delay_s = plan.delay_s(error)
            await asyncio.sleep(delay_s)

    def _call(
        self, timeout_s: float, model: str = "", server: int = 0
    ) -> AbstractContextManager[None]:
        if self._closed:
            raise closed_error()
        return self._settings.translated(timeout_s, model, server)

    def _triton(self, server: int) -> Any:
        # Made at a loop's first call: a gRPC aio channel belongs to the running loop.
        loop = asyncio.get_running_loop()
        with self._lock:
            for ended in [each for each in self._channels if each.is_closed()]:
                del self._channels[ended]  # a channel refers to its loop: both would stay in memory
            channels = self._channels.setdefault(loop, {})
            if server not in channels:
                connect = tritonclient.grpc.aio.InferenceServerClient
                channels[server] = connect(**self._settings.channel(server))
            return channels[server]
