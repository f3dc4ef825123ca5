"""The gateway's routes."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from flowturbo_client import Generation as Made
from flowturbo_client import Update
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect

from flowturbo.gateway.answers import Refused, refusal_of_fields
from flowturbo.gateway.edge import Bounds, Edge
from flowturbo.gateway.fields import Edit, Generation
from flowturbo.gateway.filters import Filter
from flowturbo.gateway.kept import Kept
from flowturbo.gateway.keys import Key, Keys
from flowturbo.gateway.metrics import Metrics
from flowturbo.gateway.service import ImageService, Task, evaluations
from flowturbo.pipeline import shown_size
from flowturbo.provenance import PROGRAM

_PAGE = {
    "": ("index.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_MOST_PARTS = 100  # of a form
_LEFT = 499  # a status that nobody sees: the caller has left
_TEXT = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT,
                "code": _TEXT,
            },
        }
    },
}
_TOLD = {
    400: "A field is wrong, or the service refuses the request",
    401: "The API key is missing or unknown",
    404: "There is no such model or image",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The body is neither JSON nor a form",
    429: "A limit of the key",
    502: "The service failed",
    503: "The service is busy, not ready or cannot be reached",
    504: "The service did not answer in time",
}
_OBJECTS = {Generation: "image_generation", Edit: "image_edit"}
Fields = TypeVar("Fields", Generation, Edit)
Result = TypeVar("Result")


class CallerLeftError(Exception):
    """The caller has closed the connection: nobody waits for the answer."""


class _Direct(APIRoute):
    """A route that takes the request and gives the response itself: nothing is looked up for it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


@dataclass(frozen=True)
class Gateway:
    """What the routes share. Files with addresses are below `public_url`, or where they were asked
    for.
    """

    service: ImageService
    keys: Keys
    kept: Kept
    filter: Filter
    public_url: str | None = None


def application(gateway: Gateway, bounds: Bounds) -> Edge:
    """The ASGI application."""
    metrics = Metrics(lambda: gateway.kept.bytes)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await gateway.service.close()

    app = FastAPI(
        title="FlowTurbo gateway",
        version=PROGRAM.rpartition(" ")[2],
        description="Images by the OpenAI images API.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    started = int(time.time())

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _told(error)

    @app.exception_handler(ClientDisconnect)
    @app.exception_handler(CallerLeftError)
    async def left(_: Request, error: Exception) -> Response:
        metrics.left.inc()
        return Response(status_code=_LEFT)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return _told(Refused(500, "the gateway failed: its log says why", code="internal_error"))

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        told = f"{request.method} {request.url.path}: {error.detail}"
        return _told(Refused(error.status_code, told), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _told(Refused(400, str(error.errors()[0]["msg"])))

    async def answered(request: Request, kind: type[Fields]) -> Response:
        key = gateway.keys.caller(request.headers.get("authorization"))
        with ExitStack() as held:
            held.enter_context(gateway.keys.place(key))
            fields = await read_fields(request, kind)
            arrived = time.perf_counter()
            await gateway.filter.before(fields)
            task = await gateway.service.task(fields, key.name if key else None)
            if fields.stream:
                events = _events(gateway, metrics, request, task, key)
                # What fails before the first event is an answer as any other.
                first = await _unless_left(request, anext(events))
                return _Events(first, events, request, metrics, held.pop_all())
            with metrics.running.track_inprogress():
                with gateway.keys.images(key, fields.count):
                    made = await _unless_left(request, gateway.service.generate(task))
                await _check_images(gateway, fields, made.encoded or ())
            metrics.images.labels(task.model["name"]).inc(fields.count)
            total_s = time.perf_counter() - arrived
            timing = f"service;dur={1e3 * made.latency_s:.1f}, total;dur={1e3 * total_s:.1f}"
            document = _document(gateway, request, task, made)
            return _Held(document, {"server-timing": timing}, held.pop_all())

    images = APIRouter(route_class=_Direct)

    @images.post("/v1/images/generations", **_described(Generation))
    async def generations(request: Request) -> Response:
        """Images of a prompt or a class."""
        return await answered(request, Generation)

    @images.post("/v1/images/edits", **_described(Edit))
    async def edits(request: Request) -> Response:
        """An image changed, or repainted where a mask is transparent."""
        return await answered(request, Edit)

    app.include_router(images)

    @app.get("/v1/models", responses=_errors(401, 502, 503, 504))
    async def models(request: Request) -> dict[str, Any]:
        """The pipelines of the service."""
        gateway.keys.caller(request.headers.get("authorization"))
        found = await gateway.service.models()
        data = [_model(name, described, started) for name, described in found.items()]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{model}", responses=_errors(401, 404, 502, 503, 504))
    async def model(request: Request, model: str) -> dict[str, Any]:
        """One pipeline of the service."""
        gateway.keys.caller(request.headers.get("authorization"))
        return _model(model, await gateway.service.model(model), started)

    @app.get("/images/{name}", response_class=Response, responses=_errors(404))
    async def image(name: str) -> Response:
        """An image file that an answer had the address of."""
        found = gateway.kept.get(name)
        if found is None:
            raise Refused(404, "there is no such image, or it is not kept any more")
        return Response(
            found.data, media_type=found.media_type, headers={"cache-control": "private"}
        )

    @app.get("/healthz")
    async def alive() -> dict[str, str]:
        """The gateway runs."""
        return {"status": "ok"}

    @app.get("/readyz", responses=_errors(503))
    async def ready() -> dict[str, str]:
        """The image service takes requests."""
        if not await gateway.service.is_ready():
            raise Refused(503, "the image service is not ready", retry_after_s=1.0)
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def counted() -> Response:
        """Counters, for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = files("flowturbo.gateway") / "page"
    for path, (file, media_type) in _PAGE.items():
        _serve_file(app, f"/{path}", (page / file).read_bytes(), media_type)
    return Edge(app, bounds, metrics)


def _told(refused: Refused, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(refused.body, refused.status, {**(headers or {}), **refused.headers})


def _serve_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})


async def read_fields(request: Request, kind: type[Fields]) -> Fields:
    """The fields of a JSON or multipart body. Raises Refused."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if given == "application/json":
            body = from_json(await request.body(), allow_inf_nan=False)
            return kind.model_validate(body, strict=True)
        if given == "multipart/form-data":
            return kind.model_validate(await _form(request))
    except ValidationError as error:
        raise refusal_of_fields(error, kind) from None
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body must be JSON: {error}") from None
    raise Refused(
        415, f"the body must be application/json or multipart/form-data, got {given[:60]!r}"
    )


async def _form(request: Request) -> dict[str, Any]:
    """A form's values by name, files as bytes. A name that ends in [] has a list."""
    found: dict[str, Any] = {}
    try:
        async with request.form(max_files=_MOST_PARTS, max_fields=_MOST_PARTS) as form:
            for name, value in form.multi_items():
                content = await value.read() if isinstance(value, UploadFile) else value
                plain = name.removesuffix("[]")
                if plain == name and name not in found:
                    found[name] = content
                    continue
                listed = found.setdefault(plain, [])
                found[plain] = [*(listed if isinstance(listed, list) else [listed]), content]
    except (MultiPartException, HTTPException) as error:
        told = getattr(error, "detail", None) or str(error)
        raise Refused(400, f"the form cannot be read: {told}") from None
    return found


async def _unless_left(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`. If the caller leaves, it is cancelled. Raises CallerLeftError."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise CallerLeftError
    finally:
        for each in (working, leaving):
            each.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Held(JSONResponse):
    """An answer; `held` is closed once the caller has taken it."""

    def __init__(self, document: Any, headers: Mapping[str, str], held: ExitStack) -> None:
        super().__init__(document, headers=dict(headers))
        self._held = held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


class _Events(Response):
    """The event `first`, and the others of `source`, as server-sent events.

    The source is closed as soon as the caller leaves; then `held` is.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        source: AsyncIterator[bytes],
        request: Request,
        metrics: Metrics,
        held: ExitStack,
    ) -> None:
        self._first, self._source, self._request = first, source, request
        self._metrics, self._held = metrics, held
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_event(event: bytes) -> None:
            await send({"type": "http.response.body", "body": event, "more_body": True})

        async def sent() -> None:
            async with aclosing(self._source):  # type: ignore[type-var]
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
                await send_event(self._first)
                try:
                    async for event in self._source:
                        await send_event(event)
                except Refused as error:
                    await send_event(_event("error", error.body))

        with self._held:
            try:
                await _unless_left(self._request, sent())
            except CallerLeftError:
                self._metrics.left.inc()
                return
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(
    gateway: Gateway, metrics: Metrics, request: Request, task: Task, key: Key | None
) -> AsyncIterator[bytes]:
    """The events of a stream. Raises Refused."""
    count, partial = task.fields.count, 0
    with metrics.running.track_inprogress():
        async with aclosing(_updates(gateway.service, task)) as updates:  # type: ignore[type-var]
            with gateway.keys.images(key, count):
                update = await anext(updates, None)
            while update is not None:
                for event in await _events_of(gateway, request, task, update, partial):
                    yield event
                counted = metrics.images if update.final else metrics.partial_images
                counted.labels(task.model["name"]).inc(count)
                partial += 1
                update = await anext(updates, None)


async def _updates(service: ImageService, task: Task) -> AsyncIterator[Update]:
    """A stream of the service; one answer if no images on the way are asked for."""
    if task.fields.partial_images:
        async with aclosing(service.stream(task)) as updates:  # type: ignore[type-var]
            async for update in updates:
                yield update
        return
    made = await service.generate(task)
    yield Update(0, made.images, made.encoded, made)


async def _check_images(gateway: Gateway, fields: Generation, encoded: Sequence[bytes]) -> None:
    """Raises Refused if the filter refuses one of the files, which are base64 text."""
    if gateway.filter.sees_images:
        for file in encoded:
            await gateway.filter.after(fields, base64.b64decode(file))


async def _events_of(
    gateway: Gateway, request: Request, task: Task, update: Update, partial: int
) -> list[bytes]:
    """One event per image."""
    name, fields, found = _OBJECTS[type(task.fields)], task.fields, []
    await _check_images(gateway, fields, update.encoded or ())
    for k, file in enumerate(update.encoded or ()):
        event: dict[str, Any] = {"b64_json": file.decode(), "created_at": int(time.time())}
        event |= {"output_format": fields.form, "background": "opaque"}
        event |= {"quality": fields.quality or "auto", "image_index": k}
        if update.generation is None:
            event |= {"size": fields.size or "auto", "step": update.step}
            kind, event["partial_image_index"] = f"{name}.partial_image", partial
        else:
            made = update.generation
            event |= {"size": _size(made), "seed": int(made.seeds[k])}
            event |= {"flowturbo": _made(request, task, made)}
            event |= _truncated(made, k)
            kind = f"{name}.completed"
        found.append(_event(kind, {"type": kind, **event}))
    return found


def _event(kind: str, document: Mapping[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(document)}\n\n".encode()


def _document(gateway: Gateway, request: Request, task: Task, made: Made) -> dict[str, Any]:
    """The answer of a request that is no stream."""
    fields, files = task.fields, made.encoded or ()
    if fields.response_format == "url":
        try:
            kept = gateway.kept.add([base64.b64decode(file) for file in files], fields.form)
        except ValueError as error:
            raise Refused(400, f"{error}: ask for b64_json", param="response_format") from None
        base = gateway.public_url or str(request.base_url).rstrip("/")
        places = [{"url": f"{base}/images/{name}"} for name in kept]
    else:
        places = [{"b64_json": file.decode()} for file in files]
    data = [
        {"seed": int(made.seeds[k]), **place, **_truncated(made, k)}
        for k, place in enumerate(places)
    ]
    return {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": fields.form,
        "quality": fields.quality or "auto",
        "size": _size(made),
        "data": data,
        "flowturbo": _made(request, task, made),
    }


def _made(request: Request, task: Task, made: Made) -> dict[str, Any]:
    """How the images were made."""
    used = made.settings
    return {
        "request_id": request.state.request_id,
        "model": task.model["name"],
        "schedule": used["schedule"],
        "evaluations": evaluations(used["schedule"]),
        "guidance_scale": used["guidance_scale"],
        "seeds": made.seeds.tolist(),
        "service_ms": round(1e3 * made.latency_s, 1),
    }


def _truncated(made: Made, k: int) -> dict[str, bool]:
    """Says so if the prompt of image `k` was longer than the model reads."""
    return {"truncated": True} if made.truncated and made.truncated[k] else {}


def _size(made: Made) -> str:
    return shown_size(made.settings["size"])


def _model(name: str, described: Mapping[str, Any], created: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "flowturbo",
        "flowturbo": described,
    }


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Answers of a route that are errors, for the OpenAPI document."""
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": _TOLD[status], "content": content} for status in statuses}


def _described(kind: type[Generation]) -> dict[str, Any]:
    """The body of a route, which reads it itself, and its answers, for the OpenAPI document."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    # JSON has files as base64, a form as they are.
    text = json.loads(
        json.dumps(schema).replace('"format": "binary"', '"contentEncoding": "base64"')
    )
    contents = {"application/json": {"schema": text}, "multipart/form-data": {"schema": schema}}
    return {
        "response_class": JSONResponse,
        "responses": {
            200: {
                "description": "Images, or events with `stream`",
                "content": {"application/json": {}, "text/event-stream": {}},
            },
            **_errors(*_TOLD),
        },
        "openapi_extra": {"requestBody": {"required": True, "content": contents}},
    }
