"""Triton Python-backend model that evaluates an exported ONNX file beside it.

For servers that have only the Python backend.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from flowturbo.onnx_session import open_model


class TritonPythonModel:
    """Batched evaluation of `model.onnx`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the ONNX file of this model's version."""
        folder = Path(args["model_repository"]) / args["model_version"]
        config = json.loads(args["model_config"])
        precision, runtime = (
            config["parameters"][name]["string_value"] for name in ("precision", "runtime")
        )
        self._model = open_model(folder / "model.onnx", precision, runtime=runtime)
        self._inputs = [entry["name"] for entry in config["input"]]
        self._outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Evaluates the rows of each request; the orchestrator has gathered them."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        outputs = self._model({name: self._read(request, name) for name in self._inputs})
        return pb_utils.InferenceResponse(list(map(pb_utils.Tensor, self._outputs, outputs)))

    def _read(self, request: Any, name: str) -> np.ndarray:
        tensor: np.ndarray = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        return tensor
