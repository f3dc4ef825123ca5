"""Checks whether the TensorRT engines of pipelines fit the server and its GPUs.

TensorRT itself refuses an engine of another version or GPU only when the server starts. It does not
say what to do about it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flowturbo.gpu import CUDA_MAJOR, Gpu, GpuError, usable_gpus
from flowturbo.pipeline import ModelRecord, Pipeline
from flowturbo.serving.installation import SetupError

_GIB = 2**30
_TENSORRT = ("libnvinfer.so.12", "libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer.so")


def check_gpus(pipelines: Iterable[Pipeline], version: str | None) -> list[str]:
    """Checks `pipelines` that run on GPUs. Returns notes on their engines.

    `version` is the server's TensorRT version, None if unknown. Raises SetupError if there is no
    usable GPU. Raises it for a model without a fitting engine, with the command that builds one.
    """
    on_gpu = [pipeline for pipeline in pipelines if pipeline.on_gpu]
    if not on_gpu:
        return []
    try:
        # The driver that PyTorch needs depends on its build; PyTorch itself reports an old driver.
        only_torch = all(pipeline.predictor.runtime == "torch" for pipeline in on_gpu)
        gpus = usable_gpus(least=0 if only_torch else CUDA_MAJOR)
    except GpuError as error:
        raise SetupError(
            f"pipeline {on_gpu[0].name} was exported for a GPU, but {error}. Serve on a machine "
            "with a GPU, or export for a CPU (--engine python, or --provider cpu)"
        ) from error
    notes = [note for pipeline in on_gpu for note in check_engines(pipeline, version, gpus)]
    return [*notes, *check_memory(on_gpu, gpus)]


def check_memory(pipelines: Sequence[Pipeline], gpus: Sequence[Gpu]) -> list[str]:
    """A note on the device memory of all `pipelines`; every GPU has all their models.

    Raises SetupError if their weights and largest batches alone are more than a GPU has.
    """
    needed = {pipeline.name: pipeline.device_bytes for pipeline in pipelines}
    total, smallest = sum(needed.values()), min(gpus, key=lambda gpu: gpu.memory)
    if not smallest.memory:
        return []
    shown = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in needed.items())
    if total > smallest.memory:
        raise SetupError(
            f"the pipelines need at least {total / _GIB:.1f} GiB of device memory ({shown}), "
            f"{smallest.name} has {smallest.memory / _GIB:.1f}: remove a pipeline (python -m "
            "export remove NAME), or export with a smaller --max-rows"
        )
    return [f"weights and largest batches: {total / _GIB:.1f} GiB of device memory ({shown})"]


def check_engines(pipeline: Pipeline, version: str | None, gpus: Sequence[Gpu]) -> list[str]:
    """Notes on engines that were built on another GPU.

    Raises SetupError for a model without a fitting engine.
    """
    notes: list[str] = []
    for role, record in pipeline.models.items():
        if record.engine != "tensorrt":
            continue
        model = pipeline.model(role)
        if problems := list(_problems(model, record, version, gpus)):
            raise SetupError(
                "".join(f"{problem}\n" for problem in problems)
                + "Build it here, in this release's export image (docker compose --profile export "
                f"run --rm export, with the arguments of): {pipeline.command}"
            )
        notes += _other_gpus(model, record.engines, gpus)
    return notes


def _other_gpus(model: str, engines: Mapping[str, Any], gpus: Sequence[Gpu]) -> Iterator[str]:
    """Notes on other GPUs: an engine runs there, but its kernels were chosen on one GPU."""
    for capability, name in sorted({(gpu.capability, gpu.name) for gpu in gpus}):
        if (built := engines[capability].get("gpu")) != name:
            yield (
                f"{model}'s engine for compute capability {capability} was built on {built} and "
                f"also runs on {name} here. To replace it by an engine for {name}, export here"
            )


def _problems(
    model: str, record: ModelRecord, version: str | None, gpus: Sequence[Gpu]
) -> Iterator[str]:
    built = ", ".join(record.engines) or "none"
    for capability in sorted({gpu.capability for gpu in gpus}):
        engine = record.engines.get(capability)
        if engine is None:
            yield f"{model} has no engine for compute capability {capability}, only for {built}"
        elif version and not _same_release(engine["tensorrt"], version):
            yield (
                f"{model}'s engine for compute capability {capability} was built with TensorRT "
                f"{engine['tensorrt']}, the server has {version}"
            )


def _same_release(one: str, other: str) -> bool:
    # The library reports three of the four parts of the package's version.
    return one.split(".")[:3] == other.split(".")[:3]


def tensorrt_version() -> str | None:
    """The version of the installed TensorRT library, such as "10.14.1"; None without one."""
    for name in _TENSORRT:
        with contextlib.suppress(OSError, AttributeError):
            number = ctypes.CDLL(name).getInferLibVersion()
            return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    return None
