"""Triton Python-backend models `flowturbo` and `flowturbo_stream`.

Of `flowturbo` a request gets one response, of the stream also previews before it. This is Triton's
side alone: the work is done by `flowturbo.serving.service`, in the process of `flowturbo`.
"""

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import triton_python_backend_utils as pb_utils

from flowturbo.contract import ORCHESTRATOR, STREAM
from flowturbo.gpu import gpu_count
from flowturbo.pipeline import read_pipelines
from flowturbo.rows import Tensors
from flowturbo.runtimes import limit_numpy_threads
from flowturbo.serving.answers import StoredAnswers
from flowturbo.serving.endpoint import endpoint
from flowturbo.serving.forwarded import Forwarded, as_asked, caller_of
from flowturbo.serving.metrics import TritonMetrics
from flowturbo.serving.relay import Endpoint, Relay, Reply
from flowturbo.serving.service import Asked, Service, in_contract_order
from flowturbo.serving.triton_io import (
    call_model,
    error_response,
    read_settings,
    read_tensors,
    repository_of,
    told,
)

# For so long a thread may keep the interpreter while another has a request to take or a batch to
# run. Python's own 5 ms, paid several times per request, would be felt.
_SWITCH_S = 0.001


class TritonPythonModel:
    """The orchestrator; its settings are the `parameters` of its config.pbtxt."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the settings and the records of all pipelines."""
        logging.getLogger("flowturbo").addHandler(_TritonLog(ORCHESTRATOR))
        sys.setswitchinterval(_SWITCH_S)
        repository, settings = repository_of(args), read_settings(args)
        pipelines = read_pipelines(repository)
        # Composed models on GPUs have an instance on each.
        on_gpu = any(pipeline.on_gpu for pipeline in pipelines.values())
        instances = max(1, gpu_count()) if on_gpu else 1
        if not on_gpu:
            limit_numpy_threads()
        answers = StoredAnswers(repository, pipelines.values(), call_model, instances)
        self._metrics = TritonMetrics(pipelines, ORCHESTRATOR)
        self._service = Service(
            pipelines, settings, call_model, self._metrics, answers.check, instances
        )
        self._streams = Endpoint(endpoint(os.getppid()), self._stream, self._service.drain)
        self._forwarded = Forwarded.by_server(os.getpid())

    def execute(self, requests: list[Any]) -> None:
        """Takes requests over; each is answered exactly once, by its sender."""
        for request in requests:
            sender = _Sender(request.get_response_sender(), ORCHESTRATOR)
            read = partial(_read, request, self._forwarded)
            self._service.handle(sender, read)

    def is_ready(self) -> bool:
        """Newer releases of Triton ask for it."""
        return self._service.is_ready

    def finalize(self) -> None:
        """Lets the requests in flight finish."""
        self._service.close()
        self._streams.close()
        self._metrics.close()

    def _stream(self, asked: Asked, post: Callable[[bytes], None]) -> Reply:
        reply = Reply(post, partial(told, STREAM))
        self._service.handle(reply, lambda: asked, streams=True)
        return reply


class StreamPythonModel:
    """The way of streams to the orchestrator."""

    def initialize(self, args: dict[str, str]) -> None:
        """Starts to pass requests on."""
        logging.getLogger("flowturbo").addHandler(_TritonLog(STREAM))
        self._relay = Relay(endpoint(os.getppid()))
        self._forwarded = Forwarded.by_server(os.getpid())

    def execute(self, requests: list[Any]) -> None:
        """Takes requests over; each is answered by previews and one answer."""
        for request in requests:
            sender = _Sender(request.get_response_sender(), STREAM)
            try:
                asked = _read(request, self._forwarded)
            except Exception as error:
                sender.send(sender.response(error))
            else:
                self._relay.start(asked, sender)

    def is_ready(self) -> bool:
        """Newer releases of Triton ask for it."""
        return endpoint(os.getppid()).exists()

    def finalize(self) -> None:
        """Lets the requests in flight finish."""
        self._relay.close()


def _read(request: Any, forwarded: Forwarded) -> Asked:
    """A request with copies of its tensors. Raises RequestError."""
    parameters = forwarded.check(request.parameters)
    names = in_contract_order(request.requested_output_names())
    return Asked(
        read_tensors(request),
        as_asked(names, parameters),
        request.timeout() / 1e6 or None,
        caller_of(parameters),
    )


class _Sender:
    """Triton's response sender of one request."""

    def __init__(self, sender: Any, model: str) -> None:
        self._sender = sender
        self._model = model

    def response(self, result: Tensors | BaseException) -> Any:
        if isinstance(result, BaseException):
            return error_response(self._model, result, coded=self._model == STREAM)
        return pb_utils.InferenceResponse([pb_utils.Tensor(*item) for item in result.items()])

    def preview(self, response: Any) -> None:
        self._sender.send(response)

    def send(self, response: Any) -> None:
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


class _TritonLog(logging.Handler):
    """Python's warnings and errors, in the server's log."""

    def __init__(self, model: str) -> None:
        super().__init__(logging.WARNING)
        self._model = model

    def emit(self, record: logging.LogRecord) -> None:
        error = record.levelno >= logging.ERROR
        log = pb_utils.Logger.log_error if error else pb_utils.Logger.log_warn
        log(f"{self._model}: {self.format(record)}")
