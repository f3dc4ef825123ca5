"""Opens exported models, for the server and in-process: the one place for runtime options."""

import ctypes
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from threadpoolctl import ThreadpoolController

from flowturbo.errors import RepositoryError
from flowturbo.rows import Tensors, in_batches, row_count

# Each runtime and the Python package that it needs.
RUNTIMES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "torch": "torch"}
_CUDA = "CUDAExecutionProvider"
_ANY = -1  # number of rows
_OPENVINO_TYPES = {"fp32": "f32", "bf16": "bf16"}


class Model(Protocol):
    """A loaded model: maps input tensors by name to outputs in the model's order."""

    on_gpu: bool

    def __call__(self, inputs: Tensors) -> tuple[np.ndarray, ...]: ...


def runtime_for(precision: str) -> str:
    """The default runtime for `precision`: ONNX Runtime, except for bf16, which it lacks."""
    return "openvino" if precision == "bf16" else "onnxruntime"


def model_file(runtime: str) -> str:
    """The name of the file that a runtime loads from a model's version folder."""
    return "model.pt2" if runtime == "torch" else "model.onnx"


def open_model(
    path: Path,
    precision: str = "fp32",
    threads: int | None = None,
    runtime: str | None = None,
    *,
    on_gpu: bool = False,
    fixed_rows: Sequence[int] = (),
) -> Model:
    """Loads the file `path` (see `model_file`) in one of RUNTIMES, to compute in `precision`.

    ONNX Runtime and PyTorch compute in the file's own types. ONNX Runtime uses a GPU if it supports
    one. PyTorch uses the first GPU if `on_gpu`. OpenVINO runs on a CPU; it can run a float32 file
    in bfloat16. There `fixed_rows` replace the program for any number of rows by faster ones, each
    for batches of that many. `threads` None means one per usable core. Raises RepositoryError if
    the runtime is not installed.
    """
    chosen = runtime or runtime_for(precision)
    try:
        if chosen == "torch":
            from flowturbo.nets.torch_runtime import TorchModel

            return TorchModel(path, "cuda:0" if on_gpu else "cpu", threads)
        if chosen == "openvino":
            return OpenVinoModel(path, precision, threads, fixed_rows)
        return OnnxRuntimeModel(path, threads)
    except ImportError as error:
        raise RepositoryError(
            f"{path} runs in {chosen}, which is not installed: pip install {RUNTIMES[chosen]}, or "
            "export again"
        ) from error


def limit_numpy_threads() -> Any:
    """Numpy's products take one thread from now on.

    The products of solvers are small, and the threads of a CPU's networks fill all cores. With a
    second thread they take longer.
    """
    return _blas_of_numpy().limit(limits=1)


@cache
def _blas_of_numpy() -> ThreadpoolController:
    """Only the library in numpy's own package: PyTorch may have another one."""
    found = ThreadpoolController()
    paths = [each["filepath"] for each in found.info() if "numpy" in each["filepath"]]
    return found.select(filepath=paths)


class _OneNumpyThread:
    """As `limit_numpy_threads`, until the last of all threads within has left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._within += 1
            if self._within == 1:
                self._limit = limit_numpy_threads()

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                self._limit.restore_original_limits()


ONE_NUMPY_THREAD = _OneNumpyThread()


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _trim() -> None:
    """Gives freed memory back to the system: compilers leave tens of megabytes."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class OnnxRuntimeModel:
    """An exported model in ONNX Runtime."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        options.log_severity_level = 3
        # No spinning: idle threads of one model must not take cores from another model.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
        if _CUDA in onnxruntime.get_available_providers():
            providers.insert(0, (_CUDA, {"use_tf32": "0"}))  # fp32 means full float32
        self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        self.on_gpu = _CUDA in self._session.get_providers()

    def __call__(self, inputs: Tensors) -> tuple[np.ndarray, ...]:
        """Outputs [rows, ...] in the model's order."""
        return tuple(self._session.run(None, inputs))


class OpenVinoModel:
    """An exported float32 or bfloat16 model in OpenVINO on the CPU."""

    on_gpu = False

    def __init__(
        self,
        path: Path,
        precision: str,
        threads: int | None = None,
        fixed_rows: Sequence[int] = (),
    ) -> None:
        import openvino

        core = openvino.Core()
        options = {
            "INFERENCE_NUM_THREADS": threads or usable_cores(),
            "INFERENCE_PRECISION_HINT": _OPENVINO_TYPES[precision],
            "PERFORMANCE_HINT": "LATENCY",
        }
        graph = core.read_model(path)
        # The tanh form of GELU takes twice as long as the product before it. The two forms differ
        # by 5e-4, less than bfloat16 rounds.
        for operation in graph.get_ops() if precision == "bf16" else ():
            if operation.get_type_name() == "Gelu":
                operation.set_attribute("approximation_mode", "erf")
        _transpose_weights(graph)
        rows_of = {each: list(each.get_partial_shape())[1:] for each in graph.inputs}
        self._models = {}
        for rows in fixed_rows or (_ANY,):  # of one graph: its programs share what is in the file
            shapes = {each: openvino.PartialShape([rows, *of]) for each, of in rows_of.items()}
            graph.reshape(shapes)
            self._models[rows] = core.compile_model(graph, "CPU", options)
        del graph
        _trim()

    def __call__(self, inputs: Tensors) -> tuple[np.ndarray, ...]:
        """Outputs [rows, ...] in the model's order."""
        if _ANY in self._models:
            return _outputs(self._models[_ANY], inputs)
        # A model has programs of fixed rows, or one for any number: that one rounds differently in
        # bfloat16, and an image would depend on the rows beside it.
        parts = []
        for batch, count in in_batches(inputs, tuple(self._models)):
            program = self._models[row_count(batch)]
            parts.append([output[:count] for output in _outputs(program, batch)])
        return tuple(map(np.concatenate, zip(*parts, strict=True)))


def _transpose_weights(graph: Any) -> None:
    """Stores the weights of products as OpenVINO computes: else each program has a copy."""
    import openvino
    from openvino import opset8

    for product in graph.get_ops():
        if product.get_type_name() != "MatMul" or product.get_attributes()["transpose_b"]:
            continue
        weights = product.input_value(1).get_node()
        is_float = product.get_input_element_type(1) == openvino.Type.f32
        if weights.get_type_name() == "Constant" and is_float and weights.data.ndim == 2:
            turned = opset8.constant(np.ascontiguousarray(weights.data.T))
            product.input(1).replace_source_output(turned.output(0))
            product.set_attribute("transpose_b", True)


def _outputs(model: Any, inputs: Tensors) -> tuple[np.ndarray, ...]:
    results = model(inputs)
    return tuple(np.array(results[k]) for k in range(len(model.outputs)))
