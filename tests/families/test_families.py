"""Every model family against diffusers' own pipeline: tiny random folders, exported in float32."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from families import folders
from support import ROOT, run_export

from flowturbo import LocalPipeline
from flowturbo.latents import noise
from flowturbo.nets.families.family import Family, FolderOptions, Wanted
from flowturbo.nets.families.loading import load_family

GOLDEN = ROOT / "tests" / "golden_t2i" / "sd3"
PROMPTS = ["a red b on 7", "k left of 9, blue"]
SIZE = (16, 16)


@dataclass(frozen=True)
class Case:
    """A folder, how to read it, and its options for the export."""

    folder: Path
    options: FolderOptions
    arguments: tuple[str, ...]
    size: tuple[int, int] = SIZE


def _cases(path: Path) -> dict[str, Case]:
    made = {}

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


NAMES = ("golden", "sd3", "rectified", "klein", "z-image")


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return _cases(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def repository(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("t2i") / "models"
    for name, case in cases.items():
        done = run_export(
            *("--diffusers", case.folder, "--name", name, *case.arguments),
            *("--size", "16x16", "24x16", "--precision", "fp32", "--runtime", "onnxruntime"),
            *("--repository", repository),
        )
        assert done.returncode == 0, done.stderr
    return repository


def wanted(family: Family, guidance: float) -> Wanted:
    start = noise(np.arange(2), family.latent_shape(SIZE))
    return Wanted(PROMPTS, start, 4, guidance, SIZE, family.text_length)


@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_of_diffusers(name: str, cases: dict[str, Case], repository: Path) -> None:
    family = load_family(cases[name].options)
    pipeline = LocalPipeline(repository, name)
    for guidance in (1.0, 4.0):
        asked = wanted(family, guidance)
        want, times = family.reference(asked)
        made = pipeline.generate(
            prompt=PROMPTS,
            schedule="E4",
            times=times,
            guidance_scale=guidance,
            initial_noise=asked.noise,
            size=SIZE,
        )
        assert np.abs(made.latent - want).max() < 1e-4 * np.abs(want).max()
        assert made.image is not None and made.image.shape == (2, *SIZE, 3)
