"""Composed models as directories that Triton loads, installed whole or not at all."""

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from flowturbo import contract
from flowturbo.errors import FlowTurboError
from flowturbo.repository import BUILD_FILE

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "model_repository" / contract.ORCHESTRATOR
MODEL_PY = '''"""Evaluates model.onnx beside this file."""

from flowturbo.serving.onnx_block import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_TRITON_TYPES = {
    np.float32: model_config_pb2.TYPE_FP32,
    np.int64: model_config_pb2.TYPE_INT64,
    np.int32: model_config_pb2.TYPE_INT32,
    np.uint8: model_config_pb2.TYPE_UINT8,
}
_VERSIONED = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers")


def model_config(
    model: str, sizes: Mapping[int | str, int], max_rows: int, queue_delay_us: int
) -> model_config_pb2.ModelConfig:
    """Triton's configuration of a composed model; `sizes` gives C, h, w (and H, W) in numbers."""
    config = model_config_pb2.ModelConfig(name=model, backend="python", max_batch_size=max_rows)
    inputs, outputs = contract.COMPOSED[model]
    for spec, target in [(s, config.input) for s in inputs] + [(s, config.output) for s in outputs]:
        entry = target.add(name=spec.name, data_type=_TRITON_TYPES[spec.dtype])
        entry.dims.extend(int(sizes.get(dim, dim)) for dim in spec.dims)
    config.dynamic_batching.max_queue_delay_microseconds = queue_delay_us
    config.instance_group.add(count=1, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
    return config


def write_model(folder: Path, config: model_config_pb2.ModelConfig, build: dict[str, Any]) -> None:
    """Adds configuration, build record and model code to `folder`, which has 1/model.onnx."""
    (folder / "config.pbtxt").write_text(text_format.MessageToString(config))
    (folder / BUILD_FILE).write_text(json.dumps(build, indent=1) + "\n")
    (folder / "1" / "model.py").write_text(MODEL_PY)


def versions() -> dict[str, str]:
    """Versions of the tools that decide what an export contains."""
    return {name: importlib.metadata.version(name) for name in _VERSIONED}


def source_digest() -> str:
    """Digest of the code that decides what an export contains."""
    digest = hashlib.sha256()
    files = [ROOT / "flowturbo" / "contract.py", *(ROOT / "flowturbo" / "nets").glob("*.py")]
    for path in sorted([*files, *(ROOT / "export").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class InstallError(FlowTurboError):
    """The repository cannot take the models."""


@contextmanager
def staging(repository: Path) -> Iterator[Path]:
    """A folder beside `repository`, on the same file system, that is gone afterwards.

    Not inside it, where a server could find half a model. Raises InstallError for a mount point.
    """
    repository = repository.resolve()
    repository.parent.mkdir(parents=True, exist_ok=True)
    if repository.is_mount():
        raise InstallError(
            f"{repository} is a mount point, into which no finished model can be moved at once: "
            "export to a folder in it"
        )
    folder = tempfile.mkdtemp(prefix=f".{repository.name}.", dir=repository.parent)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def install(staged: Path, repository: Path) -> None:
    """Moves the finished models in `staged` into `repository`, and those of another export out.

    Each model is renamed into place whole. The orchestrator is added where it is missing.
    """
    repository.mkdir(parents=True, exist_ok=True)
    old = staged / ".old"
    old.mkdir()
    for model in contract.COMPOSED:
        if (repository / model).exists():
            (repository / model).rename(old / model)
        if (staged / model).exists():
            (staged / model).rename(repository / model)
    orchestrator = repository / contract.ORCHESTRATOR
    if not orchestrator.exists():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(COMMITTED, staged / contract.ORCHESTRATOR, ignore=ignored)
        (staged / contract.ORCHESTRATOR).rename(orchestrator)


def installed_fingerprint(repository: Path, model: str) -> Any:
    """What the installed model was made from; None where it is not whole."""
    folder = repository / model
    files = [folder / "config.pbtxt", folder / "1" / "model.onnx", folder / "1" / "model.py"]
    try:
        build = json.loads((folder / BUILD_FILE).read_text())
    except (OSError, ValueError):
        return None
    return build.get("fingerprint") if all(file.is_file() for file in files) else None
