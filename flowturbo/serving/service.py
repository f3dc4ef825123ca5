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
    program_of,
    roles_called,
)
from flowturbo.learned import in_one_execution
from flowturbo.pipeline import UNKNOWN, Pipeline, default_name
from flowturbo.request import (
    GenerationRequest,
    named_pipeline,
    parse_request,
    read_preview_every,
)
from flowturbo.rows import AwaitedInfer, Tensors
from flowturbo.serving.batcher import Batcher, Owner
from flowturbo.serving.deadlines import Deadlines
from flowturbo.serving.encodings import Encodings
from flowturbo.serving.outcomes import outcome_of
from flowturbo.serving.previews import Previews, place
from flowturbo.serving.scheduling import Need, Scheduler, Times, Work
from flowturbo.settings import Settings
from flowturbo.solver.calls import Variant
from flowturbo.solver.program import Program

IDLE_BEFORE_ENSEMBLE_S = 1.0  # after so long alone, a request need not wait to share its batches
CANCEL_CHECK_S = 0.05  # asking the server whether a caller is still there costs a round trip
_WAITING_CHECK_S = 0.2  # the same, for requests that wait
_FULL_S = 0.5  # a full server may have a place by then
_STARTING = 2  # requests that draw their noise at a time
_METRICS_S = 1.0  # between two reports of block times
_OF_STREAMS = [spec.name for spec in STREAM_OUTPUTS]
_logger = logging.getLogger(__name__)

# Evaluates a Triton model: its name, inputs and the wanted outputs, to these in order.
Call = Callable[[str, Tensors, Sequence[str]], tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Asked:
    """A request as it comes: its tensors and the outputs asked for.

    `timeout_s` is how long it may take, None for the service's default. `caller` is a name that the
    front end forwards, empty without one.
    """

    tensors: Tensors
    outputs: Sequence[str]
    timeout_s: float | None = None
    caller: str = ""


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
    """What is counted (flowturbo.serving.metrics), soon after it has happened."""

    def inflight(self, pipeline: str, count: int) -> None: ...

    def executed(self, pipeline: str, rows: Mapping[str, int]) -> None: ...

    def encoded(self, pipeline: str, hits: int, misses: int) -> None: ...

    def finished(self, pipeline: str, outcome: str, seconds: float) -> None: ...

    def planned(self, left_s: float, blocks: Mapping[tuple[str, int], float]) -> None: ...


@dataclass
class Job:
    """One request on its way: when it came and must be done (monotonic s), and its sender.

    `executed` counts its rows in each model's calls. `preview_every` is 0 without previews. `work`
    is what it was taken for.
    """

    sender: Sender
    arrived: float
    deadline: float = math.inf
    timeout_s: float = math.inf
    pipeline: str = UNKNOWN
    executed: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    answered: bool = False
    preview_every: int = 0
    work: Work | None = None
    last_cancel_check: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    def check(self, workers: ThreadPoolExecutor, every_s: float = CANCEL_CHECK_S) -> None:
        """Raises once the deadline has passed or the caller is known to have gone.

        One of `workers` asks whether it has, at most after `every_s`: this thread has batches to
        run.
        """
        now = time.monotonic()
        if now >= self.deadline:
            raise self.expired()
        if self.cancelled:
            raise CancelledError("the request was cancelled by its caller")
        if now - self.last_cancel_check >= every_s:
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
        stated: dict[str, dict[int, float]] = {}
        for each in pipelines.values():
            stated |= each.block_seconds
        self._outputs = {
            pipeline.model(role): [spec.name for spec in pipeline.tensors(role)[1]]
            for pipeline, role in composed
        }
        self._batcher = Batcher(
            self._call_block,
            {pipeline.model(role): pipeline.max_rows for pipeline, role in composed},
            shared=[pipeline.model(role) for pipeline, role in composed if not pipeline.on_gpu],
            instances=instances,
            scheduler=Scheduler(Times(stated), instances, settings.weights),
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
        self._last_report_at = -math.inf
        # Many that draw their noise at once would keep the interpreter from taking requests.
        self._starting = threading.Semaphore(_STARTING)
        self._workers = _all_threads(settings.max_inflight)

    def handle(self, sender: Sender, read: Callable[[], Asked], *, streams: bool = False) -> None:
        """Takes a request over; it is answered exactly once, by `sender`.

        The errors of `read` are answers too. With `streams` previews are sent before the answer.
        """
        job = Job(sender, time.monotonic())
        try:
            asked = read()
            tensors, wanted = asked.tensors, asked.outputs
            job.timeout_s = asked.timeout_s or self._settings.default_timeout_s
            job.deadline = job.arrived + job.timeout_s
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
            self._start(job, request, asked.caller)
        except Exception as error:
            self._answer(job, error)

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken at all."""
        return not self._closing

    def drain(self) -> None:
        """Refuses what comes from now on, and lets the requests in flight finish."""
        with self._left:
            self._closing = True
            self._left.wait_for(lambda: self._inflight.total() == 0)

    def close(self) -> None:
        """Drains, and ends all threads."""
        self.drain()
        self._batcher.close()
        self._workers.shutdown(wait=True)
        self._deadlines.close()

    def _start(self, job: Job, request: GenerationRequest, caller: str) -> None:
        pipeline = self._pipelines[job.pipeline]
        program = program_of(request, pipeline, Variant(self._settings.variant))
        self._admit(job)
        ticket = None
        try:
            needs = calls_needed(request, pipeline, program, job.preview_every)
            needs += self._texts_needed(request, pipeline)
            with self._batcher.planning() as scheduler:
                now = time.monotonic()
                job.work = scheduler.take(needs, request.images, job.deadline, now, caller)
            ticket = self._deadlines.add(job, job.deadline)
            self._workers.submit(self._work, job, ticket, request, program)
        except BaseException:
            self._leave(job)
            if ticket is None or self._deadlines.done(ticket):
                raise

    def _texts_needed(self, request: GenerationRequest, pipeline: Pipeline) -> list[Need]:
        """The call for texts of `request` that nobody has encoded."""
        texts = pipeline.condition.texts(request.condition)
        if not texts:
            return []
        encoder = pipeline.model(Role.TEXT_ENCODER)
        count = self._encodings.new(encoder, texts)
        most = pipeline.rows_for(request.latent_shape)
        return [Need(encoder, count, most)] if count else []

    def _admit(self, job: Job) -> None:
        """Takes a place in flight, or raises: there are at most so many."""
        with self._left:
            if self._closing:
                raise UnavailableError("the server is stopping: ask another, or try again later")
            together = self._inflight.total()
            if together >= self._settings.max_inflight:
                raise BusyError(
                    f"server is full: {together} requests in flight, at most "
                    f"{self._settings.max_inflight} are allowed; retry after {_FULL_S:.1f} s"
                )
            self._inflight[job.pipeline] += 1
            if together:
                self._last_concurrent_at = time.monotonic()
            self._metrics.inflight(job.pipeline, self._inflight[job.pipeline])

    def _leave(self, job: Job) -> None:
        self._forget(job)
        with self._left:
            self._inflight[job.pipeline] -= 1
            self._metrics.inflight(job.pipeline, self._inflight[job.pipeline])
            self._left.notify_all()

    def _forget(self, job: Job) -> None:
        """Its work need not be done any more."""
        if job.work:
            with self._batcher.planning() as scheduler:
                scheduler.leave(job.work)

    def _expire(self, job: Job) -> None:
        """Answers at the deadline, whatever the worker waits for; its own answer is dropped."""
        try:
            self._forget(job)
            self._answer(job, job.expired())
        except Exception:
            _logger.exception("answer at a deadline failed")

    def _work(self, job: Job, ticket: int, request: GenerationRequest, program: Program) -> None:
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
            ensemble = ensemble_for(request, pipeline, self._settings.variant)
            idle_s = time.monotonic() - self._last_concurrent_at
            alone = idle_s > IDLE_BEFORE_ENSEMBLE_S and not job.preview_every
            if alone and ensemble:
                answer = self._by_ensemble(job, request, program, ensemble)
            else:
                calls = self._calls_at_once(request, pipeline, program) if alone else 1
                infer = self._infer_for(job, pipeline, request, calls)
                show = self._show_for(job, request, pipeline, infer, edit)
                images = make_images(
                    request, pipeline, program, infer, edit, show, at_once=calls > 1
                )
                with self._starting:
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

    def _calls_at_once(
        self, request: GenerationRequest, pipeline: Pipeline, program: Program
    ) -> int:
        """The predictor's calls per execution, for a request that is alone."""
        model, calls = pipeline.model(Role.PREDICTOR), len(program.calls)
        with self._batcher.planning() as scheduler:
            seconds = scheduler.times.seconds(model, request.rows, _scale(request, pipeline))
        return calls if in_one_execution(request, pipeline, calls * seconds) else 1

    def _infer_for(
        self, job: Job, pipeline: Pipeline, request: GenerationRequest, calls: int = 1
    ) -> AwaitedInfer:
        """Evaluates models for `request`; an execution of the predictor makes so many `calls`."""
        models = {role: pipeline.model(role) for role in pipeline.models}
        most = pipeline.rows_for(request.latent_shape)
        assert job.work
        own = Owner(job.work, partial(self._check_job, job), _scale(request, pipeline))
        # The scheduler counts an execution of n calls as one call of a latent n times as large.
        owners = {
            Role.PREDICTOR: replace(own, scale=own.scale * calls),
            Role.TEXT_ENCODER: replace(own, scale=1.0),
        }

        async def call(role: Role, tensors: Tensors) -> tuple[np.ndarray, ...]:
            job.check(self._workers)
            model = models[role]
            outputs = await self._batcher.infer(model, tensors, most, owners.get(role, own))
            job.executed[model] += len(outputs[0]) * (calls if role is Role.PREDICTOR else 1)
            return outputs

        with self._batcher.planning() as scheduler:
            sizes = {role: scheduler.times.best_rows(models[role], most) for role in models}
        # Large calls in parts, so that other requests can run in between.
        parts = {role: in_chunks(call, rows) for role, rows in sizes.items()}

        async def infer(role: Role, tensors: Tensors) -> tuple[np.ndarray, ...]:
            if role is not Role.TEXT_ENCODER:
                return await parts[role](role, tensors)
            evaluate = partial(parts[role], role)
            outputs, count = await self._encodings.infer(models[role], tensors, evaluate)
            with self._batcher.planning() as scheduler:  # another request may have made them
                scheduler.progressed(own.work, models[role], len(outputs[0]))
            self._metrics.encoded(pipeline.name, count.hits, count.misses)
            return outputs

        return infer

    def _check_job(self, job: Job) -> None:
        """Raises once a waiting request need not go on: it is over, or cannot be done in time."""
        job.check(self._workers, _WAITING_CHECK_S)
        with self._batcher.planning() as scheduler:
            if job.work and scheduler.is_hopeless(job.work, time.monotonic()):
                raise DeadlineError(
                    f"the deadline of {job.timeout_s:g} s cannot be met any more: the server is "
                    "slower than it was"
                )

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
        outputs = tuple(name for name in request.outputs if name in (IMAGE, ENCODED_IMAGE))
        # Metadata would say how the image was made, not the preview.
        seen = replace(request, outputs=outputs, strip_metadata=True)

        def send(preview: Tensors) -> None:
            response = job.sender.response(preview)
            with job.lock:
                if not job.answered:
                    job.sender.preview(response)

        previews = Previews(
            job.preview_every,
            lambda latent: decode(infer, latent, pipeline.largest_decode),
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
        self._report()

    def _report(self) -> None:
        """Tells the metrics what is planned, from time to time."""
        now = time.monotonic()
        if now - self._last_report_at < _METRICS_S:
            return
        self._last_report_at = now
        with self._batcher.planning() as scheduler:
            left_s, blocks = scheduler.left_s, scheduler.times.measured()
        self._metrics.planned(left_s, blocks)

    def _answer(self, job: Job, result: Tensors | BaseException) -> None:
        """Sends the one final response; the request must not be touched afterwards."""
        try:
            response = job.sender.response(result)
        except BaseException as error:
            result = error
            response = job.sender.response(error)
        self._metrics.finished(job.pipeline, outcome_of(result), time.monotonic() - job.arrived)
        try:
            with job.lock:
                job.answered = True
                job.sender.send(response)
        except Exception:
            # The way back is closed by now: nothing more can be sent.
            _logger.exception("an answer could not be sent")


def calls_needed(
    request: GenerationRequest, pipeline: Pipeline, program: Program, preview_every: int = 0
) -> list[Need]:
    """The calls that `request` makes, without that for its texts."""
    calls: dict[tuple[Role, int], int] = {}
    if request.needs_decoder or LATENT in request.outputs:
        calls = {(Role(net), request.rows): count for net, count in program.counts.items()}
        if request.edit:
            calls[Role.ENCODER, request.images] = 1
    if request.needs_decoder:
        previews = len(request.schedule) // preview_every if preview_every else 0
        calls[Role.DECODER, request.images] = 1 + previews
    most, scale = pipeline.rows_for(request.latent_shape), _scale(request, pipeline)
    return [
        Need(pipeline.model(role), rows, most, count, scale)
        for (role, rows), count in calls.items()
    ]


def _scale(request: GenerationRequest, pipeline: Pipeline) -> float:
    """The size of the request's latents beside that of the default size."""
    return pipeline.tokens(request.latent_shape) / pipeline.tokens(pipeline.latent_shape)


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
