"""Triton Python-backend model `flowturbo`: one request in, one response out.

`execute` checks and admits requests and returns at once; each admitted one is a coroutine, or if it
is alone a call of an ensemble. Steps of different requests, at different places of different
schedules, share batches.
"""

import math
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from flowturbo import contract
from flowturbo.ensemble import ensemble_for, ensemble_inputs
from flowturbo.errors import (
    BusyError,
    CancelledError,
    DeadlineError,
)
from flowturbo.generate import AwaitedInfer, complete, make_images, models_called, program_for
from flowturbo.gpu import gpu_count
from flowturbo.repository import Pipeline, read_ensembles
from flowturbo.request import GenerationRequest, default_schedule, parse_request
from flowturbo.serving.answers import StoredAnswers
from flowturbo.serving.batcher import Batcher
from flowturbo.serving.deadlines import Deadlines
from flowturbo.serving.forwarded import Forwarded, as_asked
from flowturbo.serving.metrics import Metrics
from flowturbo.serving.outcomes import outcome_of
from flowturbo.serving.triton_io import (
    call_model,
    error_response,
    read_settings,
    read_tensors,
    repository_of,
)
from flowturbo.solver.guidance import Tensors
from flowturbo.solver.program import Program, Variant

IDLE_BEFORE_ENSEMBLE_S = (
    1.0  # after so long without company, a request need not wait to share its batches
)
CANCEL_CHECK_S = 0.02  # asking the server whether a caller is still there costs a round trip


@dataclass
class Job:
    """One request on its way: Triton's handle, and when it came and must be done (monotonic s).

    `executed` counts its rows in each model's calls.
    """

    sender: Any
    arrived: float
    deadline: float
    timeout_s: float
    executed: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    answered: bool = False
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


class TritonPythonModel:
    """The orchestrator; its settings are the `parameters` of its config.pbtxt."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads settings and the composed models' build records."""
        self._settings = read_settings(args)
        self._pipeline = Pipeline.load(repository_of(args))
        default_schedule(self._pipeline, self._settings)  # found wanting now, not by a request
        self._ensembles = read_ensembles(repository_of(args), self._settings.variant)
        self._forwarded = Forwarded.by_server(os.getpid())
        self._metrics = Metrics(tuple(contract.COMPOSED))
        # The composed models have an instance on each GPU.
        instances = max(1, gpu_count()) if self._pipeline.on_gpu else 1
        self._answers = StoredAnswers(repository_of(args), _call_block, instances)
        self._batcher = Batcher(
            _call_block,
            tuple(contract.COMPOSED),
            self._pipeline.max_rows,
            instances=instances,
            shared=not self._pipeline.on_gpu,
        )
        self._deadlines = Deadlines(self._expire)
        self._inflight = 0
        self._last_concurrent_at = -math.inf  # when requests were last together here (monotonic s)
        self._left = threading.Condition()  # and their lock
        self._workers = _all_threads(self._settings.max_inflight)

    def execute(self, requests: list[Any]) -> None:
        """Takes requests over; each is answered exactly once, by its sender."""
        for request in requests:
            arrived = time.monotonic()
            timeout_s = request.timeout() / 1e6 or self._settings.default_timeout_s
            job = Job(request.get_response_sender(), arrived, arrived + timeout_s, timeout_s)
            try:
                self._start(job, self._read(request))
            except Exception as error:
                self._answer(job, error)

    def finalize(self) -> None:
        """Lets the requests in flight finish."""
        with self._left:
            self._left.wait_for(lambda: self._inflight == 0)
        self._batcher.close()
        self._workers.shutdown(wait=True)
        self._deadlines.close()

    def _read(self, request: Any) -> GenerationRequest:
        parameters = self._forwarded.check(request.parameters)
        asked = set(request.requested_output_names())
        names = [spec.name for spec in contract.REQUEST_OUTPUTS if spec.name in asked]
        wanted = as_asked(names, parameters)
        return parse_request(read_tensors(request), wanted, self._pipeline, self._settings)

    def _start(self, job: Job, request: GenerationRequest) -> None:
        self._admit()
        ticket = None
        try:
            ticket = self._deadlines.add(job, job.deadline)
            self._workers.submit(self._work, job, ticket, request)
        except BaseException:
            self._leave()
            if ticket is None or self._deadlines.done(ticket):
                raise

    def _admit(self) -> None:
        """Takes a place in flight, or raises BusyError: no queue, so that refusal comes at once."""
        with self._left:
            if self._inflight >= self._settings.max_inflight:
                raise BusyError(
                    f"server is full: {self._inflight} requests in flight, at most "
                    f"{self._settings.max_inflight} are allowed; try again later"
                )
            self._inflight += 1
            if self._inflight > 1:
                self._last_concurrent_at = time.monotonic()
            self._metrics.inflight(self._inflight)

    def _leave(self) -> None:
        with self._left:
            self._inflight -= 1
            self._metrics.inflight(self._inflight)
            self._left.notify_all()

    def _expire(self, job: Job) -> None:
        """Answers at the deadline, whatever the worker waits for; its own answer is dropped."""
        try:
            self._answer(job, job.expired())
        except Exception as error:
            pb_utils.Logger.log_error(f"flowturbo: at a deadline: {error}")

    def _work(self, job: Job, ticket: int, request: GenerationRequest) -> None:
        """Runs one admitted request; whatever happens, its one response is sent."""

        def made(result: "Tensors | BaseException") -> None:
            # On a thread that has batches to run: what remains is for another.
            self._workers.submit(self._finish, job, ticket, request, result)

        try:
            self._answers.check()
            program = program_for(request.schedule, Variant(self._settings.variant))
            ensemble = ensemble_for(request, self._ensembles, self._pipeline)
            if ensemble and time.monotonic() - self._last_concurrent_at > IDLE_BEFORE_ENSEMBLE_S:
                images = self._by_ensemble(job, request, program, ensemble)
            else:
                infer = self._infer_for(job)
                self._batcher.start(make_images(request, self._pipeline, program, infer), made)
                return
        except BaseException as error:
            self._finish(job, ticket, request, error)
        else:
            self._finish(job, ticket, request, images)

    def _by_ensemble(
        self, job: Job, request: GenerationRequest, program: Program, ensemble: str
    ) -> Tensors:
        """One call for all steps: no coming and going between them, and none to stop at."""
        job.check(self._workers)
        wanted = ["image"] * request.needs_decoder + ["latent"] * ("latent" in request.outputs)
        if not wanted:
            return {}
        made = call_model(ensemble, ensemble_inputs(request), wanted)
        for model in models_called(program):
            job.executed[model] += request.rows
        job.executed[contract.DECODER] = len(request.labels) * request.needs_decoder
        return dict(zip(wanted, made, strict=True))

    def _infer_for(self, job: Job) -> AwaitedInfer:
        async def infer(model: str, tensors: Tensors) -> tuple[np.ndarray, ...]:
            job.check(self._workers)
            outputs = await self._batcher.infer(model, tensors)
            job.executed[model] += len(outputs[0])
            return outputs

        return infer

    def _finish(
        self, job: Job, ticket: int, request: GenerationRequest, made: "Tensors | BaseException"
    ) -> None:
        """Answers with what was made for the request, or why nothing was."""
        result: dict[str, np.ndarray] | BaseException = made
        if not isinstance(made, BaseException):
            try:
                result = complete(request, self._pipeline, made)
            except BaseException as error:
                result = error
        in_time = self._deadlines.done(ticket)
        try:
            # Free before the answer is out: a caller in a loop must not find its place taken.
            self._leave()
        finally:
            if in_time:
                self._answer(job, result)
        self._metrics.executed(job.executed)

    def _answer(self, job: Job, result: "dict[str, np.ndarray] | BaseException") -> None:
        """Sends the one final response; the request must not be touched afterwards."""
        if not isinstance(result, BaseException):
            try:
                response = pb_utils.InferenceResponse(_tensors(result))
            except BaseException as error:
                result = error
        outcome = outcome_of(result)
        if isinstance(result, BaseException):
            response = error_response("flowturbo", result)
        # Counted first: whoever has the answer finds it in the metrics.
        self._metrics.finished(outcome, time.monotonic() - job.arrived)
        try:
            with job.lock:
                job.answered = True
                job.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:
            # The sender is closed by now: nothing more can be sent.
            pb_utils.Logger.log_error(f"flowturbo: an answer could not be sent: {error}")


def _all_threads(count: int) -> ThreadPoolExecutor:
    """A pool whose threads all run: no request can fail for want of one."""
    pool, started = ThreadPoolExecutor(count, "flowturbo"), threading.Barrier(count + 1)
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    return pool


def _tensors(arrays: Tensors) -> list[Any]:
    return [pb_utils.Tensor(name, value) for name, value in arrays.items()]


def _call_block(model: str, tensors: Tensors) -> tuple[np.ndarray, ...]:
    """One blocking evaluation of a composed model, its outputs in the contract's order."""
    return call_model(model, tensors, [spec.name for spec in contract.COMPOSED[model][1]])
