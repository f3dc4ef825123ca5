"""The orchestrator without Triton: admission, deadlines, cancellation, and one answer per request.

A stream sends previews before its one answer.

`handle` checks and admits a request and returns at once. Each admitted one is a coroutine under the
batcher or, if it is alone, one call of an ensemble. Steps of different requests, at different
places of different schedules, of whichever pipeline, share batches and the device.
"""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from flowturbo.conditions import REQUEST_OUTPUTS
from flowturbo.contract import (
    ENCODED_IMAGE,
    IMAGE,
    LATENT,
    PIPELINES,
    PREVIEW_EVERY,
    STREAM_OUTPUTS,
    Role,
)
from flowturbo.editing import OpenEdit
from flowturbo.ensemble import ensemble_for, ensemble_inputs
from flowturbo.errors import (
    BusyError,
    CancelledError,
    DeadlineError,
    RequestError,
    UnavailableError,
)
from flowturbo.generate import (
    Show,
    as_json,
    complete,
    decode,
    in_chunks,
    make_images,
    program_for,
    roles_called,
)
from flowturbo.pipeline import UNKNOWN, Pipeline, default_name
from flowturbo.request import (
    GenerationRequest,
    named_pipeline,
    parse_request,
    read_preview_every,
)
from flowturbo.rows import AwaitedInfer, Tensors
from flowturbo.serving.batcher import Batcher
from flowturbo.serving.deadlines import Deadlines
from flowturbo.serving.encodings import Encodings
from flowturbo.serving.outcomes import outcome_of
from flowturbo.serving.previews import Previews, place
from flowturbo.settings import Settings
from flowturbo.solver.calls import Variant
from flowturbo.solver.program import Program

IDLE_BEFORE_ENSEMBLE_S = 1.0  # after so long alone, a request need not wait to share its batches
CANCEL_CHECK_S = 0.02  # asking the server whether a caller is still there costs a round trip
_OF_STREAMS = [spec.name for spec in STREAM_OUTPUTS]
_logger = logging.getLogger(__name__)

# Evaluates a Triton model: its name, inputs and the wanted outputs, to these in order.
Call = Callable[[str, Tensors, Sequence[str]], tuple[np.ndarray, ...]]


class Sender(Protocol):
    """The way back to one caller."""

    def response(self, result: Tensors | BaseException) -> Any:
        """The answer to send; raises what keeps `result` from being sent."""
        ...

    def send(self, response: Any) -> None:
        """Sends the one final answer; nothing may follow."""
        ...

    def preview(self, response: Any) -> None:
        """Sends something before the answer; only streams can."""
        ...

    def is_cancelled(self) -> bool:
        """Whether the caller has gone; not to be asked once the answer is out."""
        ...


class Metrics(Protocol):
    """What is counted (flowturbo.serving.metrics)."""

    def inflight(self, pipeline: str, count: int) -> None: ...

    def executed(self, pipeline: str, rows: Mapping[str, int]) -> None: ...

    def encoded(self, pipeline: str, hits: int, misses: int) -> None: ...

    def finished(self, pipeline: str, outcome: str, seconds: float) -> None: ...


@dataclass
class Job:
    """One request on its way: when it came and must be done (monotonic s), and its sender.

    `executed` counts its rows in each model's calls. `preview_every` is 0 without previews.
    """

    sender: Sender
    arrived: float
    deadline: float
    timeout_s: float
    pipeline: str = UNKNOWN
    executed: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    answered: bool = False
    preview_every: int = 0
    last_cancel_check: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    def check(self, workers: ThreadPoolExecutor) -> None:
        """Raises once the deadline has passed or the caller is known to have gone.

        One of `workers` asks whether it has: this thread has batches to run.
        """
        now = time.monotonic()
        if now >= self.deadline:
            raise self.expired()
        if self.cancelled:
            raise CancelledError("the request was cancelled by its caller")
        if now - self.last_cancel_check >= CANCEL_CHECK_S:
            self.last_cancel_check = now
            workers.submit(self._look)

    def _look(self) -> None:
        with self.lock:  # the sender must not be asked once the answer is out
            if not self.answered:
                self.cancelled = self.sender.is_cancelled()

    def expired(self) -> DeadlineError:
        """The answer once the deadline has passed."""
        return DeadlineError(f"the deadline of {self.timeout_s:g} s passed before the end")


class Service:
    """Serves `pipelines` by `call`; `check` raises before the first answer if a model is off.

    `instances` batches of each model run at a time where models have GPUs of their own. Raises
    RepositoryError for settings that the pipelines do not allow.
    """

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        settings: Settings,
        call: Call,
        metrics: Metrics,
        check: Callable[[], None] = lambda: None,
        instances: int = 1,
    ) -> None:
        self._pipelines = pipelines
        self._settings = settings
        self._call = call
        self._metrics = metrics
        self._check = check
        self._default = default_name(pipelines, settings)
        # Fail fast: what no request could use is an error now.
        self._described = as_json(
            [
                each.described(settings) | {"default": each.name == self._default}
                for each in pipelines.values()
            ]
        )
        composed = [(each, role) for each in pipelines.values() for role in each.models]
        self._outputs = {
            pipeline.model(role): [spec.name for spec in pipeline.tensors(role)[1]]
            for pipeline, role in composed
        }
        self._batcher = Batcher(
            self._call_block,
            {pipeline.model(role): pipeline.max_rows for pipeline, role in composed},
            shared=[pipeline.model(role) for pipeline, role in composed if not pipeline.on_gpu],
            instances=instances,
        )
        self._encodings = Encodings(settings.text_cache_mb << 20, self._batcher.share)
        for pipeline in pipelines.values():
            if pipeline.has(Role.TEXT_ENCODER):
                encoder = pipeline.model(Role.TEXT_ENCODER)
                self._encodings.pin(encoder, pipeline.condition.pinned())
        self._conditions = {name: of.condition for name, of in pipelines.items()}
        self._deadlines = Deadlines(self._expire)
        self._inflight: Counter[str] = Counter()
        self._closing = False
        self._last_concurrent_at = -math.inf  # when requests were last together here (monotonic s)
        self._left = threading.Condition()  # and the lock of these four
        self._workers = _all_threads(settings.max_inflight)

    def handle(
        self,
        sender: Sender,
        read: Callable[[], tuple[Tensors, Sequence[str]]],
        timeout_s: float | None = None,
        *,
        streams: bool = False,
    ) -> None:
        """Takes a request over; it is answered exactly once, by `sender`.

        `read` gives its input tensors and the names of the outputs asked for. Its errors are
        answers too. With `streams` previews are sent before the answer.
        """
        arrived = time.monotonic()
        timeout_s = timeout_s or self._settings.default_timeout_s
        job = Job(sender, arrived, arrived + timeout_s, timeout_s)
        try:
            tensors, wanted = read()
            if list(wanted) == [PIPELINES]:
                if tensors:
                    raise RequestError(
                        f"a request for {PIPELINES} alone takes no input, got {', '.join(tensors)}"
                    )
                self._answer(job, {PIPELINES: self._described})
                return
            if streams:
                job.preview_every = read_preview_every(tensors)
                tensors = {name: of for name, of in tensors.items() if name != PREVIEW_EVERY}
                wanted = [name for name in wanted if name not in _OF_STREAMS]
            job.pipeline = named_pipeline(tensors, self._pipelines, self._default)
            pipeline = self._pipelines[job.pipeline]
            request = parse_request(tensors, wanted, pipeline, self._settings, self._conditions)
            self._start(job, request)
        except Exception as error:
            self._answer(job, error)

    def close(self) -> None:
        """Refuses what comes from now on, and lets the requests in flight finish."""
        with self._left:
            self._closing = True
            self._left.wait_for(lambda: self._inflight.total() == 0)
        self._batcher.close()
        self._workers.shutdown(wait=True)
        self._deadlines.close()

    def _start(self, job: Job, request: GenerationRequest) -> None:
        self._admit(job)
        ticket = None
        try:
            ticket = self._deadlines.add(job, job.deadline)
            self._workers.submit(self._work, job, ticket, request)
        except BaseException:
            self._leave(job)
            if ticket is None or self._deadlines.done(ticket):
                raise

    def _admit(self, job: Job) -> None:
        """Takes a place in flight, or raises: there is no queue, so that refusal comes at once."""
        with self._left:
            if self._closing:
                raise UnavailableError("the server is stopping: ask another, or try again later")
            together = self._inflight.total()
            if together >= self._settings.max_inflight:
                raise BusyError(
                    f"server is full: {together} requests in flight, at most "
                    f"{self._settings.max_inflight} are allowed; try again later"
                )
            self._inflight[job.pipeline] += 1
            if together:
                self._last_concurrent_at = time.monotonic()
            self._metrics.inflight(job.pipeline, self._inflight[job.pipeline])

    def _leave(self, job: Job) -> None:
        with self._left:
            self._inflight[job.pipeline] -= 1
            self._metrics.inflight(job.pipeline, self._inflight[job.pipeline])
            self._left.notify_all()

    def _expire(self, job: Job) -> None:
        """Answers at the deadline, whatever the worker waits for; its own answer is dropped."""
        try:
            self._answer(job, job.expired())
        except Exception:
            _logger.exception("answer at a deadline failed")

    def _work(self, job: Job, ticket: int, request: GenerationRequest) -> None:
        """Runs one admitted request; whatever happens, its one response is sent."""

        edit: OpenEdit | None = None

        def made(result: Tensors | BaseException) -> None:
            # On a thread that has batches to run: what remains is for another.
            self._workers.submit(self._finish, job, ticket, request, result, edit)

        pipeline = self._pipelines[job.pipeline]
        try:
            self._check()
            if request.edit:
                edit = request.edit.open(lambda: job.check(self._workers))
                if edit.masks is not None:
                    _ = edit.latent_masks  # here: the batcher's thread serves others too
            variant = Variant(self._settings.variant)
            program = program_for(request.schedule, variant, request.times, pipeline.trained_step)
            ensemble = ensemble_for(request, pipeline, self._settings.variant)
            idle_s = time.monotonic() - self._last_concurrent_at
            if ensemble and idle_s > IDLE_BEFORE_ENSEMBLE_S and not job.preview_every:
                answer = self._by_ensemble(job, request, program, ensemble)
            else:
                infer = self._infer_for(job, pipeline, request)
                show = self._show_for(job, request, pipeline, infer, edit)
                images = make_images(request, pipeline, program, infer, edit, show)
                self._batcher.start(images, made)
                return
        except BaseException as error:
            self._finish(job, ticket, request, error)
        else:
            self._finish(job, ticket, request, answer)

    def _by_ensemble(
        self, job: Job, request: GenerationRequest, program: Program, ensemble: str
    ) -> Tensors:
        """One call for all steps: nothing can share its batches, and it cannot be stopped."""
        job.check(self._workers)
        wanted = [IMAGE] * request.needs_decoder + [LATENT] * (LATENT in request.outputs)
        if not wanted:
            return {}
        pipeline = self._pipelines[job.pipeline]
        made = self._call(ensemble, ensemble_inputs(request, pipeline), wanted)
        for role in roles_called(program):
            job.executed[pipeline.model(role)] += request.rows
        if request.needs_decoder:
            job.executed[pipeline.model(Role.DECODER)] = request.images
        return dict(zip(wanted, made, strict=True))

    def _infer_for(self, job: Job, pipeline: Pipeline, request: GenerationRequest) -> AwaitedInfer:
        models = {role: pipeline.model(role) for role in pipeline.models}
        most = pipeline.rows_for(request.latent_shape)

        async def call(role: Role, tensors: Tensors) -> tuple[np.ndarray, ...]:
            job.check(self._workers)
            model = models[role]
            outputs = await self._batcher.infer(model, tensors, most)
            job.executed[model] += len(outputs[0])
            return outputs

        async def infer(role: Role, tensors: Tensors) -> tuple[np.ndarray, ...]:
            if role is not Role.TEXT_ENCODER:
                return await call(role, tensors)
            outputs, count = await self._encodings.infer(models[role], tensors, partial(call, role))
            self._metrics.encoded(pipeline.name, count.hits, count.misses)
            return outputs

        return infer

    def _show_for(
        self,
        job: Job,
        request: GenerationRequest,
        pipeline: Pipeline,
        infer: AwaitedInfer,
        edit: OpenEdit | None,
    ) -> Show | None:
        """What shows a stream's previews; None without any."""
        if not (job.preview_every and request.needs_decoder):
            return None
        chunked = in_chunks(infer, pipeline.rows_for(request.latent_shape))
        outputs = tuple(name for name in request.outputs if name in (IMAGE, ENCODED_IMAGE))
        seen = replace(request, outputs=outputs)

        def send(preview: Tensors) -> None:
            response = job.sender.response(preview)
            with job.lock:
                if not job.answered:
                    job.sender.preview(response)

        previews = Previews(
            job.preview_every,
            lambda latent: decode(chunked, latent, pipeline.largest_decode),
            lambda made: complete(seen, pipeline, self._settings, made, edit),
            self._workers.submit,
            send,
        )
        return previews.show

    def _call_block(self, model: str, tensors: Tensors) -> tuple[np.ndarray, ...]:
        """One blocking evaluation of a composed model, its outputs in the contract's order."""
        return self._call(model, tensors, self._outputs[model])

    def _finish(
        self,
        job: Job,
        ticket: int,
        request: GenerationRequest,
        made: Tensors | BaseException,
        edit: OpenEdit | None = None,
    ) -> None:
        """Answers with what was made for the request, or why nothing was."""
        result = made
        if not isinstance(result, BaseException):
            try:
                if PIPELINES in request.outputs:
                    result = {**result, PIPELINES: self._described}
                pipeline = self._pipelines[job.pipeline]
                result = complete(request, pipeline, self._settings, result, edit)
                if job.preview_every:
                    result |= place(len(request.schedule), final=True)
            except BaseException as error:
                result = error
        in_time = self._deadlines.done(ticket)
        try:
            # Free before the answer is out: a caller in a loop must not find its place taken.
            self._leave(job)
        finally:
            if in_time:
                self._answer(job, result)
        self._metrics.executed(job.pipeline, job.executed)

    def _answer(self, job: Job, result: Tensors | BaseException) -> None:
        """Sends the one final response; the request must not be touched afterwards."""
        try:
            response = job.sender.response(result)
        except BaseException as error:
            result = error
            response = job.sender.response(error)
        # Counted first: whoever has the answer finds it in the metrics.
        self._metrics.finished(job.pipeline, outcome_of(result), time.monotonic() - job.arrived)
        try:
            with job.lock:
                job.answered = True
                job.sender.send(response)
        except Exception:
            # The way back is closed by now: nothing more can be sent.
            _logger.exception("an answer could not be sent")


def in_contract_order(asked: Sequence[str]) -> list[str]:
    """The outputs `asked` for, in the contract's order."""
    known = (*REQUEST_OUTPUTS, *STREAM_OUTPUTS)
    return [spec.name for spec in known if spec.name in asked]


def _all_threads(count: int) -> ThreadPoolExecutor:
    """A pool whose threads all run: no request can fail for want of one."""
    pool, started = ThreadPoolExecutor(count, "flowturbo"), threading.Barrier(count + 1)
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    return pool
