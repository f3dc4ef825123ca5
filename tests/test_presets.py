"""Names for schedules: read and checked, installed by an export, and asked for."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import GOLDEN_EXPORT, run_export

from export import install
from flowturbo import LocalPipeline
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import ORCHESTRATOR, STREAM, Role
from flowturbo.errors import RepositoryError, RequestError
from flowturbo.pipeline import (
    Defaults,
    ModelRecord,
    Pipeline,
    installed,
    read_pipeline,
    record_path,
    record_text,
)
from flowturbo.presets import BUILT_IN, built_in, find_schedule, read_presets
from flowturbo.request import parse_request
from flowturbo.settings import Settings, orchestrator_config
from flowturbo.solver.grid import GridRule

# A name of a real preset, and one that only letters of schedules could be taken for.
OWN = {"fast": "H1P1", "r3": "H1P2R1"}


def write(path: Path, presets: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"presets": presets, "hardware": "any"}))
    return path


def own(path: Path) -> Path:
    return write(path, {name: {"schedule": text, "ms": 1.0} for name, text in OWN.items()})


def pipeline_with(presets: Mapping[str, str], *roles: Role) -> Pipeline:
    models = dict.fromkeys((Role.PREDICTOR, *roles), ModelRecord())
    return Pipeline("sit", ClassLabel(36), (4, 16, 16), models, own_presets=presets)


def rewrite_record(repository: Path, **changes: Any) -> None:
    """Other fields in the record of the installed pipeline."""
    pipeline = replace(read_pipeline(repository), **changes)
    record_path(repository, pipeline.name).write_text(record_text(pipeline))


def test_reads(tmp_path: Path) -> None:
    assert read_presets(own(tmp_path / "p.json"), has_refiner=True) == OWN


def test_a_pipeline_has_the_built_in_ones_and_its_own() -> None:
    """Its own come before built-in ones of the same name."""
    assert pipeline_with({}, Role.REFINER).presets == built_in()
    both = pipeline_with(OWN, Role.REFINER).presets
    assert {name: str(schedule) for name, schedule in both.items()} == {**BUILT_IN, **OWN}
    alone = pipeline_with({}).presets
    assert {str(schedule) for schedule in alone.values()} == {"H1P5", "H5P7", "H8P9"}
    # Without an @, they are on the pipeline's grid.
    shifted = replace(pipeline_with({"a": "E4", "b": "E4@1"}), grid=GridRule(shift=2.5))
    chosen = [shifted.find_schedule(name) for name in ("a", "b", "fast")]
    found = [shifted.on_own_grid(schedule, (4, 8, 8)) for schedule in chosen]
    assert [(str(schedule), times) for schedule, times in found] == [
        ("E4@2.5", None),
        ("E4@1", None),
        ("H1P5@2.5", None),
    ]


BAD: list[tuple[str, str]] = [
    ("not JSON", "must be JSON such as"),
    ("[]", "must be JSON such as"),
    (
        '{"presets": {"fast": {"schedule": "H8"}, "fast": {"schedule": "H4"}}}',
        "'fast' occurs twice",
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


def asked(schedule: str, presets: dict[str, str]) -> str:
    tensors = {
        "label": np.array([1], np.int64),
        "schedule": np.array([schedule.encode()], object),
    }
    pipeline = pipeline_with(presets, Role.REFINER)
    return str(parse_request(tensors, ["latent"], pipeline, Settings()).schedule)


def test_a_request_may_name_one() -> None:
    presets = {"fast": "HP", "best": "HHR"}
    assert [asked(text, presets) for text in ("fast", "best", "H1P3")] == ["H1P1", "H2R1", "H1P3"]
    assert asked("balanced", presets) == BUILT_IN["balanced"]
    with pytest.raises(RequestError, match="H .Heun.*the presets here are fast, balanced, best$"):
        asked("faster", presets)
    with pytest.raises(RequestError, match="the presets here are none$"):
        find_schedule("fast", {})


def test_the_default_may_be_one(golden_repository: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    shutil.copytree(golden_repository, repository)
    assert LocalPipeline(repository).default_schedule == built_in()["fast"]
    rewrite_record(repository, own_presets=OWN)
    pipeline = LocalPipeline(repository)
    assert str(pipeline.default_schedule) == OWN["fast"]
    named, plain = (pipeline.generate(1, 1, text).latent for text in (None, OWN["fast"]))
    np.testing.assert_array_equal(named, plain)
    config = orchestrator_config(repository)
    config.write_text(config.read_text().replace('"fast"', '"faster"'))
    with pytest.raises(
        RepositoryError, match="pipeline sit: the default schedule .*presets here are fast, balanc"
    ):
        LocalPipeline(repository)
    # The pipeline's own default comes first.
    rewrite_record(repository, defaults=Defaults(schedule="r3"))
    assert str(LocalPipeline(repository).default_schedule) == OWN["r3"]


def test_export_installs_and_keeps(golden_repository: Path, tmp_path: Path) -> None:
    repository, file = tmp_path / "models", own(tmp_path / "own.json")
    shutil.copytree(golden_repository, repository)

    def export(*arguments: object) -> subprocess.CompletedProcess[str]:
        return run_export(*GOLDEN_EXPORT, "--repository", repository, *map(str, arguments))

    bad = write(tmp_path / "bad.json", {"fast": {"schedule": "H1X2"}})
    done = export("--presets", bad)
    assert (done.returncode, "unknown step 'X'" in done.stderr) == (2, True), done.stderr
    assert read_pipeline(repository).own_presets == {}
    done = export("--presets", file)
    assert done.returncode == 0, done.stderr
    assert "defaults and presets" in done.stdout  # nothing is exported again
    assert read_pipeline(repository).own_presets == OWN
    for _ in range(2):
        done = export()
        assert (done.returncode, "installed" in done.stdout) == (0, False), done.stderr
        assert read_pipeline(repository).own_presets == OWN
    assert "up to date" in done.stdout
    named, plain = (
        LocalPipeline(repository).generate(1, 1, schedule).latent for schedule in ("r3", "H1P2R1")
    )
    np.testing.assert_array_equal(named, plain)


def test_presets_with_refiner_steps_need_a_refiner(golden_repository: Path, tmp_path: Path) -> None:
    """Those given are refused; those that the pipeline had are left out, and no others."""
    repository, file = tmp_path / "models", own(tmp_path / "own.json")
    shutil.copytree(golden_repository, repository)
    rewrite_record(repository, own_presets=OWN)
    alone = [text for text in GOLDEN_EXPORT if text != "--refiner" and "refiner" not in str(text)]
    done = run_export(*alone, "--repository", repository, "--presets", file)
    assert (done.returncode, "preset r3 is H1P2R1" in done.stderr) == (2, True), done.stderr
    found = read_pipeline(repository)  # nothing has been replaced
    assert found.has(Role.REFINER) and found.own_presets == OWN
    done = run_export(*alone, "--repository", repository)
    assert done.returncode == 0, done.stderr
    found = read_pipeline(repository)
    assert not found.has(Role.REFINER)
    assert found.own_presets == {"fast": OWN["fast"]}


def test_another_repository_does_not_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new orchestrator has the settings of the source tree, and none of its pipelines."""
    template, repository = tmp_path / "committed", tmp_path / "models"
    for name in (ORCHESTRATOR, STREAM):
        without = shutil.ignore_patterns("pipelines")
        shutil.copytree(install.COMMITTED / name, template / name, ignore=without)
    committed = pipeline_with(OWN)
    record = record_path(template, committed.name)
    record.parent.mkdir()
    record.write_text(record_text(committed))
    config = template / ORCHESTRATOR / "config.pbtxt"
    config.write_text(config.read_text().replace('"1.5"', '"2.5"'))
    monkeypatch.setattr(install, "COMMITTED", template)
    install.add_orchestrator(repository)
    settings = Settings.load(repository)
    assert (settings.default_guidance_scale, settings.default_pipeline) == (2.5, "")
    assert orchestrator_config(repository).read_text().startswith("# The orchestrator")
    assert installed(repository) == []
    new = pipeline_with({})
    staged = tmp_path / "staged"
    staged.mkdir()
    install.install(staged, repository, new, [])
    assert read_pipeline(repository) == new
    assert read_pipeline(repository).presets == built_in(has_refiner=False)
