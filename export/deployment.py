"""How a composed model is deployed: Triton's configuration of it, in each of its forms."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from tritonclient.grpc import model_config_pb2

from flowturbo.contract import Specs, TensorSpec

ENGINES = ("python", "onnxruntime", "tensorrt")
AUTO = "auto"  # chosen by measurement: export/runtime.py
PROVIDERS = ("cpu", "cuda", "tensorrt")
# Where ONNX Runtime's TensorRT provider keeps the engines it builds: on a volume, not in the
# repository, which the server mounts read-only.
ENGINE_CACHE = "/var/cache/flowturbo"
# A graph saves launches, which show in small batches only; guided rows come in pairs.
_GRAPH_ROWS = (1, 2, 4, 6, 8, 10, 12, 14, 16, 24, 32, 48, 64)
_TRITON_TYPES = {
    np.float32: model_config_pb2.TYPE_FP32,
    np.int64: model_config_pb2.TYPE_INT64,
    np.int32: model_config_pb2.TYPE_INT32,
    np.uint8: model_config_pb2.TYPE_UINT8,
    np.object_: model_config_pb2.TYPE_STRING,
}
_GROUP = model_config_pb2.ModelInstanceGroup


@dataclass(frozen=True)
class Deployment:
    """What evaluates the composed models, and how many rows at a time.

    `engine` is the Triton backend, `runtime` what evaluates the models within the Python backend.
    `provider` is ONNX Runtime's where that is the backend; for PyTorch within the Python backend it
    is "cuda" or "cpu". Precision is the networks'; a block's inputs, outputs and update are
    float32. Of `max_rows` rows come max_batch_size, the engines' profiles, the warm-up and the CUDA
    graphs; kernels are chosen for `opt_rows`.
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
        """Fewest, best and most rows of an engine that has one set of kernels."""
        return 1, min(self.opt_rows, self.max_rows), self.max_rows

    @property
    def profiles(self) -> list[tuple[int, int, int]]:
        """Those of an engine that has kernels for a lone image, for usual and for full batches.

        Each takes every batch: Triton captures every CUDA graph in each of them, and logs an error
        for one that does not fit.
        """
        best = {2, min(self.opt_rows, self.max_rows), self.max_rows}
        return [(1, rows, self.max_rows) for rows in sorted(best)]

    @property
    def graph_rows(self) -> tuple[int, ...]:
        """Batch sizes that are warmed up, and captured as CUDA graphs where there are such."""
        return tuple(sorted({*(n for n in _GRAPH_ROWS if n < self.max_rows), self.max_rows}))


def model_config(
    model: str,
    tensors: tuple[Specs, Specs],
    sizes: Mapping[int | str, int],
    deployment: Deployment,
    engine_files: Mapping[str, str],
    digest: str,
) -> model_config_pb2.ModelConfig:
    """Triton's configuration of a composed model with the inputs and outputs `tensors`.

    `sizes` gives C, h, w (and H, W) in numbers, `engine_files` a TensorRT engine's file for each
    compute capability, such as {"8.9": "model.plan"}; `digest` tells these weights from others.
    """
    config = model_config_pb2.ModelConfig(
        name=model, backend=deployment.engine, max_batch_size=deployment.max_rows
    )
    inputs, outputs = tensors
    add_tensors(config, inputs, outputs, sizes)
    if not deployment.on_gpu:
        # No queue policy: with a limit or a timeout, Triton's batcher prepares no batch ahead, and
        # a request that comes just before the instance is free again can wait 500 ms (seen on
        # 24.10). On GPUs it would join what the orchestrator shares out among them.
        config.dynamic_batching.SetInParent()
    if deployment.engine == "tensorrt":
        _use_engines(config, deployment, engine_files)
    elif deployment.engine == "onnxruntime":
        config.platform = "onnxruntime_onnx"
        if deployment.provider == "cuda":
            _use_cuda(config, deployment)
        elif deployment.provider == "tensorrt":
            _use_tensorrt_provider(config, deployment, inputs, sizes, digest)
    if deployment.on_gpu:
        # One on each GPU that the server sees.
        group = config.instance_group.add(count=1, kind=_GROUP.KIND_GPU)
        if deployment.engine == "tensorrt":
            group.profile.extend(str(k) for k in range(len(deployment.profiles)))
        if deployment.engine == "python":  # which captures its graphs when it is loaded
            rows = ",".join(map(str, deployment.graph_rows))
            config.parameters["graph_rows"].string_value = rows
        else:
            for count in deployment.graph_rows:
                _warm_up(config, count, inputs, sizes)
    else:
        config.instance_group.add(count=1, kind=_GROUP.KIND_CPU)
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
    config: model_config_pb2.ModelConfig, deployment: Deployment, engine_files: Mapping[str, str]
) -> None:
    config.platform = "tensorrt_plan"
    for capability, file in engine_files.items():
        config.cc_model_filenames[capability] = file
    config.optimization.cuda.graphs = True
    for rows in deployment.graph_rows:
        config.optimization.cuda.graph_spec.add(batch_size=rows)


def _use_cuda(config: model_config_pb2.ModelConfig, deployment: Deployment) -> None:
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    accelerator = accelerators.add(name="cuda")
    if deployment.precision == "fp32":  # which TF32 is not
        accelerator.parameters["use_tf32"] = "0"


def _use_tensorrt_provider(
    config: model_config_pb2.ModelConfig,
    deployment: Deployment,
    inputs: tuple[TensorSpec, ...],
    sizes: Mapping[int | str, int],
    digest: str,
) -> None:
    """ONNX Runtime's TensorRT: without the engines' profile it would build one for each batch.

    The networks are strongly typed since TensorRT 11: types are those of the file. What chose them
    before (`precision_mode`, from which the backend makes `trt_fp16_enable` and its like) is gone.
    """
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    parameters = accelerators.add(name="tensorrt").parameters
    parameters["trt_engine_cache_enable"] = "1"
    parameters["trt_engine_cache_path"] = ENGINE_CACHE
    # It knows its engines by name alone: other weights must not find these.
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
