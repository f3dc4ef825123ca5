"""Downloads tools once, into the cache. Nothing is installed, and root is not needed."""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from flowturbo.serving.installation import SetupError, cache_folder


class DownloadError(Exception):
    """A download failed; the message says what to install."""


def made_whole(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; if it is absent, `make(folder)` makes it atomically.

    Raises SetupError if the cache cannot be written.
    """
    target = cache_folder() / name
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            make(new)
            if not target.exists():  # else another process was faster, and its folder is complete
                new.rename(target)
    except OSError as error:
        raise SetupError(
            f"cannot write {target}: {error}; set XDG_CACHE_HOME to a writable folder"
        ) from error
    return target


def debian_package(name: str, *, along: str = "") -> Path:
    """Downloads and unpacks Debian's package `name`; returns the folder.

    Also unpacks its direct and indirect dependencies whose names match the pattern `along`. Raises
    DownloadError, and SetupError if the cache cannot be written.
    """

    def download(folder: Path) -> None:
        remedy = f"run `apt-get install {name}`"
        with tempfile.TemporaryDirectory() as scratch:
            # Own package lists: the system's may be absent, and fetching them needs root.
            (Path(scratch) / "lists" / "partial").mkdir(parents=True)
            own = ["-o", f"Dir::State::lists={scratch}/lists", "-o", f"Dir::Cache={scratch}"]
            own += ["-o", "APT::Sandbox::User=root"]
            run_step(["apt-get", "-q", *own, "update"], scratch, remedy)
            wanted = {name, *_dependencies(name, along, own, scratch, remedy)}
            run_step(["apt-get", "-q", *own, "download", *sorted(wanted)], scratch, remedy)
            for package in Path(scratch).glob("*.deb"):
                run_step(["dpkg", "-x", str(package), str(folder)], scratch, remedy)

    return made_whole(name, download)


def _dependencies(
    name: str, along: str, own: Sequence[str], scratch: str, remedy: str
) -> Sequence[str]:
    if not along:
        return []
    soft = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    only = [f"--no-{kind}" for kind in soft]
    command = ["apt-cache", *own, "depends", "--recurse", *only, name]
    lines = run_step(command, scratch, remedy).splitlines()
    # A package starts its line; the dependencies of a package are indented.
    return [line for line in lines if re.fullmatch(along, line)]


def run_step(command: Sequence[str], folder: str, remedy: str) -> str:
    """Runs `command` in `folder`; returns its output. Raises DownloadError with `remedy`."""
    # Debian's tools call other tools from folders that a user's PATH may lack.
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
            timeout=600,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        raise DownloadError(f"`{' '.join(command)}` failed: {said}\n{remedy}") from error
    return done.stdout
