"""`TensorRtModel` against stand-ins for CUDA and TensorRT, whose memory is this process's."""

import ctypes
import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import export.engine
from export.engine import EngineError, TensorRtModel

MOST = 8
STREAM = 10**6  # the handle that TensorRT takes, a plain number


class Stream:
    """As CUDA's bindings give it."""

    def __int__(self) -> int:
        return STREAM


class Error(enum.IntEnum):
    NONE = 0
    BAD_DEVICE = 101


class Cuda:
    """CUDA's runtime: each call answers its error, then its value."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.devices: list[int] = []

    def cudaSetDevice(self, ordinal: int) -> tuple[Error]:
        self.devices.append(ordinal)
        return (Error.NONE if ordinal < 2 else Error.BAD_DEVICE,)

    def cudaStreamCreate(self) -> tuple[Error, Any]:
        return Error.NONE, Stream()

    def cudaStreamSynchronize(self, _stream: int) -> tuple[Error]:
        return (Error.NONE,)

    def cudaMalloc(self, size: int) -> tuple[Error, int]:
        memory = ctypes.create_string_buffer(size)
        self.held[ctypes.addressof(memory)] = memory
        return Error.NONE, ctypes.addressof(memory)

    def cudaMemcpy(self, target: int, source: int, size: int, kind: int) -> tuple[Error]:
        device = self.held[target if kind == 1 else source]
        assert size <= len(device)
        ctypes.memmove(target, source, size)
        return (Error.NONE,)


class Context:
    """Answers twice the values of x, and which profile it ran in."""

    def __init__(self) -> None:
        self.profile, self.shapes, self.addresses = -1, {}, {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return stream is STREAM

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] <= MOST

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        rows = self.shapes["x"][0]
        return (rows, 1) if name == "ran_in" else (rows, 3)

    def execute_async_v3(self, stream: int) -> bool:
        rows = self.shapes["x"][0]
        kinds = {"x": ctypes.c_float, "y": ctypes.c_float, "ran_in": ctypes.c_int64}
        sizes = {"x": 3 * rows, "y": 3 * rows, "ran_in": rows}
        at = {
            name: np.ctypeslib.as_array((kinds[name] * size).from_address(self.addresses[name]))
            for name, size in sizes.items()
        }
        at["y"][:] = 2 * at["x"]
        at["ran_in"][:] = self.profile
        return stream is STREAM


class Engine:
    num_io_tensors, num_optimization_profiles = 3, 2
    _dtypes = {"x": "f4", "y": "f4", "ran_in": "i8"}

    def get_tensor_name(self, k: int) -> str:
        return list(self._dtypes)[k]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "x" else "out"

    def get_tensor_dtype(self, name: str) -> str:
        return self._dtypes[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert name == "x"
        return [(1, 3), ((2, MOST)[profile], 3), (MOST, 3)]

    def create_execution_context(self) -> Context:
        return Context()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    monkeypatch.setattr(export.engine.importlib, "import_module", lambda _name: made)
    return made


def tensorrt(engine: Engine | None) -> Any:
    class Log:
        Severity = SimpleNamespace(ERROR=1)

    return SimpleNamespace(
        ILogger=Log,
        Runtime=lambda _log: SimpleNamespace(deserialize_cuda_engine=lambda _plan: engine),
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        nptype=np.dtype,
    )


@pytest.mark.parametrize(("rows", "profile"), [(1, 0), (4, 0), (6, 1), (8, 1)])
def test_a_batch_runs_in_the_nearest_profile(
    cuda: Cuda, tmp_path: Path, rows: int, profile: int
) -> None:
    (tmp_path / "model.plan").write_bytes(b"plan")
    model = TensorRtModel(tensorrt(Engine()), tmp_path / "model.plan", 1)
    x = np.random.default_rng(0).random((rows, 3))  # float64: the engine's type is taken
    y, ran_in = model({"x": x})
    assert np.array_equal(y, 2 * x.astype(np.float32)) and y.dtype == np.float32
    assert ran_in.tolist() == [[profile]] * rows
    assert set(cuda.devices) == {1}
    # The buffers hold the largest batch.
    assert sorted(map(len, cuda.held.values())) == [8 * MOST, 12 * MOST, 12 * MOST]


def test_more_rows_than_any_profile_has(cuda: Cuda, tmp_path: Path) -> None:
    (tmp_path / "model.plan").write_bytes(b"plan")
    model = TensorRtModel(tensorrt(Engine()), tmp_path / "model.plan")
    with pytest.raises(EngineError, match="no profile of the engine takes 9 rows"):
        model({"x": np.zeros((9, 3))})


def test_what_fails_is_told(cuda: Cuda, tmp_path: Path) -> None:
    (tmp_path / "model.plan").write_bytes(b"plan")
    with pytest.raises(EngineError, match="CUDA failed: BAD_DEVICE"):
        TensorRtModel(tensorrt(Engine()), tmp_path / "model.plan", 2)
    with pytest.raises(EngineError, match="TensorRT cannot load .*model.plan"):
        TensorRtModel(tensorrt(None), tmp_path / "model.plan")
