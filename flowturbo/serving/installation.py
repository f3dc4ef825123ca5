"""Finds the `tritonserver` to run, and prepares the one in the pip wheel. Standard library only."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_STUB = "triton_python_backend_stub"
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_SHELL_SPECIAL = re.compile(r"""[\s'"\\$`&|;<>()*?\[\]{}]""")


class ServerError(Exception):
    """The server did not start, did not become ready, or died."""


class SetupError(ServerError):
    """The user must fix something before a server can start. Nothing was started."""


@dataclass(frozen=True)
class Installation:
    """A server that can be started.

    `backends` is the backend folder, None if the server has its own. `notes` are for the user.
    """

    binary: Path
    backends: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_server(explicit: Path | None = None) -> Installation:
    """The server to run: `explicit`, else the one on PATH, else that of the nvidia-pytriton wheel.

    Raises SetupError if there is none, or if the wheel's server does not support this Python.
    """
    wheel = _wheel_folder()
    found = shutil.which(str(explicit or "tritonserver"))
    if explicit and not found:
        raise SetupError(f"--tritonserver {explicit}: not an executable file")
    if found and not (wheel and Path(found).resolve() == (wheel / "bin/tritonserver").resolve()):
        return Installation(Path(found).absolute())
    if wheel is None:
        raise SetupError(
            "no tritonserver found: neither on PATH nor in the nvidia-pytriton wheel.\n"
            "Get one with `pip install nvidia-pytriton` (development), or run inside\n"
            "`docker run -it nvcr.io/nvidia/tritonserver:<yy.mm>-py3` (production)."
        )
    return _prepare_wheel(wheel)


def _wheel_folder() -> Path | None:
    # find_spec instead of an import, because pytriton's own imports are slow.
    spec = importlib.util.find_spec("pytriton")
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / "tritonserver"
        if (folder / "bin/tritonserver").is_file():
            return folder
    return None


def _prepare_wheel(wheel: Path) -> Installation:
    backends = _prepare_backends(wheel)
    # Python's library folder is added because the stub links libpython. Python's `bin` is first on
    # PATH because the stub uses the environment (site-packages, .pth files) of the first `python3`.
    libraries = [wheel.parent.parent / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    environment = {
        "LD_LIBRARY_PATH": _path_list(*libraries, os.environ.get("LD_LIBRARY_PATH")),
        "PATH": _path_list(Path(sys.executable).parent, os.environ.get("PATH")),
    }
    _check_stub(backends / "python" / _STUB, environment)
    notes = []
    try:
        guard = _build_guard(cache_folder())
        environment["LD_PRELOAD"] = _path_list(guard, os.environ.get("LD_PRELOAD"))
    except (OSError, subprocess.SubprocessError) as error:
        notes.append(
            "the guard of this server (release 24.10) could not be compiled. Without it, a request "
            "for classification of a BYTES output, or a huge shape over HTTP, ends the server, and "
            f"outputs always come in the contract's order: {error}"
        )
    return Installation(wheel / "bin/tritonserver", backends, environment, tuple(notes))


def _build_guard(cache: Path) -> Path:
    """Compiles server_guard.c into `cache`, or finds it there.

    Raises OSError or SubprocessError if that fails.
    """
    source = Path(__file__).with_name("server_guard.c")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    target = cache / f"server_guard-{digest}.so"
    if ":" in str(target):
        raise OSError(f"{target} has a ':' in its path: set XDG_CACHE_HOME to another folder")
    if not _is_loaded(target):  # missing, damaged, or built on another system
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise FileNotFoundError("no C compiler was found (cc; Debian's package gcc)")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as scratch:
            made = Path(scratch) / target.name
            options = ["-O2", "-fPIC", "-shared", "-o", str(made), str(source), "-ldl"]
            subprocess.run([compiler, *options], check=True, capture_output=True, timeout=120)
            made.rename(target)
        if not _is_loaded(target):
            raise OSError(f"{target} cannot be loaded")
    return target


def _is_loaded(library: Path) -> bool:
    """Whether the dynamic linker preloads `library`; it silently ignores what it cannot load."""
    probe = subprocess.run(
        [sys.executable, "-S", "-I", "-c", "print(open('/proc/self/maps').read())"],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return str(library.resolve()) in probe.stdout


def _path_list(*parts: Path | str | None) -> str:
    return os.pathsep.join(str(part) for part in parts if part)


def _prepare_backends(wheel: Path) -> Path:
    """Copies the wheel's Python backend, with the stub for this Python, once into the cache."""
    stubs = wheel / "python_backend_stubs"
    stub = stubs / _PYTHON / _STUB
    if not stub.is_file():
        versions = sorted((p.name for p in stubs.glob("3.*")), key=lambda name: int(name[2:]))
        raise SetupError(
            f"the tritonserver of nvidia-pytriton cannot run Python {_PYTHON} models: "
            f"it has stubs for {', '.join(versions)}"
        )
    sources = [*(p for p in (wheel / "backends/python").iterdir() if p.is_file()), stub]
    version = importlib.metadata.version("nvidia-pytriton")
    cache = cache_folder()
    target = cache / f"tritonserver-{version}-py{_PYTHON.replace('.', '')}"
    check_path("the cache folder", target, "set XDG_CACHE_HOME to another folder")
    if not _is_complete(target / "python", sources):
        try:
            _build_backends(cache, target, sources)
        except OSError as error:
            raise SetupError(
                f"cannot write {target}: {error}; set XDG_CACHE_HOME to a writable folder"
            ) from error
    return target


def cache_folder() -> Path:
    """The folder for files that can be made again. Raises SetupError if there is no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowturbo"
    except RuntimeError as error:
        raise SetupError("no home folder: set XDG_CACHE_HOME to a writable folder") from error


def _is_complete(folder: Path, sources: Sequence[Path]) -> bool:
    copies = ((folder / source.name, source) for source in sources)
    return all(c.is_file() and c.stat().st_size == s.stat().st_size for c, s in copies)


def _build_backends(cache: Path, target: Path, sources: Sequence[Path]) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as scratch:
        new = Path(scratch) / "backends"
        (new / "python").mkdir(parents=True)
        for source in sources:
            shutil.copy(source, new / "python")
        if target.exists():  # it is damaged, because complete ones are not rebuilt
            shutil.rmtree(target)
        try:
            new.rename(target)
        except OSError:  # another process was faster
            if not _is_complete(target / "python", sources):
                raise


def _check_stub(stub: Path, environment: dict[str, str]) -> None:
    # Without arguments the stub exits with 1. Code 127 means that a library was not found. The
    # server itself would only report a stub that never becomes healthy.
    result = subprocess.run(
        [stub], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    if result.returncode == 127:
        raise SetupError(
            f"the Python backend cannot start: {result.stderr.strip()}\n"
            f"It needs a Python {_PYTHON} with a shared libpython (looked in "
            f"{environment['LD_LIBRARY_PATH']} and the system's library folders)."
        )


def check_path(what: str, path: Path, remedy: str) -> None:
    """Raises SetupError for a path that the Python backend does not support."""
    # The Python backend starts its stub through a shell, does not quote paths, and then hangs.
    if match := _SHELL_SPECIAL.search(str(path)):
        raise SetupError(f"{what} {path} has a {match[0]!r} in its path: {remedy}")
