"""Checkpoints of the public families load and export; what does not fit is named."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from support import GOLDEN, GOLDEN_EXPORT, check_tensors, read_config, run_export
from tritonclient.grpc.model_config_pb2 import ModelConfig

import export.pipeline
from bench.networks import SMALL
from export.__main__ import _options
from export.install import install, installed_pipeline, remove, write_record
from export.onnx_graph import ExportTarget, export_onnx
from export.parity import torch_figures
from flowturbo import LocalPipeline
from flowturbo.conditions import REQUEST_INPUTS, REQUEST_OUTPUTS
from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import GUIDANCE_INTERVAL, ORCHESTRATOR, STREAM, Role, model_name
from flowturbo.errors import RepositoryError
from flowturbo.nets.blocks import PredictorBlock
from flowturbo.nets.sit import ByLabel, SiT
from flowturbo.parity import TOLERANCES, VerificationError
from flowturbo.pipeline import (
    VERSION,
    Pipeline,
    class_label,
    read_pipeline,
    record_path,
)
from flowturbo.runtimes import open_model
from flowturbo.settings import Settings, orchestrator_config

PREDICTOR_ALONE = ("--predictor", GOLDEN / "predictor.pt", "--num-heads", "2")
FLOAT32 = ("--runtime", "onnxruntime", "--precision", "fp32")


@pytest.fixture
def repository(golden_repository: Path, tmp_path: Path) -> Path:
    """A copy of the golden repository, to be changed."""
    copy = tmp_path / "models"
    shutil.copytree(golden_repository, copy)
    return copy


def add_twin(repository: Path, name: str) -> Pipeline:
    """Installs the files of `sit` a second time, as the pipeline `name`."""
    of = read_pipeline(repository, "sit")
    for role in of.models:
        shutil.copytree(repository / of.model(role), repository / model_name(name, role))
    made = replace(of, name=name)
    write_record(repository, made)
    return made


def content(repository: Path, under: str = "*") -> dict[str, tuple[bytes, int]]:
    """Bytes and modification time of the files below the folders `under` of `repository`."""
    files = [path for folder in repository.glob(under) for path in folder.rglob("*")]
    return {
        str(path.relative_to(repository)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in files
        if path.is_file()
    }


def edit_record(repository: Path, changed: dict[str, Any]) -> None:
    """Changes entries of the record of `sit` by hand; None takes one out."""
    path = record_path(repository, "sit")
    stated = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({key: of for key, of in stated.items() if of is not None}))


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    network = SiT(SMALL)

    def exported() -> ExportTarget:
        condition = ClassLabel(SMALL.num_classes)
        return ExportTarget(
            Role.PREDICTOR, PredictorBlock(ByLabel(network), 3), (4, 8, 8), condition
        )

    def verify() -> None:
        torch_figures(exported()).check(Role.PREDICTOR, model, TOLERANCES["fp32"])

    export_onnx(exported(), tmp_path / "model.onnx")
    model = open_model(tmp_path / "model.onnx")
    verify()
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.1)
    with pytest.raises(VerificationError, match="x_next is off by"):
        verify()


def test_command_errors_leave_the_repository_alone(golden_repository: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in golden_repository.rglob("*")}
    for arguments, said in [
        (("--predictor", "nowhere.pt"), "nowhere.pt does not exist"),
        (
            ("--predictor", GOLDEN / "refiner.pt", "--refiner", GOLDEN / "predictor.pt")
            + ("--num-heads", "2"),
            "swapped",
        ),
        (("--predictor", GOLDEN / "predictor.pt"), "give it with --num-heads"),
        (
            ("--predictor", GOLDEN / "predictor.pt", "--num-heads", "2", "--vae", GOLDEN),
            "not a diffusers AutoencoderKL folder",
        ),
        (
            ("--predictor", GOLDEN / "predictor.pt", "--num-heads", "2", "--class-names", __file__),
            "names, the predictor has 10 classes",
        ),
    ]:
        done = run_export(*arguments, "--repository", golden_repository)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert {p: p.stat().st_mtime_ns for p in golden_repository.rglob("*")} == before
    assert [p.name for p in golden_repository.parent.iterdir()] == ["models"]


def test_an_export_is_done_once(golden_repository: Path) -> None:
    done = run_export(*GOLDEN_EXPORT, "--repository", golden_repository)
    assert "up to date" in done.stdout
    pipeline = read_pipeline(golden_repository)
    assert pipeline.models[Role.REFINER].parity["velocity_next"] <= 1e-4
    assert len(pipeline.fingerprint["sha256"]["refiner"]) == 64


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


REFINER = "sit_velocity_refiner"
RECORD = str(record_path(Path(), "sit"))


def other_names(path: Path) -> None:
    stated = json.loads(path.read_text())
    stated["condition"]["class_names"] = ["a", "b"]
    path.write_text(json.dumps(stated))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (f"{REFINER}/1/model.onnx", Path.unlink),
        (f"{REFINER}/1/model.onnx", cut),
        (f"{REFINER}/1/model.onnx", lambda path: shutil.copy(GOLDEN / "refiner.pt", path)),
        (f"{REFINER}/1/model.py", lambda path: path.write_text("")),
        (RECORD, Path.unlink),
        (RECORD, cut),
        (RECORD, lambda path: path.write_text("[]")),
        (RECORD, other_names),
    ],
)
def test_a_damaged_pipeline_is_exported_again(
    repository: Path, file: str, damage: Callable[[Path], object]
) -> None:
    """It does not count as installed; another pipeline beside it does."""
    twin = add_twin(repository, "sit_b")
    assert installed_pipeline(repository, "sit") == read_pipeline(repository, "sit")
    damage(repository / file)
    assert installed_pipeline(repository, "sit") is None
    assert installed_pipeline(repository, "sit_b") == twin


def older(path: Path) -> None:
    """As a version that knew no interval of guidance wrote it."""
    config = text_format.Parse(path.read_text(), ModelConfig())
    names = [entry.name for entry in config.input]
    del config.input[names.index(GUIDANCE_INTERVAL)]
    config.parameters["max_images"].string_value = "7"
    path.write_text(text_format.MessageToString(config))


def test_what_is_damaged_around_the_networks_is_mended(repository: Path) -> None:
    """Nothing is exported again for it."""
    again = (*GOLDEN_EXPORT, "--ensemble", "H1P1", "--repository", repository)
    assert run_export(*again).returncode == 0

    def bytes_of() -> dict[str, bytes]:
        return {path: found for path, (found, _) in content(repository).items()}

    whole, ensemble = bytes_of(), "sit_h1p1_planner"
    damages: list[tuple[str, Callable[[Path], object]]] = [
        ("sit_velocity_predictor/config.pbtxt", lambda path: path.write_text("")),
        ("sit_velocity_predictor/config.pbtxt", Path.unlink),
        (f"{ensemble}/1/model.py", Path.unlink),
        (f"{ensemble}/1/model.py", lambda path: path.write_text("")),
        (f"{ensemble}/config.pbtxt", cut),
        (f"{ORCHESTRATOR}/1/model.py", Path.unlink),
        (f"{ORCHESTRATOR}/1/model.py", lambda path: path.write_text("")),
        (f"{ORCHESTRATOR}/config.pbtxt", older),
        (f"{ORCHESTRATOR}/config.pbtxt", Path.unlink),
        (f"{STREAM}/1/model.py", Path.unlink),
        (f"{STREAM}/config.pbtxt", Path.unlink),
        (f"{STREAM}/config.pbtxt", lambda path: shutil.rmtree(path.parent)),
    ]
    for file, damage in damages:
        damage(repository / file)
        done = run_export(*again)
        assert done.returncode == 0, done.stderr
        assert "PyTorch" not in done.stdout
        if damage is older:
            settings = Settings.load(repository)
            assert (settings.max_images, settings.max_inflight) == (7, 64)
            config = read_config(repository / file)
            check_tensors(config.input, REQUEST_INPUTS, {"C": -1, "h": -1, "w": -1})
            check_tensors(config.output, REQUEST_OUTPUTS, {})
        else:
            found = bytes_of()
            different = [path for path in whole if found.get(path) != whole[path]]
            # The orchestrator's configuration has no comments any more.
            configs = {f"{front}/config.pbtxt" for front in (ORCHESTRATOR, STREAM)}
            assert set(different) <= configs, file
            assert Settings.load(repository).default_pipeline == "sit"
            assert "up to date" in run_export(*again).stdout
    orchestrator_config(repository).write_text("parameters [ {")
    done = run_export(*again)
    assert done.returncode == 2
    assert "flowturbo/config.pbtxt is no configuration of a model" in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no names"),
        ("\n\n", "has no names"),
        ("\ufeff", "has no names"),
        ("a\n\ufeffb\n" + "c\n" * 8, r"line 2 must be a name .*U\+FEFF"),
        ("a\n\u200db\n" + "c\n" * 8, r"line 2 must be a name .*U\+200D"),
        ("a\n\u200b\n" + "c\n" * 8, r"line 2 must be a name .*U\+200B"),
        ("a\n\u00a0\n" + "c\n" * 8, "line 2 must be a name, it is empty"),
    ],
)
def test_names_that_nobody_could_ask_for(tmp_path: Path, content: str, said: str) -> None:
    names = tmp_path / "names.txt"
    names.write_text(content)
    done = run_export(*PREDICTOR_ALONE, "--class-names", names, "--repository", tmp_path / "models")
    assert done.returncode == 2
    assert re.search(said, done.stderr)


def test_names_and_presets_may_come_through_pipes(tmp_path: Path) -> None:
    """Each is read once."""

    def pipe(name: str, text: str) -> Path:
        os.mkfifo(tmp_path / name)
        Thread(target=(tmp_path / name).write_text, args=(text,), daemon=True).start()
        return tmp_path / name

    repository = tmp_path / "models"
    names = [f"class {k}" for k in range(10)]
    presets = {"presets": {"quick": {"schedule": "H2"}}}
    done = run_export(
        *(*PREDICTOR_ALONE, *FLOAT32, "--repository", repository),
        *("--class-names", pipe("names", "\n".join(names))),
        *("--presets", pipe("presets", json.dumps(presets))),
    )
    assert done.returncode == 0, done.stderr
    pipeline = installed_pipeline(repository, "sit")
    assert pipeline
    assert list(class_label(pipeline).class_names) == names
    assert str(pipeline.presets["quick"]) == "H2"
    assert pipeline.fingerprint["class_names"] == names


CLASSES = {"kind": "class_label", "num_classes": 10, "null_class": True}
AGAIN = r"again with: python -m export --predictor .*refiner\.pt"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"version": VERSION + 1}, f"version {VERSION + 1}, this release reads {VERSION}: .*"),
        ({"version": None}, f"version None, this release reads {VERSION}: .*"),
        ({"models": None}, "no record of a pipeline .KeyError: 'models'.*"),
        ({"step": 1}, "no record of a pipeline .KeyError: 'step'.*"),
        ({"name": "other"}, "no record of a pipeline .*name 'other'.*"),
        ({"models": {}}, r"no record of a pipeline .*models \[\].*"),
        ({"models": {"painter": {}}}, "no record of a pipeline .*'painter' is not a valid Role.*"),
        ({"models": {"predictor": {"speed": 1}}}, "no record of a pipeline .*'speed'.*"),
        ({"latent_shape": [4, 8]}, "no record of a pipeline .*"),
        ({"own_presets": {"fast": "X1"}}, "no record of a pipeline .*unknown step 'X'.*"),
        ({"condition": {**CLASSES, "class_names": ["a", "b"]}}, "no record .*2 names of 10 cl.*"),
        ({"condition": {"kind": "melody"}}, "no record .*condition 'melody' is unknown.*"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused(
    repository: Path, changed: dict[str, Any], said: str
) -> None:
    """By the command that makes it again."""
    edit_record(repository, changed)
    with pytest.raises(RepositoryError, match=said + AGAIN):
        LocalPipeline(repository)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is not JSON"), ("[]", "must be an object"), ("\0", "NUL")]
)
def test_a_record_that_is_none_is_refused(repository: Path, text: str, said: str) -> None:
    record_path(repository, "sit").write_text(text)
    with pytest.raises(RepositoryError, match=f"{said}.*: export the pipeline again with: python"):
        LocalPipeline(repository)


def test_a_record_of_another_version(repository: Path) -> None:
    """`verify` refuses it in one line, `list` shows the reason, an export makes it anew."""
    add_twin(repository, "other")
    edit_record(repository, {"version": VERSION + 1})
    before = content(repository)
    said = f"is a record of version {VERSION + 1}, .*{AGAIN}"
    done = run_export(
        *("verify", *PREDICTOR_ALONE, "--refiner", GOLDEN / "refiner.pt"),
        *("--repository", repository),
    )
    assert done.returncode == 2
    assert re.search(said, done.stderr) and done.stderr.count("\n") == 1
    listed = run_export("list", "--repository", repository)
    assert listed.returncode == 0
    assert re.search(f"^sit: .*{said}", listed.stdout, re.MULTILINE)
    assert re.search("^other: class_label, latents", listed.stdout, re.MULTILINE)
    assert content(repository) == before
    done = run_export(*GOLDEN_EXPORT, "--repository", repository)
    assert done.returncode == 0, done.stderr
    assert "installed sit" in done.stdout
    assert installed_pipeline(repository, "sit")


def test_a_damaged_record_leaves_no_models_behind(repository: Path) -> None:
    """Triton loads every folder: those of the old ensemble, too, which the new models lack."""
    done = run_export(*GOLDEN_EXPORT, "--ensemble", "H1R1", "--repository", repository)
    assert done.returncode == 0, done.stderr
    add_twin(repository, "sit_b")
    twin = {path for path in content(repository) if "sit_b" in path}
    edit_record(repository, {"version": VERSION + 1})
    done = run_export(*PREDICTOR_ALONE, *FLOAT32, "--repository", repository)
    assert done.returncode == 0, done.stderr
    folders = {path.name for path in repository.iterdir() if path.name.startswith("sit")}
    kept = {path.name for path in repository.glob("sit_b_*")}
    assert folders - kept == {"sit_velocity_predictor"}
    assert twin <= content(repository).keys()
    edit_record(repository, {"version": VERSION + 1})
    removed = run_export("remove", "sit", "--repository", repository)
    assert removed.returncode == 0, removed.stderr
    assert "removed sit" in removed.stdout
    assert {path.name for path in repository.glob("sit*")} == kept


def test_the_recorded_command_has_what_the_pipeline_keeps(repository: Path) -> None:
    options = ("--ensemble", "H2", "--guidance-scale", "2.5", "--default-schedule", "H3")
    for given in (options, ()):
        done = run_export(*GOLDEN_EXPORT, *given, "--repository", repository)
        assert done.returncode == 0, done.stderr
        command = read_pipeline(repository, "sit").command
        assert all(command.count(word) >= 1 for word in options)
        assert command.count("--ensemble") == command.count("--guidance-scale") == 1


def test_predictor_alone(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    done = run_export(*PREDICTOR_ALONE, "--repository", repository)
    assert done.returncode == 0, done.stderr
    pipeline = LocalPipeline(repository)
    result = pipeline.generate([1, 2], [3, 4], "H2", 1.0)
    assert result.latent.shape == (2, 4, 8, 8)
    assert np.isfinite(result.latent).all()
    assert result.image is None
    with pytest.raises(ValueError, match="pipeline sit has no refiner"):
        pipeline.generate(1, 1, "H1R1")


@pytest.mark.parametrize("fails", [REFINER, "sit.partial"], ids=["model", "record"])
def test_a_failed_installation_brings_the_old_pipeline_back(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Its record too, and the ensembles that the new one would not have had."""
    done = run_export(*GOLDEN_EXPORT, "--ensemble", "H1P1", "--repository", repository)
    assert done.returncode == 0, done.stderr
    pipeline, staged = read_pipeline(repository), tmp_path / "staged"
    for role in pipeline.models:
        shutil.copytree(repository / pipeline.model(role), staged / pipeline.model(role))
    (staged / pipeline.model(Role.PREDICTOR) / "new").touch()
    new = replace(pipeline, ensembles={}, parts=(), own_presets={"quick": "H2"})
    before = content(repository)

    def failing(moved: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def move(self: Path, target: Path) -> Path:
            # The staged model, not the old one on its way out or back.
            if self.name == fails and self.parent in (staged, record_path(repository, "").parent):
                raise OSError("disk full")
            return moved(self, target)

        return move

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing(Path.rename))
        patched.setattr(Path, "replace", failing(Path.replace))
        with pytest.raises(OSError, match="disk full"):
            install(staged, repository, new, pipeline.folders)
    after = content(repository)
    after.pop(str(record_path(Path(), "sit").with_suffix(".partial")), None)
    assert after == before
    assert installed_pipeline(repository, "sit") == pipeline


def test_the_default_guidance_is_the_pipelines(repository: Path, tmp_path: Path) -> None:
    settings = Settings.load(repository)
    assert settings.default_guidance_scale == 1.5
    assert read_pipeline(repository).default_guidance_scale(settings) == 1.5
    for given, expected in ((("--guidance-scale", "2"), 2.0), ((), 2.0)):
        done = run_export(*GOLDEN_EXPORT, *given, "--repository", repository)
        assert done.returncode == 0, done.stderr
        assert "PyTorch" not in done.stdout  # the models were there
        assert read_pipeline(repository).default_guidance_scale(settings) == expected
        assert Settings.load(repository) == settings
    pipeline = read_pipeline(repository)
    for given, expected in ((("--guidance-scale", "0"), 0.0), ((), 1.5)):
        options = _options(
            [*map(str, GOLDEN_EXPORT), *given, "--repository", str(tmp_path / "new")]
        )
        new = replace(pipeline, defaults=export.pipeline._defaults(options, None, {}))
        assert new.default_guidance_scale(settings) == expected
    done = run_export(*GOLDEN_EXPORT, "--guidance-scale", "nan", "--repository", repository)
    assert done.returncode == 2 and "guidance_scale must be" in done.stderr


def test_the_default_schedule_is_the_pipelines(repository: Path) -> None:
    """Given once, it stays; what could not be served is refused and changes nothing."""
    settings = Settings.load(repository)
    assert str(read_pipeline(repository).default_schedule(settings)) == "H1P5R3"  # `fast`
    for given, expected in (
        (("--default-schedule", "E2"), "E2"),
        ((), "E2"),
        (("--default-schedule", "balanced"), "H5P7R3"),
    ):
        done = run_export(*GOLDEN_EXPORT, *given, "--repository", repository)
        assert done.returncode == 0, done.stderr
        assert str(read_pipeline(repository).default_schedule(settings)) == expected
        assert Settings.load(repository) == settings
    before = content(repository)
    for source, given, said in (
        (GOLDEN_EXPORT, "X1", "unknown step 'X'"),
        (GOLDEN_EXPORT, "nosuch", "the presets here are fast, balanced, best"),
        (PREDICTOR_ALONE, "H1R1", "the default schedule H1R1 has refiner steps"),
    ):
        done = run_export(*source, "--default-schedule", given, "--repository", repository)
        assert done.returncode == 2
        assert said in done.stderr
        assert "PyTorch" not in done.stdout  # before minutes of export
    assert content(repository) == before


def test_pipelines_are_listed(repository: Path, tmp_path: Path) -> None:
    twin = add_twin(repository, "other")
    write_record(repository, replace(twin, own_presets={"quick": "H2"}, ensembles={"H2": "x"}))
    done = run_export("list", "--repository", repository)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 12
    models = "  models: predictor, refiner; python onnxruntime fp32, at most 64 rows"
    assert lines[:2] == ["other: class_label, latents", models]
    assert lines[2].startswith("  presets: ") and lines[2].endswith(", quick H2")
    assert lines[3:5] == ["  solvers (guidance): none", "  ensembles: H2"]
    assert lines[6:8] == ["sit (default): class_label, latents", models]
    assert lines[8].startswith("  presets: fast H1P5R3, ") and "quick" not in lines[8]
    assert lines[10] == "  ensembles: none"
    assert lines[11].startswith(f"  made by: python -m export --predictor {GOLDEN}")
    done = run_export("list", "--repository", tmp_path / "nowhere")
    assert done.returncode == 0
    assert done.stdout == f"{tmp_path / 'nowhere'} has no pipeline\n"


def test_images_are_listed_by_their_size(glyphs_repository: Path) -> None:
    done = run_export("list", "--repository", glyphs_repository)
    assert re.match(r"glyphs( \(default\))?: class_label, 64x64 images\n", done.stdout)
    assert "  models: predictor, refiner, decoder, encoder; python " in done.stdout


def test_a_pipeline_is_removed(repository: Path) -> None:
    add_twin(repository, "other")
    before = content(repository)
    done = run_export("remove", "nowhere", "--repository", repository)
    assert done.returncode == 2
    assert done.stderr == (
        f"export: {repository} has no pipeline 'nowhere'; installed: other, sit\n"
    )
    assert content(repository) == before

    done = run_export("remove", "other", "--repository", repository)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"export: removed other from {repository}: other_velocity_predictor, "
        "other_velocity_refiner\n"
    )
    gone = before.keys() - content(repository).keys()
    assert gone == {path for path in before if "other" in path}
    assert content(repository) == {path: before[path] for path in before.keys() - gone}
    with pytest.raises(RepositoryError, match="no pipeline 'other'; installed: sit"):
        LocalPipeline(repository, "other")

    done = run_export("remove", "sit", "--repository", repository)
    assert done.returncode == 0, done.stderr
    note = "default_pipeline still names sit: set it in flowturbo/config.pbtxt"
    assert done.stdout.splitlines()[1:] == [f"export: {note}"]
    assert not record_path(repository, "sit").exists()
    assert {path.name for path in repository.iterdir()} == {ORCHESTRATOR, STREAM}
    done = run_export("remove", "sit", "--repository", repository)
    assert done.returncode == 2
    assert "has no pipeline 'sit'; installed: none" in done.stderr
    with pytest.raises(RepositoryError, match="has no pipeline, make one with: python -m export"):
        LocalPipeline(repository)


@pytest.mark.parametrize(
    "name", ["", "Glyphs", "a b", "../up", "_a", "a.b", "a/b", "x" * 41, "unknown"]
)
def test_a_bad_name_is_refused(tmp_path: Path, name: str) -> None:
    done = run_export(*PREDICTOR_ALONE, "--name", name, "--repository", tmp_path / "models")
    assert done.returncode == 2
    assert "a pipeline's name has at most 40 small letters, digits, - and _" in done.stderr
    assert f"got {name!r}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_two_pipelines_side_by_side(repository: Path) -> None:
    """One whose name starts like the other's: neither touches the other's folders."""
    second = (*PREDICTOR_ALONE, *FLOAT32, "--name", "sit_b", "--repository", repository)
    start: dict[str, Any] = {"label": [1, 2], "seed": [3, 4], "schedule": "H2"}
    expected = LocalPipeline(repository).generate(**start).latent
    sit = content(repository, "sit_*")
    done = run_export(*second, "--ensemble", "H2", "--guidance-scale", "1")
    assert done.returncode == 0, done.stderr
    assert "default" not in done.stdout
    assert Settings.load(repository).default_pipeline == "sit"
    sit_b = content(repository, "sit_b_*")
    assert {path.split("/")[0] for path in sit_b} == {
        *("sit_b_velocity_predictor", "sit_b_finisher", "sit_b_h2", "sit_b_h2_planner"),
    }
    assert content(repository, "sit_*") == sit | sit_b
    assert LocalPipeline(repository).pipeline.name == "sit"
    found = LocalPipeline(repository, "sit_b").generate(**start, guidance_scale=1.5).latent
    np.testing.assert_allclose(found, expected, atol=1e-6)  # the same predictor
    with pytest.raises(RepositoryError, match="no pipeline 'nosuch'; installed: sit, sit_b"):
        LocalPipeline(repository, "nosuch")

    first = (*GOLDEN_EXPORT, "--repository", repository)
    for schedules in (("H1P1", "H2"), ("H2",), ()):
        done = run_export(*first, "--ensemble", *schedules)
        assert done.returncode == 0, done.stderr
        assert len(read_pipeline(repository, "sit").ensembles) == len(schedules)
        assert content(repository, "sit_b_*") == sit_b
    owned = {
        folder for name in ("sit", "sit_b") for folder in read_pipeline(repository, name).folders
    }
    assert {path.name for path in repository.iterdir()} == {ORCHESTRATOR, STREAM, *owned}

    assert run_export("remove", "sit", "--repository", repository).returncode == 0
    assert content(repository, "sit_*") == sit_b
    with pytest.raises(RepositoryError, match="default_pipeline 'sit' is not installed; .* sit_b"):
        LocalPipeline(repository)
    done = run_export(*second)
    assert done.returncode == 0, done.stderr
    assert "PyTorch" not in done.stdout  # the model was there
    assert "export: sit_b is the default pipeline now" in done.stdout
    assert LocalPipeline(repository).pipeline.name == "sit_b"
    assert content(repository, "sit_*") == sit_b


def test_a_new_pipeline_is_the_default_where_the_default_is_gone(repository: Path) -> None:
    """The other settings and the comments of the configuration stay."""
    config = orchestrator_config(repository)
    stated = config.read_text().replace(
        'max_images", value: { string_value: "64"', 'max_images", value: { string_value: "7"'
    )
    config.write_text(stated)
    remove(repository, "sit")
    done = run_export(*PREDICTOR_ALONE, *FLOAT32, "--name", "new", "--repository", repository)
    assert done.returncode == 0, done.stderr
    assert "export: new is the default pipeline now" in done.stdout
    assert Settings.load(repository) == Settings("new", max_images=7)
    assert config.read_text() == stated.replace('"sit"', '"new"')
    assert LocalPipeline(repository).pipeline.name == "new"
