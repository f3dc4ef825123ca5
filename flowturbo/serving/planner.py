"""Triton Python-backend model: the first step of an ensemble, from a request to its rows."""

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from flowturbo.ensemble import plan, read_request
from flowturbo.errors import FlowTurboError, RequestError
from flowturbo.generate import program_for
from flowturbo.program import Variant
from flowturbo.repository import Pipeline, Settings
from flowturbo.schedule import Schedule
from flowturbo.serving.metrics import CODES, outcome_of


class TritonPythonModel:
    """The planner of one schedule: its config's `default_schedule`, among other settings."""

    def initialize(self, args: dict[str, str]) -> None:
        """Compiles the program; its wiring is the ensemble's."""
        parameters = json.loads(args["model_config"])["parameters"]
        self._settings = Settings.from_parameters(
            {name: value["string_value"] for name, value in parameters.items()}
        )
        self._pipeline = Pipeline.load(Path(args["model_repository"]).parent)
        schedule = Schedule.parse(self._settings.default_schedule)
        self._program = program_for(schedule, Variant(self._settings.variant))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers each request on its own: a bad one disturbs no other."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            tensors = {tensor.name(): _array(tensor) for tensor in request.inputs()}
            checked = read_request(tensors, self._pipeline, self._settings)
            planned = plan(checked, self._pipeline, self._program)
            return pb_utils.InferenceResponse([pb_utils.Tensor(*item) for item in planned.items()])
        except Exception as error:
            return _error_response(error)


def _array(tensor: Any) -> Any:
    try:
        return tensor.as_numpy()
    except Exception as error:
        raise RequestError(f"{tensor.name()} cannot be read: {error}") from error


def _error_response(error: Exception) -> Any:
    message = str(error)
    if not isinstance(error, FlowTurboError):
        message = f"internal error, {type(error).__name__}: {error}"
        pb_utils.Logger.log_error(f"planner: {message}")
    code = getattr(pb_utils.TritonError, CODES[outcome_of(error)])
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
