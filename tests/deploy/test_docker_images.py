"""What an image copies can be imported there: shown from the lists of files and packages."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT

STAGES = {
    name: text
    for text, name in re.findall(
        r"^(FROM \S+ AS (\w+)\n(?:(?!^FROM ).*\n)*)", (ROOT / "docker/Dockerfile").read_text(), re.M
    )
}
STAGES["export"] = STAGES["server"] + STAGES["export"]  # it begins where that one ends
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()
PACKAGES = ("flowturbo", "client", "export", "bench", "training", "research", "tuning")
OF_TRITON = "triton_python_backend_utils"  # which the server adds when it loads a model


def copied(stage: str) -> list[Path]:
    """The files of this project that an image has, relative to the project's root."""
    shown = [Path(line[1:]) for line in IGNORED if line.startswith("!")]
    hidden = [line for line in IGNORED if line[0] not in "*!" or line.startswith("**/")]
    files = []
    for sources in re.findall(r"^COPY (.+) \S+$", STAGES[stage], re.MULTILINE):
        for source in sources.split():
            assert any(Path(source).parts[0] == entry.parts[0] for entry in shown), source
            found = list(ROOT.glob(source))
            assert found, f"{source} is not there"
            files += [f for path in found for f in (path.rglob("*") if path.is_dir() else [path])]
    relative = sorted(file.relative_to(ROOT) for file in files if file.is_file())
    return [file for file in relative if not any(is_hidden(file, line) for line in hidden)]


def is_hidden(file: Path, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return any(fnmatch(part, pattern[3:]) for part in file.parts)
    return file.is_relative_to(pattern)


def required(stage: str) -> set[str]:
    """The distributions that an image installs for this project, with all that they need."""
    extras = re.findall(r"'\.\[([\w,]+)\]'", STAGES[stage])
    roots = [requirement("flowturbo", extras[0].split(",") if extras else [])]
    roots += [requirement("flowturbo-client", [])] * ("./client" in STAGES[stage])
    found: dict[tuple[str, str], None] = {}
    todo = list(roots)
    while todo:
        each = todo.pop()
        for extra in ("", *each.extras):
            if (key := (canonicalize_name(each.name), extra)) not in found:
                found[key] = None
                todo += needs(*key)
    return {name for name, _ in found}


def requirement(name: str, extras: list[str]) -> Requirement:
    return Requirement(f"{name}[{','.join(extras)}]")


def needs(name: str, extra: str) -> Iterator[Requirement]:
    for line in importlib.metadata.requires(name) or ():
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": extra}):
            yield needed


IMPORTER = """
import importlib, json, sys
from importlib.machinery import PathFinder
from pathlib import Path

root, blocked, modules = sys.argv[1], set(json.loads(sys.argv[2])), json.loads(sys.argv[3])

class Present(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in blocked:
            return super().find_spec(name, path, target)

# Without what is installed from the checkout itself.
kept = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.meta_path = [Present if finder is PathFinder else finder for finder in kept]
sys.path = [root, f"{root}/client", *sys.path]
failed = {}
for module in modules:
    try:
        assert importlib.import_module(module).__file__.startswith(root), module
    except ImportError as error:
        failed[module] = error.name
# What is imported only when it is needed: `flowturbo.serve` reads the settings.
from flowturbo.settings import Settings
Settings.load(Path(sys.argv[4]))
print(json.dumps(failed))
"""


@pytest.mark.parametrize("stage", ["server", "export", "gateway"])
def test_what_an_image_copies_can_be_imported_there(stage: str, tmp_path: Path) -> None:
    """With the distributions that the image installs, and no others of this environment."""
    files = copied(stage)
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    python = [f for f in files if f.suffix == ".py" and f.parts[0] in PACKAGES]
    names = [".".join(f.with_suffix("").parts).removeprefix("client.") for f in python]
    modules = [name.removesuffix(".__init__") for name in names]
    assert "flowturbo.serve" in modules
    assert {"tuning.__main__", "bench.load"} <= set(modules) or stage != "export"
    if stage == "gateway":  # it starts no server
        modules = [each for each in modules if not each.startswith("flowturbo.serv")]
    there = {*required(stage), "flowturbo", "flowturbo-client"}
    blocked = [
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if not there & {canonicalize_name(owner) for owner in owners}
    ]
    assert ("torch" in blocked) == (stage != "export")
    repository = ROOT / "model_repository"
    arguments = [tmp_path, json.dumps(blocked), json.dumps(modules), repository]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTER, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout.splitlines()[-1])
    assert set(failed.values()) <= {OF_TRITON}, failed


def test_the_records_of_this_machines_pipelines_stay_here() -> None:
    """Their models are not in the image."""
    orchestrator = Path("model_repository/flowturbo")
    found = [file for file in copied("export") if file.is_relative_to(orchestrator)]
    assert found == [orchestrator / "1/model.py", orchestrator / "config.pbtxt"]


def test_the_extras_are_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"'\.\[([\w,]+)\]'", STAGES["export"]):
        assert set(extras.split(",")) <= declared["optional-dependencies"].keys()
