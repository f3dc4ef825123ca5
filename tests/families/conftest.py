"""Tiny folders of every family, and one repository with all of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from families import folders
from support import ROOT, run_export

from flowturbo.nets.families.family import FolderOptions
from flowturbo.serving.tritonserver import ServerAddress, running_server

GOLDEN = ROOT / "tests" / "golden_t2i" / "sd3"
NAMES = ("golden", "sd3", "rectified", "klein", "z-image")


@dataclass(frozen=True)
class Case:
    """A folder, how to read it, and its options for the export."""

    folder: Path
    options: FolderOptions
    arguments: tuple[str, ...]


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    path, made = tmp_path_factory.mktemp("families"), {}

    def add(name: str, folder: Path, *arguments: str, **options: object) -> None:
        reading = FolderOptions(folder, **options)  # type: ignore[arg-type]
        made[name] = Case(folder, reading, arguments)

    add("golden", GOLDEN / "folder")
    add("sd3", folders.sd3(path / "sd3", with_t5=True), "--text-length", "12", text_length=12)
    rectified = folders.rectified_flow(path / "rectified")
    add("rectified", rectified, "--rectified-flow", rectified_flow=True)
    add("klein", folders.klein(path / "klein"), "--text-length", "32", text_length=32)
    add("z-image", folders.z_image(path / "z"), "--text-length", "64", text_length=64)
    return made


@pytest.fixture(scope="session")
def repository(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All families with two sizes, in float32."""
    repository = tmp_path_factory.mktemp("t2i") / "models"
    for name, case in cases.items():
        done = run_export(
            *("--diffusers", case.folder, "--name", name, *case.arguments),
            *("--size", "16x16", "24x16", "--precision", "fp32", "--runtime", "onnxruntime"),
            *("--repository", repository),
        )
        assert done.returncode == 0, done.stderr
    return repository


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[ServerAddress]:
    with running_server(repository) as address:
        yield address
