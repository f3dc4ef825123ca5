"""Builds TensorRT engines from ONNX files.

The `tensorrt` package builds an engine for the GPU of this machine. Triton's TensorRT backend loads
such engines. TensorRT for RTX has the same interface and can build for a GPU that is not here. That
is only a trial of the network: Triton cannot load the result.
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

Profile = tuple[int, int, int]  # minimum, optimum and maximum rows
Sides = tuple[int, int]  # height and width of a latent

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # targets of TensorRT for RTX
_KEPT_MESSAGES = 5


class EngineError(FlowTurboError):
    """TensorRT is missing, or it rejects a network."""


@dataclass(frozen=True)
class Builder:
    """TensorRT and the GPU that it builds for.

    `version` is the version of TensorRT; for TensorRT for RTX it starts with "rtx-". `capability`
    is the GPU's compute capability, such as "8.9". `gpu` is its name, `ordinal` its number on this
    machine.
    """

    trt: ModuleType
    version: str
    capability: str
    gpu: str
    ordinal: int = 0

    @property
    def cross(self) -> bool:
        """Whether it builds for a GPU that is not in this machine."""
        return self.version.startswith("rtx-")

    @property
    def file(self) -> str:
        """File name of this GPU's engine if the model already has another engine."""
        return f"model.sm{self.capability.replace('.', '')}.plan"

    def load(self, plan: Path) -> "TensorRtModel":
        """Loads the engine `plan` on this GPU. Raises EngineError."""
        return TensorRtModel(self.trt, plan, self.ordinal)


def find_builders(capability: str | None) -> list[Builder]:
    """One builder per compute capability of the GPUs here.

    If `capability` is given, one builder of TensorRT for RTX for it. Raises EngineError, which says
    what is missing.
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
            f"an engine is built on the GPU that runs it, but {error}. Export in the export image "
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
            if name == "tensorrt_rtx_bindings":  # does not load its own libraries
                importlib.import_module("tensorrt_rtx_libs")
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def build_engine(
    builder: Builder,
    onnx: Path,
    plan: Path,
    profiles: Sequence[Profile],
    timing_cache: Path,
    sides: Sequence[Sides] = (),
) -> dict[str, Any]:
    """Builds the engine of `onnx` and writes it to `plan`. Returns its entry for the model record.

    The network is strongly typed: every tensor keeps its type from the ONNX file. TensorRT chooses
    kernels for each of `profiles`. `sides` has the size of each profile if sizes vary: fixed sizes,
    because wide ranges gave NaN (TensorRT #2943). Raises EngineError, which names the ONNX node if
    it is known.
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
        config.clear_flag(tf32)  # float32 blocks are verified with float32 tolerances
    for k, profile in enumerate(profiles):
        _add_profile(tool, config, network, profile, sides[k] if sides else ())
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # keeps the kernels' names
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
        print(f"{plan}: TensorRT uses {shapes} as shape inputs, so Triton captures no CUDA graphs")
    return {
        "file": plan.name,
        "tensorrt": builder.version,
        "gpu": builder.gpu,
        "compute_capability": builder.capability,
        "profiles": [list(profile) for profile in profiles],
        "sides": [list(each) for each in sides],
        "shape_inputs": shapes,
        "seconds": round(time.monotonic() - started, 1),
        "bytes": plan.stat().st_size,
    }


def _strong_typing(trt: ModuleType) -> int:
    """The flags that make a network strongly typed; 0 if TensorRT has no such flag.

    From TensorRT 11 on all networks are strongly typed. TensorRT 11 still has the flag but ignores
    it; later releases may drop it.
    """
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(parser: Any, onnx: Path) -> None:
    if parser.parse_from_file(str(onnx)):
        return
    errors = [parser.get_error(k) for k in range(parser.num_errors)]
    told = [f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}" for e in errors]
    raise EngineError(f"TensorRT cannot parse {onnx}: {'; '.join(told) or 'no reason given'}")


def _add_profile(tool: Any, config: Any, network: Any, rows: Profile, sides: Sequence[int]) -> None:
    profile = tool.create_optimization_profile()
    for k in range(network.num_inputs):
        tensor, varying = network.get_input(k), iter(sides)
        row = tuple(next(varying) if side == -1 else side for side in tuple(tensor.shape)[1:])
        profile.set_shape(tensor.name, *((count, *row) for count in rows))
    config.add_optimization_profile(profile)


def _use_timing_cache(config: Any, path: Path) -> Any:
    """The timing cache that the build reads and extends. It must outlive the build."""
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    # TensorRT rejects a cache of another GPU or version: then start with an empty one.
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
    except OSError as error:  # not fatal: the next build only takes longer
        print(f"the timing cache was not saved: {error}; choose a folder with --timing-cache")


def _log(trt: ModuleType) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps the last errors for the message of the next exception."""

        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.messages = [*self.messages, message][-_KEPT_MESSAGES:]

    return Log()


def _progress(trt: ModuleType, model: str) -> Any:
    class Progress(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Prints one line per outer phase of the build."""

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                print(f"{model}: TensorRT: {phase} ({steps} steps)", flush=True)

        def step_complete(self, _phase: str, _step: int) -> bool:
            return True

        def phase_finish(self, phase: str) -> None: ...

    return Progress()


class TensorRtModel:
    """An engine on the GPU: maps input tensors by name to outputs in the engine's order.

    A batch runs in the profile with the nearest optimum size, as in Triton. The input and output
    buffers on the GPU hold the largest batch.
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
        profiles = range(self._engine.num_optimization_profiles)
        shapes = [self._engine.get_tensor_profile_shape(self._inputs[0], k) for k in profiles]
        self._profiles = [tuple(dims[0] for dims in each) for each in shapes]
        self._shapes = [tuple(each[2])[1:] for each in shapes]  # of a row of the first input
        self._contexts = [self._new_context(k) for k in profiles]
        largest = [self._largest(context, k) for k, context in enumerate(self._contexts)]
        self._buffers = {
            name: _done(self._cuda.cudaMalloc(max(each[name] for each in largest)))
            for name in names
        }
        for context in self._contexts:
            for name, buffer in self._buffers.items():
                if not context.set_tensor_address(name, buffer):
                    raise EngineError(f"TensorRT refuses memory of {name}: {self._log.messages}")

    def _new_context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, self._stream):
            raise EngineError(f"TensorRT cannot run: {'; '.join(self._log.messages)}")
        _done(self._cuda.cudaStreamSynchronize(self._stream))
        return context

    def _largest(self, context: Any, profile: int) -> dict[str, int]:
        """The bytes of every tensor of the largest batch of a profile."""
        for name in self._inputs:
            self._set_shape(context, name, self._engine.get_tensor_profile_shape(name, profile)[2])
        return {
            name: math.prod(context.get_tensor_shape(name)) * dtype.itemsize
            for name, dtype in self._dtypes.items()
        }

    def _set_shape(self, context: Any, name: str, shape: Sequence[int]) -> None:
        if not context.set_input_shape(name, tuple(shape)):
            raise EngineError(f"TensorRT refuses {name} {tuple(shape)}: {self._log.messages}")

    def __call__(self, inputs: Tensors) -> tuple[np.ndarray, ...]:
        """Outputs [rows, ...] in the engine's order."""
        _done(self._cuda.cudaSetDevice(self._ordinal))
        copy = self._cuda.cudaMemcpyKind
        first = inputs[self._inputs[0]]
        same = [k for k, shape in enumerate(self._shapes) if shape == first.shape[1:]]
        chosen = nearest_profile([self._profiles[k] for k in same], len(first))
        context = self._contexts[same[chosen]]
        for name in self._inputs:
            held = np.ascontiguousarray(inputs[name], self._dtypes[name])
            self._set_shape(context, name, held.shape)
            self._copy(self._buffers[name], held.ctypes.data, held, copy.cudaMemcpyHostToDevice)
        if not context.execute_async_v3(self._stream):
            raise EngineError(f"TensorRT failed: {'; '.join(self._log.messages)}")
        _done(self._cuda.cudaStreamSynchronize(self._stream))
        results = []
        for name in self._outputs:
            made = np.empty(tuple(context.get_tensor_shape(name)), self._dtypes[name])
            self._copy(made.ctypes.data, self._buffers[name], made, copy.cudaMemcpyDeviceToHost)
            results.append(made)
        return tuple(results)

    def _copy(self, target: int, source: int, array: np.ndarray, kind: Any) -> None:
        _done(self._cuda.cudaMemcpy(target, source, array.nbytes, kind))

    def fused_attentions(self) -> int | None:
        """The number of fused attention kernels in the first profile of the engine.

        None if TensorRT does not report the kernels.
        """
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._contexts[0]
        as_json = self._trt.LayerInformationFormat.JSON
        return count_fused(inspector.get_engine_information(as_json))


def nearest_profile(profiles: Sequence[Sequence[int]], rows: int) -> int:
    """The profile that Triton's TensorRT backend uses for `rows` rows (GetMostOptimizedProfile)."""
    fitting = [k for k, (least, _, most) in enumerate(profiles) if least <= rows <= most]
    if not fitting:
        raise EngineError(f"no profile of the engine takes {rows} rows: it has {profiles}")
    return min(fitting, key=lambda k: abs(profiles[k][1] - rows))


def count_fused(information: str) -> int | None:
    """The number of layers with a fused attention kernel; `information` is the inspector's JSON.

    None for JSON of another form, because a mere report must not stop an export.
    """
    try:
        # Kernel names such as `_gemm_mha_v2_0x95…`; layer names come from the network.
        kernels = [layer.get("TacticName", "") for layer in json.loads(information)["Layers"]]
        return sum("mha" in kernel.lower() for kernel in kernels)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _use_gpu(ordinal: int) -> Any:
    """Selects the GPU `ordinal` for this thread. Returns the CUDA runtime; raises EngineError."""
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EngineError(
            "an engine is checked on its GPU, but CUDA's Python bindings are missing: "
            "pip install cuda-bindings"
        ) from error
    _done(runtime.cudaSetDevice(ordinal))
    return runtime


def _done(result: Sequence[Any]) -> Any:
    """The value of a CUDA runtime call. Raises EngineError if the call failed."""
    error, *values = result
    if int(error):
        raise EngineError(f"CUDA failed: {error.name}")
    return values[0] if values else None
