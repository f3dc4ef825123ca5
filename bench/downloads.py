"""Tools that are downloaded once, into the cache: nothing is installed, and no root is needed."""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from flowturbo.serving.installation import SetupError, cache_folder


class DownloadError(Exception):
    """A tool could not be had: the message says what to install."""


def made_whole(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, made by `make(folder)` if it is not there: all or nothing.

    Raises SetupError where the cache cannot be written.
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
            if not target.exists():  # else somebody was faster, and theirs is whole
                new.rename(target)
    except OSError as error:
        raise SetupError(
            f"cannot write {target}: {error}; set XDG_CACHE_HOME to a writable folder"
        ) from error
    return target


def debian_package(name: str, *, along: str = "") -> Path:
    """The folder into which Debian's package `name` is unpacked.

    So are those that it depends on, directly or not, whose names match the pattern `along`. Raises
    DownloadError, and SetupError where the cache cannot be written.
    """

    def download(folder: Path) -> None:
        remedy = f"run `apt-get install {name}`"
        with tempfile.TemporaryDirectory() as scratch:
            # Package lists of its own: the system's may be absent, and need root to be fetched.
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
    # A package stands at the start of a line, what it depends on is indented.
    return [line for line in lines if re.fullmatch(along, line)]


def run_step(command: Sequence[str], folder: str, remedy: str) -> str:
    """What `command` prints, run in `folder`; raises DownloadError, which ends in `remedy`."""
    # Debian's tools look for others in folders that a user's PATH need not have.
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
