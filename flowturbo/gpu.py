"""Lists the GPUs that this process can use, or says why there is none. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from typing import Any

from flowturbo.errors import FlowTurboError

# CUDA version of this project's Triton releases and their TensorRT (CUDA 13.x), and its driver.
CUDA_MAJOR, DRIVER = 13, 580
_LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_MEANINGS = {  # of cuInit's results
    3: "the driver could not be initialised",
    100: "no GPU is visible (CUDA_VISIBLE_DEVICES, or the container's list of GPUs, may be empty)",
    802: "the GPUs are not ready yet (is nvidia-fabricmanager running?)",
    803: "the driver's library and kernel module have different versions (restart the host)",
    804: "this GPU cannot use the image's compatibility libraries, and its driver is too old",
}
_REMEDY = f"driver {DRIVER} or later and, in a container, NVIDIA container toolkit 1.17.5 or later"


class GpuError(FlowTurboError):
    """No GPU can be used on this machine; the message says why."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process sees: its number, name, and compute capability, such as "8.9".

    `memory` is in bytes; 0 if it is unknown.
    """

    ordinal: int
    name: str
    capability: str
    memory: int = 0


def usable_gpus(cuda: Any = None, *, least: int = CUDA_MAJOR) -> list[Gpu]:
    """The GPUs here, at least one, with a driver for CUDA `least` or later.

    Raises GpuError if there is none. The message says whether the driver is missing, the driver is
    too old, or the GPU is missing. `cuda` can replace the driver's library in tests.
    """
    if cuda is None:
        try:
            cuda = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise GpuError(
                f"no NVIDIA driver was found ({_LIBRARY} is missing): install {_REMEDY}"
            ) from error
    result = cuda.cuInit(0)
    release = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(release))
    major, minor = release.value // 1000, release.value % 1000 // 10
    if release.value and major < least:
        raise GpuError(
            f"the NVIDIA driver is too old: it supports CUDA {major}.{minor}, "
            f"but CUDA {least} is needed: install {_REMEDY}"
        )
    if result:
        meaning = _MEANINGS.get(result, "an error of the driver")
        raise GpuError(f"no GPU can be used: {meaning} (cuInit: {result}); needed: {_REMEDY}")
    count = ctypes.c_int()
    if cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise GpuError(f"no GPU can be used: {_MEANINGS[100]}")
    return [_gpu(cuda, ordinal) for ordinal in range(count.value)]


def _gpu(cuda: Any, ordinal: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    memory = ctypes.c_size_t()
    with contextlib.suppress(AttributeError):  # it stays unknown
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = f"{major.value}.{minor.value}"
    return Gpu(ordinal, name.value.decode(errors="replace"), capability, memory.value)


def gpu_count() -> int:
    """The number of GPUs that this process can use, with any driver version; may be 0."""
    try:
        return len(usable_gpus(least=0))
    except GpuError:
        return 0
