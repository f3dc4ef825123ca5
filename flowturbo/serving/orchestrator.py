"""Triton Python-backend models `flowturbo` and `flowturbo_stream`.

Of `flowturbo` a request gets one response, of the stream also previews before it. This is Triton's
side alone: the work is done by `flowturbo.serving.service`.
"""

import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import triton_python_backend_utils as pb_utils

from flowturbo.contract import ORCHESTRATOR, STREAM
from flowturbo.gpu import gpu_count
from flowturbo.pipeline import read_pipelines
from flowturbo.rows import Tensors
from flowturbo.serving.answers import StoredAnswers
from flowturbo.serving.forwarded import Forwarded, as_asked
from flowturbo.serving.metrics import TritonMetrics
from flowturbo.serving.service import Service, in_contract_order
from flowturbo.serving.triton_io import (
    call_model,
    error_response,
    read_settings,
    read_tensors,
    repository_of,
)
from flowturbo.settings import Settings


class TritonPythonModel:
    """The orchestrator; its settings are the `parameters` of its config.pbtxt."""

    model = ORCHESTRATOR

    def settings(self, args: dict[str, str]) -> Settings:
        """Those of this model."""
        return read_settings(args)

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the settings and the records of all pipelines."""
        logging.getLogger("flowturbo").addHandler(_TritonLog(self.model))
        repository, settings = repository_of(args), self.settings(args)
        pipelines = read_pipelines(repository)
        # Composed models on GPUs have an instance on each.
        on_gpu = any(pipeline.on_gpu for pipeline in pipelines.values())
        instances = max(1, gpu_count()) if on_gpu else 1
        answers = StoredAnswers(repository, pipelines.values(), call_model, instances)
        metrics = TritonMetrics(pipelines, self.model)
        streams = self.model == STREAM
        common = pipelines, settings, call_model, metrics, answers.check, instances
        self._service = Service(*common, streams=streams)
        self._forwarded = Forwarded.by_server(os.getpid())

    def execute(self, requests: list[Any]) -> None:
        """Takes requests over; each is answered exactly once, by its sender."""
        for request in requests:
            sender = _Sender(request.get_response_sender(), self.model)
            self._service.handle(sender, partial(self._read, request), request.timeout() / 1e6)

    def finalize(self) -> None:
        """Lets the requests in flight finish."""
        self._service.close()

    def _read(self, request: Any) -> tuple[Tensors, Sequence[str]]:
        parameters = self._forwarded.check(request.parameters)
        names = in_contract_order(request.requested_output_names())
        return read_tensors(request), as_asked(names, parameters)


class StreamPythonModel(TritonPythonModel):
    """The orchestrator with previews. Its settings are those of `flowturbo`."""

    model = STREAM

    def settings(self, args: dict[str, str]) -> Settings:
        """Those of the orchestrator."""
        return Settings.load(repository_of(args))


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
