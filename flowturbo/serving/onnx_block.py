"""Triton Python-backend model that evaluates an exported ONNX file beside it.

For servers that have only the Python backend. Triton's dynamic batcher may hand several requests
at once, whose rows are evaluated as one batch.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from flowturbo import contract
from flowturbo.errors import NotFiniteError
from flowturbo.generate import check_finite
from flowturbo.onnx_session import open_model
from flowturbo.serving.triton_io import error_response

_MAGNITUDE = contract.DECODER_OUTPUTS[1].name


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
        self._name = config["name"]
        self._inputs = [entry["name"] for entry in config["input"]]
        self._outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Evaluates the rows of all `requests` together, or says to each what went wrong."""
        try:
            return self._evaluate(requests)
        except Exception as error:
            return [error_response(self._name, error) for _ in requests]

    def _evaluate(self, requests: list[Any]) -> list[Any]:
        per_request = [[self._read(request, name) for name in self._inputs] for request in requests]
        if len(requests) == 1:  # the usual one: the orchestrator has gathered the rows already
            joined = per_request[0]
        else:
            joined = [np.concatenate(parts) for parts in zip(*per_request, strict=True)]
        outputs = self._model(dict(zip(self._inputs, joined, strict=True)))
        ends = np.cumsum([len(tensors[0]) for tensors in per_request])[:-1]
        split = zip(*(np.split(output, ends) for output in outputs), strict=True)
        return [self._answer(*pair) for pair in zip(requests, split, strict=True)]

    def _answer(self, request: Any, parts: tuple[np.ndarray, ...]) -> Any:
        named = dict(zip(self._outputs, parts, strict=True))
        # Whoever does not ask for the magnitude does not look whether the image is finite: then it
        # is checked here.
        if _MAGNITUDE in named and _MAGNITUDE not in request.requested_output_names():
            try:
                check_finite(named[_MAGNITUDE], "image")
            except NotFiniteError as error:
                return error_response(self._name, error)
        return pb_utils.InferenceResponse(list(itertools.starmap(pb_utils.Tensor, named.items())))

    def _read(self, request: Any, name: str) -> np.ndarray:
        tensor: np.ndarray = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        return tensor
