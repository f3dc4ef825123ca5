"""Whether the TensorRT engines of a repository fit the server and its GPUs. Standard library only.

TensorRT refuses an engine of another version or GPU too, but only once the server is up, and
without saying what to do about it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flowturbo.repository import BUILD_FILE
from flowturbo.serving.installation import SetupError
from flowturbo.textfile import TextFileError, read_json

_TENSORRT = ("libnvinfer.so.12", "libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer.so")
_CUDA = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def check_engines(
    repository: Path, models: Iterable[str], version: str | None, capabilities: list[str]
) -> None:
    """Raises SetupError for a model without an engine that fits, with the command that makes one.

    `version` is the server's TensorRT (None where it cannot be told), `capabilities` its GPUs'
    compute capabilities.
    """
    for model in models:
        build = read_build(repository / model)
        if build.get("engine") != "tensorrt":
            continue
        if not capabilities:
            raise SetupError(
                f"{model} is a TensorRT engine and no GPU is here: serve on a machine with one, or "
                "export with --engine python or --engine onnxruntime --provider cpu"
            )
        problems = list(_problems(model, build["engines"], version, capabilities))
        if problems:
            raise SetupError(
                "".join(f"{problem}\n" for problem in problems)
                + "Build it here, in this release's export image (docker compose --profile export "
                f"run --rm export, and the arguments of): {build['command']}"
            )


def read_build(model: Path) -> dict[str, Any]:
    """The build record in a model's folder, {} where there is none; raises SetupError."""
    path = model / BUILD_FILE
    try:
        return read_json(path) if path.is_file() else {}
    except TextFileError as error:
        raise SetupError(f"{error}: export again") from error


def _problems(
    model: str, engines: dict[str, Any], version: str | None, capabilities: list[str]
) -> Iterator[str]:
    built = ", ".join(engines) or "none"
    for capability in sorted(set(capabilities)):
        engine = engines.get(capability)
        if engine is None:
            yield f"{model} has no engine for compute capability {capability}, only for {built}"
        elif version and not _same_release(engine["tensorrt"], version):
            yield (
                f"{model}'s engine for compute capability {capability} was built with TensorRT "
                f"{engine['tensorrt']}, the server has {version}"
            )


def _same_release(one: str, other: str) -> bool:
    # The library tells three of the four parts that the package has.
    return one.split(".")[:3] == other.split(".")[:3]


def tensorrt_version() -> str | None:
    """The version of the TensorRT library here, such as "10.14.1"; None without one."""
    for name in _TENSORRT:
        with contextlib.suppress(OSError, AttributeError):
            number = ctypes.CDLL(name).getInferLibVersion()
            return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    return None


def compute_capabilities() -> list[str]:
    """The compute capability of each GPU that this process sees, such as "8.9"; [] without one."""
    try:
        cuda = ctypes.CDLL(_CUDA)
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    return [_capability(cuda, ordinal) for ordinal in range(count.value)]


def _capability(cuda: Any, ordinal: int) -> str:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return f"{major.value}.{minor.value}"
