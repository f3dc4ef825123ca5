"""What the Python-backend models share: settings, input tensors and errors, as Triton has them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from flowturbo.errors import FlowTurboError, RequestError
from flowturbo.repository import Settings
from flowturbo.serving.metrics import CODES


def repository_of(args: dict[str, str]) -> Path:
    """The model repository that the model of `initialize`'s `args` stands in."""
    return Path(args["model_repository"]).parent


def read_settings(args: dict[str, str]) -> Settings:
    """The `parameters` in the model's configuration; raises RepositoryError."""
    parameters = json.loads(args["model_config"])["parameters"]
    return Settings.from_parameters(
        {name: value["string_value"] for name, value in parameters.items()}
    )


def read_tensors(request: Any) -> dict[str, np.ndarray]:
    """Copies of the inputs, by name: Triton's memory is not kept once `execute` has returned."""
    return {tensor.name(): _array(tensor) for tensor in request.inputs()}


def _array(tensor: Any) -> np.ndarray:
    try:
        array: np.ndarray = tensor.as_numpy()
    except Exception as error:
        raise RequestError(f"{tensor.name()} cannot be read: {error}") from error
    return array.copy()


def error_response(model: str, error: BaseException, outcome: str) -> Any:
    """The answer that carries `error`, logged if it is the server's own."""
    message = str(error)
    if not isinstance(error, FlowTurboError):
        message = f"internal error, {type(error).__name__}: {error}"
    if outcome == "error":
        pb_utils.Logger.log_error(f"{model}: {message}")
    code = getattr(pb_utils.TritonError, CODES[outcome])
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
