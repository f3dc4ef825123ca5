"""ONNX step blocks to TensorRT engines.

With the `tensorrt` package an engine is built for the GPU of this machine, which is what Triton's
TensorRT backend loads. TensorRT for RTX has the same interface and builds for a GPU that is not
here: that tries a network, and Triton cannot load what it makes.
"""

import importlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from flowturbo.errors import FlowTurboError
from flowturbo.guidance import Tensors

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # that TensorRT for RTX builds for
_KEPT_MESSAGES = 5


class EngineError(FlowTurboError):
    """TensorRT is not here, or refuses a network."""


@dataclass(frozen=True)
class Builder:
    """TensorRT and the GPU that it builds for.

    `version` is TensorRT's, with "rtx-" in front of TensorRT for RTX's; `capability` is the GPU's
    compute capability, such as "8.9", and `gpu` its name.
    """

    trt: ModuleType
    version: str
    capability: str
    gpu: str

    @property
    def cross(self) -> bool:
        """Whether it builds for a GPU that is not here."""
        return self.version.startswith("rtx-")

    @property
    def file(self) -> str:
        """Name of this GPU's engine beside another's."""
        return f"model.sm{self.capability.replace('.', '')}.plan"


def find_builder(capability: str | None) -> Builder:
    """TensorRT for the GPU here, or TensorRT for RTX for a compute `capability` that is named.

    Raises EngineError, saying what is missing.
    """
    if capability:
        trt = _import("tensorrt_rtx", "tensorrt_rtx_bindings")
        if not trt:
            raise EngineError(
                f"--compute-capability {capability} needs TensorRT for RTX: "
                "pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings"
            )
        return Builder(trt, f"rtx-{trt.__version__}", capability, f"any of {capability}")
    import torch

    trt = _import("tensorrt")
    if not trt or not torch.cuda.is_available():
        missing = "a GPU" if trt else "the tensorrt package"
        raise EngineError(
            f"an engine is built on the GPU that runs it, and {missing} is missing here: export in "
            "the export image (docker compose --profile export run export), or try the network "
            f"with --compute-capability, one of {', '.join(CAPABILITIES)}"
        )
    major, minor = torch.cuda.get_device_capability()
    return Builder(trt, trt.__version__, f"{major}.{minor}", torch.cuda.get_device_name())


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
    builder: Builder, onnx: Path, plan: Path, profile: tuple[int, int, int], timing_cache: Path
) -> dict[str, Any]:
    """Writes the engine of `onnx` to `plan`; returns its record for build.json.

    The network is strongly typed: every tensor keeps the type it has in the ONNX file. `profile` is
    fewest, best and most rows. Raises EngineError, naming the ONNX node where there is one.
    """
    trt, started = builder.trt, time.monotonic()
    log = _log(trt)
    tool = trt.Builder(log)
    network = tool.create_network(_strong_typing(trt))
    _parse(trt.OnnxParser(network, log), onnx)
    config = tool.create_builder_config()
    config.progress_monitor = _progress(trt, plan.parent.parent.name)
    if (tf32 := getattr(trt.BuilderFlag, "TF32", None)) is not None:
        config.clear_flag(tf32)  # float32 blocks are verified as such
    _add_profile(tool, config, network, profile)
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
    return {
        "file": plan.name,
        "tensorrt": builder.version,
        "gpu": builder.gpu,
        "compute_capability": builder.capability,
        "rows": list(profile),
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


def _add_profile(tool: Any, config: Any, network: Any, rows: tuple[int, int, int]) -> None:
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
    """An engine on the GPU: input tensors by name to outputs in the engine's order."""

    def __init__(self, trt: ModuleType, plan: Path) -> None:
        self._log = _log(trt)
        self._engine = trt.Runtime(self._log).deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise EngineError(f"TensorRT cannot load {plan}: {'; '.join(self._log.messages)}")
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(k) for k in range(self._engine.num_io_tensors)]
        output = trt.TensorIOMode.OUTPUT
        self._outputs = [name for name in names if self._engine.get_tensor_mode(name) == output]
        self._dtypes: Mapping[str, Any] = {
            name: trt.nptype(self._engine.get_tensor_dtype(name)) for name in self._outputs
        }

    def __call__(self, inputs: Tensors) -> tuple[np.ndarray, ...]:
        """Outputs [rows, ...] in the engine's order."""
        import torch

        held = {name: torch.from_numpy(value).cuda() for name, value in inputs.items()}
        for name, tensor in held.items():
            self._context.set_input_shape(name, tuple(tensor.shape))
        results = []
        for name in self._outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            results.append(torch.from_numpy(np.empty(shape, self._dtypes[name])).cuda())
        for name, tensor in [*held.items(), *zip(self._outputs, results, strict=True)]:
            self._context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream()
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise EngineError(f"TensorRT failed: {'; '.join(self._log.messages)}")
        stream.synchronize()
        return tuple(result.cpu().numpy() for result in results)
