"""Installs composed models as folders that Triton loads: all of them, or none."""

import ast
import hashlib
import importlib.metadata
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
from flowturbo.errors import FlowTurboError, RepositoryError
from flowturbo.nets.weights import sha256
from flowturbo.pipeline import (
    RECORDS,
    Pipeline,
    installed,
    read_pipeline,
    record_path,
    record_text,
    solvers_path,
)
from flowturbo.settings import Settings, orchestrator_config, read_config

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "model_repository"
MODEL_PY = '''"""Evaluates the exported network beside this file."""

from flowturbo.serving.block import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_DEFAULT_PIPELINE = "default_pipeline"
_RECORD, _SOLVERS = ".record", ".solvers"
# Fields of the orchestrator's configuration that its code determines.
_THIS_VERSIONS = (
    *("name", "backend", "max_batch_size", "input", "output", "model_transaction_policy"),
)
_VERSIONED = (
    *("torch", "onnx", "onnxscript", "onnxruntime", "openvino"),
    *("diffusers", "transformers", "tokenizers"),
)


def link_installed(repository: Path, models: Iterable[str], staged: Path) -> None:
    """Hard-links installed `models` into `staged`, so that files can be added to them there."""
    for model in models:
        shutil.copytree(repository / model, staged / model, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # some file systems have no hard links, or forbid them
        shutil.copy2(source, target)


def replace_text(path: Path, text: str) -> None:
    """Writes `path` as a new file, so that hard links to the old file keep its content."""
    path.unlink(missing_ok=True)
    path.write_text(text)


def versions() -> dict[str, str]:
    """The versions of the installed packages that affect the content of an export."""
    found = {}
    for name in _VERSIONED:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def processor_digest() -> str:
    """A digest of this kind of CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    kinds = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    return hashlib.sha256("\n".join(kinds).encode()).hexdigest()[:16]


def source_digest() -> str:
    """Digest of the code that affects the content of an export: its syntax, not its comments."""
    digest = hashlib.sha256()
    core = ROOT / "flowturbo"
    # The solver counts because the calibration for fp8 runs a trajectory.
    folders = (
        core / "nets",
        core / "nets" / "families",
        core / "conditions",
        core / "solver",
        ROOT / "export",
    )
    files = [core / f"{name}.py" for name in ("contract", "parity", "rows", "runtimes")]
    files += [path for folder in folders for path in folder.glob("*.py")]
    for path in sorted(files):
        digest.update(_syntax(path.read_text()).encode())
    return digest.hexdigest()


def _syntax(source: str) -> str:
    """The syntax tree of a program, without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            node.body = body[1:]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(node: ast.stmt) -> bool:
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        return False
    return isinstance(node.value.value, str)


class InstallError(FlowTurboError):
    """The models cannot be installed in the repository."""


@contextmanager
def staging(repository: Path) -> Iterator[Path]:
    """A temporary folder beside `repository`, on the same file system.

    It is not inside the repository, because a server could find an incomplete model there. Raises
    InstallError for a mount point.
    """
    repository = repository.resolve()
    repository.parent.mkdir(parents=True, exist_ok=True)
    if repository.is_mount():
        raise InstallError(
            f"{repository} is a mount point, and models cannot be moved into it atomically: export "
            "to a folder in it"
        )
    folder = tempfile.mkdtemp(prefix=f".{repository.name}.", dir=repository.parent)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def install(staged: Path, repository: Path, pipeline: Pipeline, replaced: Iterable[str]) -> None:
    """Moves the finished models in `staged` into `repository`, and the `replaced` models out.

    The pipeline's old record is removed first, and the new one is written last: a pipeline without
    a record is not installed. Each model is renamed into place as a whole. If that fails, the old
    pipeline is restored.
    """
    repository.mkdir(parents=True, exist_ok=True)
    finished = sorted(path.name for path in staged.iterdir())
    old = staged / ".old"
    beside = {
        _RECORD: record_path(repository, pipeline.name),
        _SOLVERS: solvers_path(repository, pipeline.name),
    }
    old.mkdir()
    try:
        for name, path in beside.items():
            if path.exists():
                path.rename(old / name)
        for model in {*finished, *replaced}:
            if (repository / model).exists():
                (repository / model).rename(old / model)
        for model in finished:
            (staged / model).rename(repository / model)
        write_record(repository, pipeline)
    except BaseException:
        for model in finished:
            if not (staged / model).exists():  # it is already in the repository
                shutil.rmtree(repository / model, ignore_errors=True)
        for saved in old.iterdir():
            saved.rename(beside.get(saved.name, repository / saved.name))
        raise


def write_record(repository: Path, pipeline: Pipeline) -> None:
    """Writes the record of a pipeline, whole or not at all; it replaces an older one.

    Its fitted solvers are written before it: presets may name them.
    """
    record, solvers = (of(repository, pipeline.name) for of in (record_path, solvers_path))
    record.parent.mkdir(parents=True, exist_ok=True)
    if pipeline.solvers:
        pipeline.solvers.write(solvers)
    partial = record.with_suffix(".partial")
    partial.write_text(record_text(pipeline))
    partial.replace(record)
    if not pipeline.solvers:
        solvers.unlink(missing_ok=True)


def remove(repository: Path, name: str) -> list[str]:
    """Removes the pipeline `name`, its record first; returns the folders that were removed.

    It also removes a pipeline whose record cannot be read. Raises RepositoryError if there is none.
    """
    record = record_path(repository, name)
    if not record.is_file():
        read_pipeline(repository, name)  # raises, with the installed ones
    gone = folders_of(repository, name)
    record.unlink()
    solvers_path(repository, name).unlink(missing_ok=True)
    for folder in gone:
        shutil.rmtree(repository / folder)
    return gone


def folders_of(repository: Path, name: str) -> list[str]:
    """The Triton models of the pipeline `name` in `repository`, also where its record is damaged.

    Triton loads every folder, so none may be left behind. Without a readable record they are known
    by their names: `<name>_...`, but not those of another pipeline whose name begins like that.
    """
    try:
        owned = read_pipeline(repository, name).folders
    except RepositoryError:
        if not record_path(repository, name).is_file():
            return []
        longer = tuple(f"{n}_" for n in installed(repository) if n.startswith(f"{name}_"))
        found = sorted(path.name for path in repository.glob(f"{name}_*") if path.is_dir())
        owned = [folder for folder in found if not folder.startswith(longer)]
    return [folder for folder in owned if (repository / folder).is_dir()]


def add_orchestrator(repository: Path) -> None:
    """Adds the orchestrator and its stream to a new repository. No default pipeline is set yet."""
    ignored = shutil.ignore_patterns("__pycache__", RECORDS.name)
    for name in (contract.ORCHESTRATOR, contract.STREAM):
        if (repository / name).exists():
            continue
        with staging(repository) as staged:
            shutil.copytree(COMMITTED / name, staged / name, ignore=ignored)
            if name == contract.ORCHESTRATOR:
                _set(staged / name / "config.pbtxt", _DEFAULT_PIPELINE, "")
            repository.mkdir(parents=True, exist_ok=True)
            (staged / name).rename(repository / name)


def choose_default(repository: Path, name: str) -> bool:
    """Makes `name` the default pipeline, unless the setting already names an installed one.

    Returns whether the setting changed.
    """
    if Settings.load(repository).default_pipeline in installed(repository):
        return False
    _set(orchestrator_config(repository), _DEFAULT_PIPELINE, name)
    return True


def _set(config: Path, setting: str, value: str) -> None:
    """Changes a setting in the text of a configuration, which keeps the comments."""
    found = re.compile(rf'({setting}", value: {{ string_value: )"[^"]*"')
    text, count = found.subn(rf'\g<1>"{value}"', config.read_text())
    if not count:
        parsed = read_config(config)
        parsed.parameters[setting].string_value = value
        text = text_format.MessageToString(parsed)
    replace_text(config, text)


def mend_orchestrator(repository: Path) -> bool:
    """Updates the code and the tensors of the repository's orchestrator, if it has one.

    Its settings and instances stay. Returns whether anything changed. Raises RepositoryError for an
    invalid configuration.
    """
    if not (repository / contract.ORCHESTRATOR).is_dir():
        return False
    return any([_mend(repository, name) for name in (contract.ORCHESTRATOR, contract.STREAM)])


def _mend(repository: Path, name: str) -> bool:
    folder = repository / name
    if not folder.is_dir():  # made before there was one
        add_orchestrator(repository)
        return True
    code, config = Path("1") / "model.py", Path("config.pbtxt")
    wanted = read_config(COMMITTED / name / config)
    found = read_config(folder / config) if (folder / config).is_file() else None
    mended = ModelConfig()
    mended.CopyFrom(wanted)
    if found:
        for key, value in found.parameters.items():
            mended.parameters[key].CopyFrom(value)
        if found.instance_group:
            del mended.instance_group[:]
            mended.instance_group.extend(found.instance_group)
    elif name == contract.ORCHESTRATOR:  # no configuration: as in a new repository
        mended.parameters[_DEFAULT_PIPELINE].string_value = ""
    path, text = folder / code, (COMMITTED / name / code).read_text()
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
    """The digest of each file in a model's version folder, by file name."""
    return {file.name: sha256(file) for file in sorted((folder / "1").iterdir())}


def is_whole(folder: Path, engine: Mapping[str, Any]) -> bool:
    """Whether an engine's file exists and has the recorded size."""
    path = folder / "1" / engine["file"]
    return path.is_file() and path.stat().st_size == engine["bytes"]


def installed_pipeline(repository: Path, name: str) -> Pipeline | None:
    """The installed pipeline `name`; None if it is missing, incomplete or not as recorded."""
    try:
        pipeline = read_pipeline(repository, name)
        for role, model in pipeline.models.items():
            version = repository / pipeline.model(role) / "1"
            if any(sha256(version / file) != digest for file, digest in model.files.items()):
                return None
    except (OSError, FlowTurboError):
        return None
    return pipeline
