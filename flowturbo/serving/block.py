"""Triton Python-backend model that evaluates an exported network beside it.

It is for servers that have only the Python backend. On a CPU it runs ONNX Runtime, OpenVINO or
PyTorch, on a GPU PyTorch. Triton's dynamic batcher may pass several requests at once: their rows
are evaluated as one batch. A step block can make several calls in one execution.
"""

import itertools
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from flowturbo import contract
from flowturbo.contract import SCALAR_COLUMNS, SCALARS, SOLVER, VELOCITY, Role, X, model_name
from flowturbo.errors import NotFiniteError, RequestError
from flowturbo.generate import check_finite
from flowturbo.learned import OwnSolvers
from flowturbo.parity import TOLERANCES, Figures, batches_up_to
from flowturbo.pipeline import installed, solvers_path
from flowturbo.rows import Tensors, row_count
from flowturbo.runtimes import Model, limit_numpy_threads, model_file, open_model
from flowturbo.serving.triton_io import error_response, repository_of
from flowturbo.solvers import Solvers

# On a CPU the networks fill all cores. The processes that take requests and answer them come first:
# they need little, but at once.
_NICE = 5
_MAGNITUDE = contract.DECODER_OUTPUTS[1].name


class TritonPythonModel:
    """Batched evaluation of one composed model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads this version's file; on a GPU, captures a graph for each batch size."""
        config = json.loads(args["model_config"])
        stated = {name: value["string_value"] for name, value in config["parameters"].items()}
        runtime = stated["runtime"]
        path = Path(args["model_repository"]) / args["model_version"] / model_file(runtime)
        self._model: Model
        if args["model_instance_kind"] == "GPU":
            from flowturbo.nets.torch_runtime import TorchModel

            # None where sizes vary: a graph is of one shape.
            graph_rows = [int(rows) for rows in stated["graph_rows"].split(",") if rows]
            device = f"cuda:{args['model_instance_device_id']}"
            self._model = TorchModel(path, device, graph_rows=graph_rows)
            # The export verified the network before it was compiled and captured.
            figures = Figures.load(Path(args["model_repository"]))
            allowed, batches = (
                TOLERANCES[stated["precision"]],
                batches_up_to(int(config["max_batch_size"])),
            )
            figures.check(config["name"], self._model, allowed, batches)
        else:
            os.nice(_NICE)
            fixed = [int(rows) for rows in stated.get("fixed_rows", "").split(",") if rows]
            self._model = open_model(path, stated["precision"], runtime=runtime, fixed_rows=fixed)
            limit_numpy_threads()
        self._name = config["name"]
        self._solvers = OwnSolvers(partial(_solvers_of, repository_of(args), self._name))
        self._inputs = [entry["name"] for entry in config["input"]]
        self._outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Evaluates the rows of all `requests` together; an error goes to each of them."""
        try:
            return self._evaluate(requests)
        except Exception as error:
            return [error_response(self._name, error) for _ in requests]

    def _evaluate(self, requests: list[Any]) -> list[Any]:
        per_request = [self._read(request) for request in requests]
        if len(requests) == 1:  # the usual case: the orchestrator has joined the rows already
            return [self._answer(requests[0], self._run(per_request[0]))]
        if any(SOLVER in tensors for tensors in per_request):  # they may name different ones
            return [self.execute([request])[0] for request in requests]
        joined = {
            name: np.concatenate([tensors[name] for tensors in per_request])
            for name in per_request[0]
        }
        outputs = self._run(joined)
        ends = np.cumsum([row_count(tensors) for tensors in per_request])[:-1]
        split = zip(*(np.split(output, ends) for output in outputs), strict=True)
        return [self._answer(*pair) for pair in zip(requests, split, strict=True)]

    def _run(self, tensors: Tensors) -> tuple[np.ndarray, ...]:
        """One call, those of all columns of `scalars`, or those of a solver, one after another."""
        if SCALARS not in tensors:
            return self._model(tensors)
        if SOLVER in tensors:
            return self._solvers.run(tensors, self._model)
        columns = tensors[SCALARS].shape[1]
        if not columns or columns % SCALAR_COLUMNS:
            raise RequestError(
                f"{SCALARS} must have {SCALAR_COLUMNS} columns for each call, got {columns}"
            )
        for scalars in np.split(tensors[SCALARS], columns // SCALAR_COLUMNS, axis=1):
            outputs = self._model(tensors | {SCALARS: np.ascontiguousarray(scalars)})
            tensors = tensors | {X: outputs[0], VELOCITY: outputs[1]}
        return outputs

    def _answer(self, request: Any, parts: tuple[np.ndarray, ...]) -> Any:
        named = dict(zip(self._outputs, parts, strict=True))
        # A caller that does not ask for the magnitude does not check whether the image is finite.
        if _MAGNITUDE in named and _MAGNITUDE not in request.requested_output_names():
            try:
                check_finite(named[_MAGNITUDE], "image")
            except NotFiniteError as error:
                return error_response(self._name, error)
        return pb_utils.InferenceResponse(list(itertools.starmap(pb_utils.Tensor, named.items())))

    def _read(self, request: Any) -> Tensors:
        found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self._inputs}
        return {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}


def _solvers_of(repository: Path, predictor: str) -> Solvers | None:
    """The solvers of the pipeline with this predictor; None if it has none."""
    for name in installed(repository):
        path = solvers_path(repository, name)
        if model_name(name, Role.PREDICTOR) == predictor and path.is_file():
            return Solvers.read(path)
    return None
