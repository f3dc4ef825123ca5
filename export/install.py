"""Composed models as directories that Triton loads, installed whole or not at all."""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from flowturbo import contract
from flowturbo.errors import FlowTurboError
from flowturbo.nets.weights import sha256
from flowturbo.presets import PRESETS_FILE, presets_path
from flowturbo.repository import BUILD_FILE, Settings, read_config, read_record

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "model_repository" / contract.ORCHESTRATOR
MODEL_PY = '''"""Evaluates the exported network beside this file."""

from flowturbo.serving.block import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_GUIDANCE = "default_guidance_scale"
# Fields of the orchestrator's configuration that belong to its code.
_THIS_VERSIONS = ("name", "backend", "max_batch_size", "input", "output")
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
    """The build record in a model's folder; raises RepositoryError for one that is none."""
    return read_record(folder / BUILD_FILE)


def write_build(folder: Path, build: dict[str, Any]) -> None:
    """The build record, into a model's folder."""
    replace_text(folder / BUILD_FILE, record(build))


def record(build: Mapping[str, Any]) -> str:
    """A build record as its file has it."""
    return json.dumps(build, indent=1) + "\n"


def versions() -> dict[str, str]:
    """Versions of the tools that decide what an export contains, of those that are here."""
    found = {}
    for name in _VERSIONED:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def processor_digest() -> str:
    """Tells this kind of CPU from others."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    kinds = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    return hashlib.sha256("\n".join(kinds).encode()).hexdigest()[:16]


def source_digest() -> str:
    """Digest of the code that decides what an export contains."""
    digest = hashlib.sha256()
    core = ROOT / "flowturbo"
    files = [
        core / "contract.py",
        core / "parity.py",
        core / "runtimes.py",
        *(core / "nets").glob("*.py"),
    ]
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

    Each model is renamed into place whole; if one cannot be, the old ones come back.
    """
    repository.mkdir(parents=True, exist_ok=True)
    finished = sorted(path.name for path in staged.iterdir())
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


def add_orchestrator(staged: Path, settings: Settings, repository: Path) -> None:
    """Puts the orchestrator, with these settings, among the `staged` models of a new repository."""
    if (repository / contract.ORCHESTRATOR).exists():
        return
    folder = staged / contract.ORCHESTRATOR
    ignored = shutil.ignore_patterns("__pycache__", PRESETS_FILE)
    shutil.copytree(COMMITTED, folder, ignore=ignored)
    path = folder / "config.pbtxt"
    # As text: its comments stay.
    setting = re.compile(rf'({_GUIDANCE}", value: {{ string_value: )"[^"]*"')
    stated = rf'\g<1>"{settings.default_guidance_scale}"'
    replace_text(path, setting.sub(stated, path.read_text()))


def install_presets(text: str, repository: Path) -> None:
    """Puts a checked `text` of presets in the place of those in `repository`, at once."""
    path = presets_path(repository)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def mend_orchestrator(repository: Path, guidance_scale: float | None) -> bool:
    """Brings the code and the tensors of the repository's orchestrator, if it has one, up to date.

    Its settings and instances stay, but for a default `guidance_scale` that is given. Returns
    whether there was anything to do. Raises RepositoryError for a configuration that is none.
    """
    folder = repository / contract.ORCHESTRATOR
    if not folder.is_dir():
        return False
    code, config = Path("1") / "model.py", Path("config.pbtxt")
    wanted = read_config(COMMITTED / config)
    found = read_config(folder / config) if (folder / config).is_file() else None
    mended = ModelConfig()
    mended.CopyFrom(wanted)
    if found:
        for name, value in found.parameters.items():
            mended.parameters[name].CopyFrom(value)
        if found.instance_group:
            del mended.instance_group[:]
            mended.instance_group.extend(found.instance_group)
    if guidance_scale is None and found is None:  # as in a new repository
        guidance_scale = Settings.default_guidance_scale
    if guidance_scale is not None:
        mended.parameters[_GUIDANCE].string_value = str(guidance_scale)
    path, text = folder / code, (COMMITTED / code).read_text()
    same_code = path.is_file() and path.read_text() == text
    same_config = found is not None and all(
        getattr(found, name) == getattr(mended, name) for name in (*_THIS_VERSIONS, "parameters")
    )
    if not same_code:
        path.parent.mkdir(exist_ok=True)
        replace_text(path, text)
    if not same_config:
        replace_text(folder / config, text_format.MessageToString(mended))
    return not (same_code and same_config)


def file_digests(folder: Path) -> dict[str, str]:
    """The digest of every file of a model's version, by name."""
    return {file.name: sha256(file) for file in sorted((folder / "1").iterdir())}


def is_whole(folder: Path, engine: Mapping[str, Any]) -> bool:
    """Whether an engine's file is there, as long as its record says."""
    path = folder / "1" / engine["file"]
    return path.is_file() and path.stat().st_size == engine["bytes"]


def installed_fingerprint(repository: Path, model: str) -> Any:
    """What the installed model was made from; None where it is not whole or not as recorded."""
    folder = repository / model
    try:
        build = read_build(folder)
        files = {name: sha256(folder / "1" / name) for name in build["files"]}
        fingerprint = build["fingerprint"]
        same = (files, build["class_names"]) == (build["files"], fingerprint["class_names"])
    except (OSError, ValueError, LookupError, TypeError, FlowTurboError):
        return None
    return fingerprint if same else None
