"""The blocking client."""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import grpc
import tritonclient.grpc
from numpy.typing import NDArray
from tritonclient.grpc import InferResult

from .errors import (
    ConnectionFailedError,
    DeadlineExceededError,
    FlowTurboError,
    ModelNotReadyError,
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
from .stream import SUFFIX, Running, Update, updates
from .tensors import Labels, Prompts, Seeds, Size
from .verbs import Verbs, interpolated


class FlowTurboClient(Verbs):
    """A connection to a FlowTurbo server; may be shared between threads."""

    def __init__(
        self,
        url: str | Sequence[str] = "localhost:8001",
        *,
        model: str = "flowturbo",
        timeout_s: float = 60.0,
        retries: int | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Connect to `url` (host:port of the gRPC endpoint) when first used.

        `url` may be a list: if one server fails or is busy, the next is asked. `timeout_s` bounds a
        whole generation, retries included. `retries` None means as many as fit into it.
        `credentials`, from `grpc.ssl_channel_credentials`, turns TLS on. Raises
        InvalidRequestError.
        """
        self._settings = Settings.of(url, model, timeout_s, retries, credentials)
        self._closed = False
        self._reached = False
        self._server = 0  # the one that answered last
        self._streams: set[Running] = set()
        count = range(len(self._settings.urls))
        connect = tritonclient.grpc.InferenceServerClient
        self._tritons = [connect(**self._settings.channel(k)) for k in count]

    def generate(
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
        """Generate one image per label or prompt; None means the server's default.

        `labels`: class ids or class names, one or n of them. `prompts`: texts in their place, one
        for all seeds or one per image. `negative_prompts`: what guidance leads away from, one or n
        texts. `prompts_to`, `mix`: second texts and their shares of the conditioning (0 to 1), one
        or n each. `size`: (width, height) in pixels, or "WIDTHxHEIGHT". `pipeline`: the name of a
        pipeline of the server. `times`: the time grid, one time more than the schedule has steps.
        `seeds`: one per image, >= 0; if None the server chooses and reports them.
        `initial_noise`: float [n, C, h, w], instead of seeds.
        `image`: what to start from, one or n: paths, bytes of files, PIL images or uint8 arrays.
        `mask`: where to repaint it (white), one or n, or "alpha": where it is transparent.
        `strength` in (0, 1]: the share of the schedule's noise that is added to the image.
        `feather`: pixels inside the mask over which the new image fades in. `invert`: return the
        noise of the image in `Generation.latents`.
        `output_format`: raw; or png, jpeg or webp for files in `Generation.encoded`; or
        png_base64, jpeg_base64 or webp_base64 for the files as text.
        `output_quality`: of JPEG and WebP files, 1 to 100. `strip_metadata`: leave out how the
        image was made; else files say it (`flowturbo_client.provenance`).
        `outputs`: "image", "latent" or both. `caller`: whose share of the server's time this is, if
        the server trusts its callers to say so. Raises subclasses of FlowTurboError.
        """
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
        return self._ask(request, limit_s, request.parse)

    def stream(
        self,
        labels: Labels | None = None,
        *,
        preview_every: int = 1,
        timeout_s: float | None = None,
        **more: Any,
    ) -> Iterator[Update]:
        """Yield previews after every `preview_every` steps, then the images.

        `more` are arguments of `generate`. A slow reader misses previews, never the images. Leaving
        the iterator cancels the request. There are no retries.
        """
        request = build_request(labels, preview_every=preview_every, **more)
        limit_s = check_timeout_s(self._settings.timeout_s if timeout_s is None else timeout_s)
        model, started_s = self._settings.model + SUFFIX, time.perf_counter()
        server = self._server

        async def made() -> AsyncIterator[Update]:
            async with self._settings.connection(server) as triton:
                found: Any = updates(
                    triton, request, model, limit_s, lambda: time.perf_counter() - started_s
                )
                try:
                    async for update in found:
                        yield update
                finally:
                    await found.aclose()

        with self._call(limit_s, model, server):
            running = Running(made)
            self._streams.add(running)
            try:
                yield from running
            finally:
                running.cancel()
                self._streams.discard(running)

    def interpolate(
        self, first: int, last: int, count: int, labels: Labels | None = None, **more: Any
    ) -> Generation:
        """Images of `count` noises on the arc from seed `first` to seed `last`.

        `labels` are one class, or `prompts` one text, for all. With `prompts_to` the text changes
        to that one on the way. `more` are arguments of `generate`.
        """
        found = self.pipelines()
        return self.generate(**interpolated(found, (first, last), count, labels, more))

    def pipelines(self, *, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """Ask for the server's pipelines: one description per pipeline."""
        limit_s = check_timeout_s(timeout_s)
        return self._ask(pipelines_request(), limit_s, lambda result, _: parse_pipelines(result))

    def health(self, *, timeout_s: float = 5.0) -> Health:
        """Ask for the state of the server that answered last and of the model, per call.

        Raises ConnectionFailedError if the server cannot be reached.
        """
        server, model, asked = self._server, self._settings.model, {"client_timeout": timeout_s}
        triton = self._tritons[server]
        with self._call(check_timeout_s(timeout_s), server=server):
            live = triton.is_server_live(**asked)
            model_ready = triton.is_model_ready(model, **asked)
            metadata = triton.get_model_metadata(model, **asked) if model_ready else None
            return self._settings.health(
                self._settings.urls[server],
                live=live,
                ready=triton.is_server_ready(**asked),
                model_ready=model_ready,
                server=triton.get_server_metadata(**asked),
                metadata=metadata,
            )

    def is_ready(self, *, timeout_s: float = 5.0) -> bool:
        """Whether a server is live and has the model ready; False if none can be reached."""
        asked = {"client_timeout": check_timeout_s(timeout_s)}
        for server, triton in enumerate(self._tritons):
            try:
                with self._call(timeout_s, server=server):
                    if triton.is_server_live(**asked) and triton.is_model_ready(
                        self._settings.model, **asked
                    ):
                        return True
            except (ConnectionFailedError, DeadlineExceededError, ModelNotReadyError):
                continue
        return False

    def close(self) -> None:
        """Close the connection; calls in other threads raise RequestCancelledError."""
        self._closed = True
        for running in list(self._streams):
            running.cancel()
        for triton in self._tritons:
            triton.close()

    def __enter__(self) -> "FlowTurboClient":
        """Return this client."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self.close()

    def _ask(
        self, request: Request, limit_s: float, parse: Callable[[InferResult, float], Answer]
    ) -> Answer:
        """What `parse` makes of the answer and its latency, after as many attempts as it takes."""
        plan = self._settings.plan(limit_s, self._server, reached=self._reached)
        while True:
            arguments = request.arguments(self._settings.model, plan.remaining_s())
            try:
                with self._call(limit_s, server=plan.server):
                    started_s = time.perf_counter()
                    result = self._tritons[plan.server].infer(**arguments)
                    self._server, self._reached = plan.server, True
                    return parse(result, time.perf_counter() - started_s)
            except FlowTurboError as error:
                delay_s = plan.delay_s(error)
            time.sleep(delay_s)

    def _call(
        self, timeout_s: float, model: str = "", server: int = 0
    ) -> AbstractContextManager[None]:
        if self._closed:
            raise closed_error()
        return self._settings.translated(timeout_s, model, server)
