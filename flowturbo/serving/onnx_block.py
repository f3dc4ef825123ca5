"""Triton Python-backend model that evaluates an exported ONNX file beside it.

For servers that have only the Python backend. Triton's dynamic batcher may hand several requests
at once, whose rows are evaluated as one batch.
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
        """Evaluates the rows of all `requests` together."""
        per_request = [[self._read(request, name) for name in self._inputs] for request in requests]
        if len(requests) == 1:  # the usual one: the orchestrator has gathered the rows already
            joined = per_request[0]
        else:
            joined = [np.concatenate(parts) for parts in zip(*per_request, strict=True)]
        outputs = self._model(dict(zip(self._inputs, joined, strict=True)))
        ends = np.cumsum([len(tensors[0]) for tensors in per_request])[:-1]
        split = zip(*(np.split(output, ends) for output in outputs), strict=True)
        return [
            pb_utils.InferenceResponse(list(map(pb_utils.Tensor, self._outputs, parts)))
            for parts in split
        ]

    def _read(self, request: Any, name: str) -> np.ndarray:
        tensor: np.ndarray = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        return tensor
