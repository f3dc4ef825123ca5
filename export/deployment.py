"""How a composed model is deployed: its Triton configuration for each engine."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tritonclient.grpc import model_config_pb2

from flowturbo.contract import Specs, TensorSpec, run_inputs

ENGINES = ("python", "onnxruntime", "tensorrt")
AUTO = "auto"  # chosen by measurement: export/runtime.py
PROVIDERS = ("cpu", "cuda", "tensorrt")
# Cache for the engines that ONNX Runtime's TensorRT provider builds. It is a volume, because the
# server mounts the repository read-only.
ENGINE_CACHE = "/var/cache/flowturbo"
# CUDA graphs save launch overhead, which matters in small batches only. Guided rows are pairs.
_GRAPH_ROWS = (1, 2, 4, 6, 8, 10, 12, 14, 16, 24, 32, 48, 64)
_TRITON_TYPES = {
    np.float32: model_config_pb2.TYPE_FP32,
    np.float16: model_config_pb2.TYPE_FP16,
    np.bool_: model_config_pb2.TYPE_BOOL,
    np.int64: model_config_pb2.TYPE_INT64,
    np.int32: model_config_pb2.TYPE_INT32,
    np.uint8: model_config_pb2.TYPE_UINT8,
    np.object_: model_config_pb2.TYPE_STRING,
}
_GROUP = model_config_pb2.ModelInstanceGroup


@dataclass(frozen=True)
class Deployment:
    """What evaluates the composed models, and how many rows at a time.

    `engine` is the Triton backend. `runtime` evaluates the models within the Python backend.
    `provider` is the execution provider of the ONNX Runtime backend. For PyTorch within the Python
    backend it is "cuda" or "cpu". `precision` is that of the networks: the inputs, outputs and
    update of a block are float32. `max_rows` determines max_batch_size, the engines' profiles, the
    warm-up and the CUDA graphs. Kernels are chosen for `opt_rows`.
    """

    engine: str = "python"
    provider: str = "cuda"
    runtime: str = AUTO
    precision: str = "fp32"
    max_rows: int = 64
    opt_rows: int = 16

    @property
    def on_gpu(self) -> bool:
        """Whether the composed models run on GPUs."""
        chooses = self.engine == "onnxruntime" or (self.engine, self.runtime) == ("python", "torch")
        return self.engine == "tensorrt" or (chooses and self.provider != "cpu")

    @property
    def profile(self) -> tuple[int, int, int]:
        """Minimum, optimum and maximum rows of an engine with one optimization profile."""
        return 1, min(self.opt_rows, self.max_rows), self.max_rows

    @property
    def profiles(self) -> list[tuple[int, int, int]]:
        """The profiles of an engine with kernels for one image, for `opt_rows` and for `max_rows`.

        Each profile accepts every batch size. Triton captures every CUDA graph in every profile,
        and logs an error for a graph that does not fit.
        """
        best = {2, min(self.opt_rows, self.max_rows), self.max_rows}
        return [(1, rows, self.max_rows) for rows in sorted(best)]

    @property
    def graph_rows(self) -> tuple[int, ...]:
        """Batch sizes to warm up, and to capture as CUDA graphs where the engine has them."""
        return tuple(sorted({*(n for n in _GRAPH_ROWS if n < self.max_rows), self.max_rows}))


def model_config(
    model: str,
    tensors: tuple[Specs, Specs],
    sizes: Mapping[int | str, int],
    deployment: Deployment,
    engine_files: Mapping[str, str],
    digest: str,
    profiles: int | None = None,
    fixed_rows: Sequence[int] = (),
) -> model_config_pb2.ModelConfig:
    """Triton's configuration of a composed model with the inputs and outputs `tensors`.

    `sizes` has the values of C, h, w (and H, W); -1 means that they vary. `profiles` is the number
    of an engine's profiles, if it is not that of `deployment`. `engine_files` has the TensorRT
    engine's file for each compute capability, such as {"8.9": "model.plan"}. `digest` identifies
    the weights. `fixed_rows` are those of the model's record.
    """
    config = model_config_pb2.ModelConfig(
        name=model, backend=deployment.engine, max_batch_size=deployment.max_rows
    )
    inputs, outputs = tensors
    if deployment.engine == "python":
        inputs = run_inputs(inputs)
    varying = -1 in sizes.values()
    add_tensors(config, inputs, outputs, sizes)
    if not deployment.on_gpu:
        # No queue policy: with a limit or a timeout, Triton's batcher prepares no batch ahead. A
        # request that arrives just before the instance is free can then wait 500 ms (seen on
        # 24.10). Not on GPUs: there it would join batches that the orchestrator spreads over them.
        config.dynamic_batching.SetInParent()
    if deployment.engine == "tensorrt":
        _use_engines(config, deployment, engine_files, graphs=not varying)
    elif deployment.engine == "onnxruntime":
        config.platform = "onnxruntime_onnx"
        if deployment.provider == "cuda":
            _use_cuda(config, deployment)
        elif deployment.provider == "tensorrt":
            _use_tensorrt_provider(config, deployment, inputs, sizes, digest)
    if deployment.on_gpu:
        # One instance per GPU that the server sees.
        group = config.instance_group.add(count=1, kind=_GROUP.KIND_GPU)
        if deployment.engine == "tensorrt":
            count = profiles or len(deployment.profiles)
            group.profile.extend(str(k) for k in range(count))
        if deployment.engine == "python":  # this model captures its graphs at load time
            rows = "" if varying else ",".join(map(str, deployment.graph_rows))
            config.parameters["graph_rows"].string_value = rows
        elif not varying:
            for count in deployment.graph_rows:
                _warm_up(config, count, inputs, sizes)
    else:
        config.instance_group.add(count=1, kind=_GROUP.KIND_CPU)
        if fixed_rows:
            config.parameters["fixed_rows"].string_value = ",".join(map(str, fixed_rows))
    config.parameters["precision"].string_value = deployment.precision
    config.parameters["runtime"].string_value = deployment.runtime
    return config


def add_tensors(
    config: model_config_pb2.ModelConfig,
    inputs: Iterable[TensorSpec],
    outputs: Iterable[TensorSpec],
    sizes: Mapping[int | str, int],
) -> None:
    """Declares a model's inputs and outputs; `sizes` as in `model_config`."""
    for spec in inputs:
        entry = config.input.add(name=spec.name, data_type=_TRITON_TYPES[spec.dtype])
        entry.dims.extend(_dims(spec, sizes))
        entry.optional = spec.optional
    for spec in outputs:
        result = config.output.add(name=spec.name, data_type=_TRITON_TYPES[spec.dtype])
        result.dims.extend(_dims(spec, sizes))


def _dims(spec: TensorSpec, sizes: Mapping[int | str, int]) -> list[int]:
    return [int(sizes.get(dim, dim)) for dim in spec.dims]


def _use_engines(
    config: model_config_pb2.ModelConfig,
    deployment: Deployment,
    engine_files: Mapping[str, str],
    *,
    graphs: bool,
) -> None:
    config.platform = "tensorrt_plan"
    for capability, file in engine_files.items():
        config.cc_model_filenames[capability] = file
    if not graphs:  # Triton captures them for one shape of a row
        return
    config.optimization.cuda.graphs = True
    for rows in deployment.graph_rows:
        config.optimization.cuda.graph_spec.add(batch_size=rows)


def _use_cuda(config: model_config_pb2.ModelConfig, deployment: Deployment) -> None:
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    accelerator = accelerators.add(name="cuda")
    if deployment.precision == "fp32":  # TF32 has less precision
        accelerator.parameters["use_tf32"] = "0"


def _use_tensorrt_provider(
    config: model_config_pb2.ModelConfig,
    deployment: Deployment,
    inputs: tuple[TensorSpec, ...],
    sizes: Mapping[int | str, int],
    digest: str,
) -> None:
    """Sets up ONNX Runtime's TensorRT provider. Without a profile it builds one engine per batch.

    From TensorRT 11 on, networks are strongly typed: the types are those of the file. Options that
    chose types before are gone (`precision_mode`, which the backend maps to `trt_fp16_enable`).
    """
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    parameters = accelerators.add(name="tensorrt").parameters
    parameters["trt_engine_cache_enable"] = "1"
    parameters["trt_engine_cache_path"] = ENGINE_CACHE
    # The provider finds cached engines by name only: other weights need another name.
    parameters["trt_engine_cache_prefix"] = f"{config.name}_{digest[:16]}"
    parameters["trt_timing_cache_enable"] = "1"
    for end, rows in zip(("min", "opt", "max"), deployment.profile, strict=True):
        shapes = [f"{s.name}:{'x'.join(map(str, [rows, *_dims(s, sizes)]))}" for s in inputs]
        parameters[f"trt_profile_{end}_shapes"] = ",".join(shapes)


def _warm_up(
    config: model_config_pb2.ModelConfig,
    rows: int,
    inputs: tuple[TensorSpec, ...],
    sizes: Mapping[int | str, int],
) -> None:
    sample = config.model_warmup.add(name=f"{rows} rows", batch_size=rows)
    for spec in inputs:
        entry = sample.inputs[spec.name]
        entry.data_type = _TRITON_TYPES[spec.dtype]
        entry.dims.extend(_dims(spec, sizes))
        entry.zero_data = True
