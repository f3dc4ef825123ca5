"""Composed models as directories that Triton loads, installed whole or not at all."""

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowturbo import contract
from flowturbo.errors import FlowTurboError
from flowturbo.presets import PRESETS_FILE, presets_path
from flowturbo.repository import BUILD_FILE

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "model_repository" / contract.ORCHESTRATOR
MODEL_PY = '''"""Evaluates model.onnx beside this file."""

from flowturbo.serving.onnx_block import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_VERSIONED = ("torch", "onnx", "onnxscript", "diffusers", "onnxruntime", "openvino")


def link_installed(repository: Path, staged: Path) -> None:
    """Puts the installed models into `staged` too, at no cost in disk, to be added to."""
    for model in contract.COMPOSED:
        if (repository / model).is_dir():
            shutil.copytree(repository / model, staged / model, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has links, or allows them
        shutil.copy2(source, target)


def replace_text(path: Path, text: str) -> None:
    """Writes `path` as a new file: what is linked to the old one keeps its content."""
    path.unlink(missing_ok=True)
    path.write_text(text)


def read_build(folder: Path) -> dict[str, Any]:
    """The build record in a model's folder."""
    build: dict[str, Any] = json.loads((folder / BUILD_FILE).read_text())
    return build


def write_build(folder: Path, build: dict[str, Any]) -> None:
    """The build record, into a model's folder."""
    replace_text(folder / BUILD_FILE, json.dumps(build, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Versions of the tools that decide what an export contains."""
    return {name: importlib.metadata.version(name) for name in _VERSIONED}


def processor_digest() -> str:
    """Tells this kind of CPU from others."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    kinds = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    return hashlib.sha256("\n".join(kinds).encode()).hexdigest()[:16]


def source_digest() -> str:
    """Digest of the code that decides what an export contains."""
    digest = hashlib.sha256()
    core = ROOT / "flowturbo"
    files = [core / "contract.py", core / "onnx_session.py", *(core / "nets").glob("*.py")]
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


def install(staged: Path, repository: Path, replaced: Iterable[str]) -> None:
    """Moves the finished models in `staged` into `repository`, and those named `replaced` out.

    Each model is renamed into place whole; if one cannot be, the old ones come back. The
    orchestrator is added where it is missing.
    """
    repository.mkdir(parents=True, exist_ok=True)
    finished = sorted(path.name for path in staged.iterdir())
    if not (repository / contract.ORCHESTRATOR).exists():
        ignored = shutil.ignore_patterns("__pycache__", PRESETS_FILE)
        shutil.copytree(COMMITTED, staged / contract.ORCHESTRATOR, ignore=ignored)
        (staged / contract.ORCHESTRATOR).rename(repository / contract.ORCHESTRATOR)
    old = staged / ".old"
    old.mkdir()
    try:
        for model in {*finished, *replaced}:
            if (repository / model).exists():
                (repository / model).rename(old / model)
        for model in finished:
            (staged / model).rename(repository / model)
    except BaseException:
        for model in finished:
            if not (staged / model).exists():  # it has been moved in
                shutil.rmtree(repository / model, ignore_errors=True)
        for saved in old.iterdir():
            saved.rename(repository / saved.name)
        raise


def install_presets(file: Path, repository: Path) -> None:
    """Puts a checked `file` of presets in the place of those in `repository`, at once."""
    path = presets_path(repository)
    partial = path.with_suffix(".partial")
    shutil.copyfile(file, partial)
    partial.replace(path)


def installed_fingerprint(repository: Path, model: str) -> Any:
    """What the installed model was made from; None where it is not whole."""
    folder = repository / model
    try:
        build = read_build(folder)
    except (OSError, ValueError):
        return None
    files = ["config.pbtxt", *(f"1/{name}" for name in build.get("files", ["model.onnx"]))]
    return build.get("fingerprint") if all((folder / file).is_file() for file in files) else None
