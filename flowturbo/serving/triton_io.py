"""Triton's settings, input tensors and errors: shared code of the Python-backend models."""

import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from flowturbo.errors import FlowTurboError, RequestError
from flowturbo.rows import Tensors
from flowturbo.serving.outcomes import CODES, as_told, failure, incomplete, outcome_of
from flowturbo.settings import Settings

_GRPC_NAMES = {"INVALID_ARG": "INVALID_ARGUMENT"}


def repository_of(args: dict[str, str]) -> Path:
    """The model repository of the model with these `initialize` arguments."""
    return Path(args["model_repository"]).parent


def read_settings(args: dict[str, str]) -> Settings:
    """The settings in the `parameters` of the model's configuration. Raises RepositoryError."""
    parameters = json.loads(args["model_config"])["parameters"]
    return Settings.from_parameters(
        {name: value["string_value"] for name, value in parameters.items()}
    )


def read_tensors(request: Any) -> dict[str, np.ndarray]:
    """Copies of the inputs, by name. Triton may reuse its memory after `execute` has returned."""
    return {tensor.name(): _array(tensor) for tensor in request.inputs()}


def _array(tensor: Any) -> np.ndarray:
    try:
        array: np.ndarray = tensor.as_numpy()
    except Exception as error:
        raise RequestError(f"{tensor.name()} cannot be read: {error}") from error
    return array.copy()


def told(model: str, error: BaseException) -> FlowTurboError:
    """`error` as a caller is told it. It is logged if the server is at fault."""
    found = as_told(error)
    if found is not error:
        lines = "".join(traceback.format_exception(error)).rstrip()
        pb_utils.Logger.log_error(f"{model}: {found}\n{lines}")
    elif outcome_of(found) in ("error", "unavailable"):
        pb_utils.Logger.log_error(f"{model}: {found}")
    return found


def error_response(model: str, error: BaseException, *, coded: bool = False) -> Any:
    """The response with `error`, which is logged if the server is at fault.

    With `coded` its gRPC code stands before the message, as in "[INVALID_ARGUMENT] ...": the
    answers of a stream have no codes.
    """
    found = told(model, error)
    code = CODES[outcome_of(found)]
    said = f"[{_GRPC_NAMES.get(code, code)}] {found}" if coded else str(found)
    status = getattr(pb_utils.TritonError, code)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(said, status))


def call_model(model: str, tensors: Tensors, names: Sequence[str]) -> tuple[np.ndarray, ...]:
    """One blocking call of another model. Returns the outputs in the order of `names`.

    Raises FlowTurboError if the model responds with an error, UnavailableError if it is gone.
    """
    response = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=list(names),
        inputs=[pb_utils.Tensor(name, value) for name, value in tensors.items()],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    ).exec()
    if response.has_error():
        raise failure(model, response.error().message())
    by_name = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
    if missing := [name for name in names if name not in by_name]:
        raise incomplete(model, missing)
    return tuple(by_name[name] for name in names)
