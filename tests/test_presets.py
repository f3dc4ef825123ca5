"""Names for schedules: read and checked, installed by an export, and asked for."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import GOLDEN_EXPORT, run_export

from export import install
from flowturbo import LocalPipeline
from flowturbo.errors import RepositoryError, RequestError
from flowturbo.pipeline import Pipeline
from flowturbo.presets import BUILT_IN, built_in, load_presets, presets_path, read_presets
from flowturbo.request import parse_request
from flowturbo.settings import Settings
from flowturbo.solver.schedule import Schedule

# A name of a real preset, and one that only letters of schedules could be taken for.
OWN = {"fast": "H1P1", "r3": "H1P2R1"}


def write(path: Path, presets: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"presets": presets, "hardware": "any"}))
    return path


def own(path: Path) -> Path:
    return write(path, {name: {"schedule": text, "ms": 1.0} for name, text in OWN.items()})


def test_reads(tmp_path: Path) -> None:
    found = read_presets(own(tmp_path / "p.json"), has_refiner=True)
    assert {name: str(schedule) for name, schedule in found.items()} == OWN
    assert load_presets(tmp_path, has_refiner=True) == built_in()
    presets_path(tmp_path).parent.mkdir()
    own(presets_path(tmp_path))
    both = load_presets(tmp_path, has_refiner=True)
    assert {name: str(s) for name, s in both.items()} == {**BUILT_IN, **OWN}
    assert {str(s) for s in built_in(has_refiner=False).values()} == {"H1P5", "H5P7", "H8P9"}


BAD: list[tuple[str, str]] = [
    ("not JSON", "must be JSON as"),
    ("[]", "must be JSON as"),
    (
        '{"presets": {"fast": {"schedule": "H8"}, "fast": {"schedule": "H4"}}}',
        "'fast' stands there twice",
    ),
    ('{"fast": {"schedule": "H1"}}', "KeyError: 'presets'"),
    ('{"presets": {"fast": "H1"}}', "TypeError"),
    ('{"presets": {"fast": {}}}', "KeyError: 'schedule'"),
    ('{"presets": {"fast": {"schedule": "X1"}}}', "preset fast: unknown step 'X'"),
    ('{"presets": {"fast": {"schedule": 8}}}', "preset fast: .*'8' cannot be read"),
    ('{"presets": {"H4": {"schedule": "H1"}}}', "small letters.* got 'H4'"),
    ('{"presets": {"": {"schedule": "H1"}}}', "small letters.* got ''"),
    ('{"presets": {"fast": {"schedule": "H1R1"}}}', "fast is H1R1, whose refiner steps need"),
]


@pytest.mark.parametrize(("text", "said"), BAD)
def test_refuses(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(RepositoryError, match=said) as caught:
        read_presets(path, has_refiner=False)
    assert str(path) in str(caught.value)


def asked(schedule: str, presets: dict[str, Schedule]) -> str:
    pipeline = Pipeline((4, 16, 16), 36, (), 64, True, True, presets=presets)
    tensors = {
        "label": np.array([1], np.int64),
        "schedule": np.array([schedule.encode()], object),
    }
    return str(parse_request(tensors, ["latent"], pipeline, Settings()).schedule)


def test_a_request_may_name_one() -> None:
    presets = {"fast": Schedule("HP"), "best": Schedule("HHR")}
    assert [asked(text, presets) for text in ("fast", "best", "H1P3")] == ["H1P1", "H2R1", "H1P3"]
    with pytest.raises(RequestError, match="H .Heun.*the presets here are fast, best$"):
        asked("faster", presets)
    with pytest.raises(RequestError, match="the presets here are none$"):
        asked("fast", {})


def test_the_default_may_be_one(golden_repository: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    shutil.copytree(golden_repository, repository)
    assert LocalPipeline(repository).default_schedule == built_in()["fast"]
    own(presets_path(repository))
    pipeline = LocalPipeline(repository)
    assert str(pipeline.default_schedule) == OWN["fast"]
    named, plain = (pipeline.generate(1, 1, text).latent for text in (None, OWN["fast"]))
    np.testing.assert_array_equal(named, plain)
    config = repository / "flowturbo" / "config.pbtxt"
    config.write_text(config.read_text().replace('"fast"', '"faster"'))
    with pytest.raises(RepositoryError, match="default_schedule: .*presets here are fast, balanc"):
        LocalPipeline(repository)


def test_export_installs_and_keeps(golden_repository: Path, tmp_path: Path) -> None:
    repository, file = tmp_path / "models", own(tmp_path / "own.json")
    shutil.copytree(golden_repository, repository)
    bad = write(tmp_path / "bad.json", {"fast": {"schedule": "H1X2"}})
    done = run_export(*GOLDEN_EXPORT, "--repository", repository, "--presets", bad)
    assert (done.returncode, "unknown step 'X'" in done.stderr) == (2, True), done.stderr
    assert not presets_path(repository).exists()
    done = run_export(*GOLDEN_EXPORT, "--repository", repository, "--presets", file)
    assert done.returncode == 0, done.stderr
    assert "fast H1P1, r3 H1P2R1" in done.stdout
    assert run_export(*GOLDEN_EXPORT, "--repository", repository).returncode == 0
    assert presets_path(repository).read_text() == file.read_text()
    named, plain = (
        LocalPipeline(repository).generate(1, 1, schedule).latent for schedule in ("r3", "H1P2R1")
    )
    np.testing.assert_array_equal(named, plain)
    # Models without a refiner cannot serve what is installed.
    alone = [text for text in GOLDEN_EXPORT if text != "--refiner" and "refiner" not in str(text)]
    done = run_export(*alone, "--repository", repository)
    assert (done.returncode, "preset r3 is H1P2R1" in done.stderr) == (2, True), done.stderr
    assert LocalPipeline(repository).pipeline.has_refiner  # nothing has been replaced


def test_another_repository_does_not_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, staged = tmp_path / "committed" / "flowturbo", tmp_path / "staged"
    shutil.copytree(install.COMMITTED, template)
    own(template / "presets.json")
    staged.mkdir()
    monkeypatch.setattr(install, "COMMITTED", template)
    install.add_orchestrator(staged, Settings(default_guidance_scale=2.5), tmp_path / "models")
    install.install(staged, tmp_path / "models", [])
    assert Settings.load(tmp_path / "models").default_guidance_scale == 2.5
    text = (tmp_path / "models" / "flowturbo" / "config.pbtxt").read_text()
    assert text.startswith("# The orchestrator")  # comments and all
    assert (tmp_path / "models" / "flowturbo" / "config.pbtxt").exists()
    assert not presets_path(tmp_path / "models").exists()
