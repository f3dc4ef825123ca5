"""Triton Python-backend model: the first step of an ensemble, from a request to its rows."""

import json
import os
from typing import Any

import triton_python_backend_utils as pb_utils

from flowturbo import contract
from flowturbo.ensemble import plan, read_request
from flowturbo.generate import program_for
from flowturbo.pipeline import read_pipeline
from flowturbo.serving.forwarded import Forwarded
from flowturbo.serving.triton_io import (
    error_response,
    read_settings,
    read_tensors,
    repository_of,
)
from flowturbo.solver.calls import Variant


class TritonPythonModel:
    """The planner of one schedule of one pipeline, which its settings name as the defaults."""

    def initialize(self, args: dict[str, str]) -> None:
        """Compiles the program; the ensemble has the wiring of its calls."""
        self._settings = read_settings(args)
        self._pipeline = read_pipeline(repository_of(args), self._settings.default_pipeline)
        schedule = self._pipeline.find_schedule(self._settings.default_schedule)
        variant, trained = Variant(self._settings.variant), self._pipeline.trained_step
        self._program = program_for(schedule, variant, trained=trained)
        self._calls = contract.planned_calls(json.loads(args["model_config"])["output"])
        self._forwarded = Forwarded.by_server(os.getpid())

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers each request separately, so that a bad one does not affect the others."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            self._forwarded.check(request.parameters)
            checked = read_request(read_tensors(request), self._pipeline, self._settings)
            planned = plan(checked, self._pipeline, self._program, self._calls)
            return pb_utils.InferenceResponse([pb_utils.Tensor(*item) for item in planned.items()])
        except Exception as error:
            return error_response("planner", error)
