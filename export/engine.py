"""ONNX step blocks to TensorRT engines.

With the `tensorrt` package an engine is built for the GPU of this machine, which is what Triton's
TensorRT backend loads. TensorRT for RTX has the same interface and builds for a GPU that is not
here: that tries a network, and Triton cannot load what it makes.
"""

import importlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from flowturbo.errors import FlowTurboError
from flowturbo.gpu import GpuError, usable_gpus
from flowturbo.rows import Tensors

Profile = tuple[int, int, int]  # fewest, best and most rows

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # that TensorRT for RTX builds for
_KEPT_MESSAGES = 5


class EngineError(FlowTurboError):
    """TensorRT is not here, or refuses a network."""


@dataclass(frozen=True)
class Builder:
    """TensorRT and the GPU that it builds for.

    `version` is TensorRT's, with "rtx-" in front of TensorRT for RTX's; `capability` is the GPU's
    compute capability, such as "8.9", `gpu` its name, and `ordinal` its number here.
    """

    trt: ModuleType
    version: str
    capability: str
    gpu: str
    ordinal: int = 0

    @property
    def cross(self) -> bool:
        """Whether it builds for a GPU that is not here."""
        return self.version.startswith("rtx-")

    @property
    def file(self) -> str:
        """Name of this GPU's engine beside another's."""
        return f"model.sm{self.capability.replace('.', '')}.plan"

    def load(self, plan: Path) -> "TensorRtModel":
        """The engine `plan`, on this GPU; raises EngineError."""
        return TensorRtModel(self.trt, plan, self.ordinal)


def find_builders(capability: str | None) -> list[Builder]:
    """TensorRT for one GPU of each compute capability that is here.

    With a `capability` that is named, TensorRT for RTX for that. Raises EngineError, saying what is
    missing.
    """
    if capability:
        trt = _import("tensorrt_rtx", "tensorrt_rtx_bindings")
        if not trt:
            raise EngineError(
                f"--compute-capability {capability} needs TensorRT for RTX: "
                "pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings"
            )
        return [Builder(trt, f"rtx-{trt.__version__}", capability, f"any of {capability}")]
    try:
        trt = _import("tensorrt", "tensorrt_bindings")
        if not trt:
            raise GpuError("the tensorrt package is missing here")
        gpus = usable_gpus()
    except GpuError as error:
        raise EngineError(
            f"an engine is built on the GPU that runs it, and {error}. Export in the export image "
            "(docker compose --profile export run export), or try the network with "
            f"--compute-capability, one of {', '.join(CAPABILITIES)}"
        ) from error
    first = {gpu.capability: gpu for gpu in reversed(gpus)}
    return [
        Builder(trt, trt.__version__, gpu.capability, gpu.name, gpu.ordinal)
        for gpu in sorted(first.values(), key=lambda gpu: gpu.ordinal)
    ]


def _import(*names: str) -> ModuleType | None:
    for name in names:
        try:
            if name == "tensorrt_rtx_bindings":  # which does not look for its own libraries
                importlib.import_module("tensorrt_rtx_libs")
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def build_engine(
    builder: Builder, onnx: Path, plan: Path, profiles: Sequence[Profile], timing_cache: Path
) -> dict[str, Any]:
    """Writes the engine of `onnx` to `plan`; returns its entry in the record of its model.

    The network is strongly typed: every tensor keeps the type it has in the ONNX file. Kernels are
    chosen for each of `profiles`. Raises EngineError, naming the ONNX node where there is one.
    """
    trt, started = builder.trt, time.monotonic()
    if not builder.cross:
        _use_gpu(builder.ordinal)
    log = _log(trt)
    tool = trt.Builder(log)
    network = tool.create_network(_strong_typing(trt))
    _parse(trt.OnnxParser(network, log), onnx)
    config = tool.create_builder_config()
    config.progress_monitor = _progress(trt, plan.parent.parent.name)
    if (tf32 := getattr(trt.BuilderFlag, "TF32", None)) is not None:
        config.clear_flag(tf32)  # float32 blocks are verified as such
    for profile in profiles:
        _add_profile(tool, config, network, profile)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names the kernels chosen
    if builder.cross:
        config.num_compute_capabilities = 1
        name = f"SM{builder.capability.replace('.', '')}"
        config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)
    known = None if builder.cross else _use_timing_cache(config, timing_cache)
    built = tool.build_serialized_network(network, config)
    if built is None:
        raise EngineError(f"TensorRT cannot build {onnx}: {'; '.join(log.messages)}")
    with plan.open("wb") as file:
        file.write(built)
    if known is not None:
        _keep(known, timing_cache)
    inputs = [network.get_input(k) for k in range(network.num_inputs)]
    if shapes := [tensor.name for tensor in inputs if tensor.is_shape_tensor]:
        print(f"{plan}: TensorRT reads {shapes} as shapes: Triton captures no CUDA graphs for it")
    return {
        "file": plan.name,
        "tensorrt": builder.version,
        "gpu": builder.gpu,
        "compute_capability": builder.capability,
        "profiles": [list(profile) for profile in profiles],
        "shape_inputs": shapes,
        "seconds": round(time.monotonic() - started, 1),
        "bytes": plan.stat().st_size,
    }


def _strong_typing(trt: ModuleType) -> int:
    """The flags of a strongly typed network: none where there are no others (from TensorRT 11 on).

    TensorRT 11 still has the flag and takes no notice of it; later releases may drop it.
    """
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(parser: Any, onnx: Path) -> None:
    if parser.parse_from_file(str(onnx)):
        return
    errors = [parser.get_error(k) for k in range(parser.num_errors)]
    told = [f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}" for e in errors]
    raise EngineError(f"TensorRT cannot parse {onnx}: {'; '.join(told) or 'no reason given'}")


def _add_profile(tool: Any, config: Any, network: Any, rows: Profile) -> None:
    profile = tool.create_optimization_profile()
    for k in range(network.num_inputs):
        tensor = network.get_input(k)
        row = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, *((count, *row) for count in rows))
    config.add_optimization_profile(profile)


def _use_timing_cache(config: Any, path: Path) -> Any:
    """The cache that the build reads and extends; it must live as long as the build."""
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    # One of another GPU or TensorRT is refused: the build then starts with none.
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _keep(cache: Any, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(cache.serialize())
        partial.replace(path)
    except OSError as error:  # only the next build's time is lost
        print(f"the timing cache was not kept: {error}; --timing-cache names another folder")


def _log(trt: ModuleType) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps the last errors for the exception that follows them."""

        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.messages = [*self.messages, message][-_KEPT_MESSAGES:]

    return Log()


def _progress(trt: ModuleType, model: str) -> Any:
    class Progress(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """A line for each outer phase of the build."""

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                print(f"{model}: TensorRT: {phase} ({steps} steps)", flush=True)

        def step_complete(self, _phase: str, _step: int) -> bool:
            return True

        def phase_finish(self, phase: str) -> None: ...

    return Progress()


class TensorRtModel:
    """An engine on the GPU: input tensors by name to outputs in the engine's order.

    A batch runs in the profile whose best size is nearest, as Triton chooses it. Input and output
    buffers on the GPU are as large as the largest batch.
    """

    on_gpu = True

    def __init__(self, trt: ModuleType, plan: Path, ordinal: int = 0) -> None:
        self._trt, self._cuda, self._ordinal = trt, _use_gpu(ordinal), ordinal
        self._log = _log(trt)
        self._engine = trt.Runtime(self._log).deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise EngineError(f"TensorRT cannot load {plan}: {'; '.join(self._log.messages)}")
        self._stream = int(_done(self._cuda.cudaStreamCreate()))
        names = [self._engine.get_tensor_name(k) for k in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self._inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        dtypes = {name: self._engine.get_tensor_dtype(name) for name in names}
        self._dtypes = {name: np.dtype(trt.nptype(dtype)) for name, dtype in dtypes.items()}
        self._rows = {name: tuple(self._engine.get_tensor_shape(name))[1:] for name in names}
        self._profiles = [
            tuple(dims[0] for dims in self._engine.get_tensor_profile_shape(self._inputs[0], k))
            for k in range(self._engine.num_optimization_profiles)
        ]
        most = max(profile[2] for profile in self._profiles)
        self._buffers = {
            name: _done(self._cuda.cudaMalloc(most * math.prod(row) * self._dtypes[name].itemsize))
            for name, row in self._rows.items()
        }
        self._contexts = [self._new_context(k) for k in range(len(self._profiles))]

    def _new_context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, self._stream):
            raise EngineError(f"TensorRT cannot run: {'; '.join(self._log.messages)}")
        _done(self._cuda.cudaStreamSynchronize(self._stream))
        for name, buffer in self._buffers.items():
            if not context.set_tensor_address(name, buffer):
                raise EngineError(f"TensorRT refuses the memory of {name}: {self._log.messages}")
        return context

    def __call__(self, inputs: Tensors) -> tuple[np.ndarray, ...]:
        """Outputs [rows, ...] in the engine's order."""
        _done(self._cuda.cudaSetDevice(self._ordinal))
        copy = self._cuda.cudaMemcpyKind
        rows = len(inputs[self._inputs[0]])
        context = self._contexts[nearest_profile(self._profiles, rows)]
        for name in self._inputs:
            held = np.ascontiguousarray(inputs[name], self._dtypes[name])
            if not context.set_input_shape(name, held.shape):
                raise EngineError(f"TensorRT refuses {name} {held.shape}: {self._log.messages}")
            self._copy(self._buffers[name], held.ctypes.data, held, copy.cudaMemcpyHostToDevice)
        if not context.execute_async_v3(self._stream):
            raise EngineError(f"TensorRT failed: {'; '.join(self._log.messages)}")
        _done(self._cuda.cudaStreamSynchronize(self._stream))
        results = []
        for name in self._outputs:
            made = np.empty((rows, *self._rows[name]), self._dtypes[name])
            self._copy(made.ctypes.data, self._buffers[name], made, copy.cudaMemcpyDeviceToHost)
            results.append(made)
        return tuple(results)

    def _copy(self, target: int, source: int, array: np.ndarray, kind: Any) -> None:
        _done(self._cuda.cudaMemcpy(target, source, array.nbytes, kind))

    def fused_attentions(self) -> int | None:
        """How many of the engine's kernels are a whole attention, in its first profile.

        None where TensorRT does not tell its kernels.
        """
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._contexts[0]
        as_json = self._trt.LayerInformationFormat.JSON
        return count_fused(inspector.get_engine_information(as_json))


def nearest_profile(profiles: Sequence[Sequence[int]], rows: int) -> int:
    """The profile that Triton's TensorRT backend runs so many rows in (GetMostOptimizedProfile)."""
    fitting = [k for k, (least, _, most) in enumerate(profiles) if least <= rows <= most]
    if not fitting:
        raise EngineError(f"no profile of the engine takes {rows} rows: it has {profiles}")
    return min(fitting, key=lambda k: abs(profiles[k][1] - rows))


def count_fused(information: str) -> int | None:
    """How many layers run a kernel of fused attention; `information` is the inspector's JSON.

    None for another form: a report must not end an export.
    """
    try:
        # By the kernel, such as `_gemm_mha_v2_0x95…`: names of layers come from the network.
        kernels = [layer.get("TacticName", "") for layer in json.loads(information)["Layers"]]
        return sum("mha" in kernel.lower() for kernel in kernels)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _use_gpu(ordinal: int) -> Any:
    """CUDA's runtime, with this thread on the GPU of that number; raises EngineError."""
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EngineError(
            "an engine is checked on its GPU, and CUDA's bindings are missing here: "
            "pip install cuda-bindings"
        ) from error
    _done(runtime.cudaSetDevice(ordinal))
    return runtime


def _done(result: Sequence[Any]) -> Any:
    """The value of a call of CUDA's runtime; raises EngineError with its error."""
    error, *values = result
    if int(error):
        raise EngineError(f"CUDA failed: {error.name}")
    return values[0] if values else None
