"""Checkpoints of the public families load and export; what does not fit is named."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from support import GOLDEN, GOLDEN_EXPORT, check_tensors, read_config, run_export
from tritonclient.grpc.model_config_pb2 import ModelConfig

import export.pipeline
from bench.networks import SMALL
from export.__main__ import _options
from export.install import install, installed_fingerprint
from export.onnx_graph import ExportTarget, export_onnx
from export.parity import torch_figures
from flowturbo import LocalPipeline, contract
from flowturbo.errors import RepositoryError
from flowturbo.nets.blocks import PredictorBlock
from flowturbo.nets.sit import SiT
from flowturbo.parity import TOLERANCES, VerificationError
from flowturbo.pipeline import Pipeline
from flowturbo.runtimes import open_model
from flowturbo.settings import Settings


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    network = SiT(SMALL)

    def exported() -> ExportTarget:
        return ExportTarget(
            contract.PREDICTOR, PredictorBlock(network, 3), (4, 8, 8), network.config
        )

    def verify() -> None:
        torch_figures(exported()).check(contract.PREDICTOR, model, TOLERANCES["fp32"])

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
            "names, the predictor 10 classes",
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
    build = json.loads((golden_repository / "velocity_refiner" / "build.json").read_text())
    assert build["parity"]["velocity_next"] <= 1e-4
    assert len(build["fingerprint"]["sha256"]["velocity_refiner"]) == 64


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def other_names(path: Path) -> None:
    build = json.loads(path.read_text())
    path.write_text(json.dumps({**build, "class_names": ["a", "b"]}))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("1/model.onnx", Path.unlink),
        ("1/model.onnx", cut),
        ("1/model.onnx", lambda path: shutil.copy(GOLDEN / "refiner.pt", path)),
        ("1/model.py", lambda path: path.write_text("")),
        ("build.json", cut),
        ("build.json", lambda path: path.write_text("[]")),
        ("build.json", other_names),
    ],
)
def test_a_damaged_model_is_exported_again(
    golden_repository: Path, tmp_path: Path, file: str, damage: Callable[[Path], object]
) -> None:
    repository = tmp_path / "models"
    shutil.copytree(golden_repository, repository)
    models = (contract.PREDICTOR, contract.REFINER)
    whole = [installed_fingerprint(repository, model) for model in models]
    assert whole[0] == whole[1] is not None
    damage(repository / contract.REFINER / file)
    assert installed_fingerprint(repository, contract.REFINER) is None
    assert installed_fingerprint(repository, contract.PREDICTOR) == whole[0]


def older(path: Path) -> None:
    """As a version that knew no interval of guidance wrote it."""
    config = text_format.Parse(path.read_text(), ModelConfig())
    del config.input[5]
    config.parameters["max_images"].string_value = "7"
    path.write_text(text_format.MessageToString(config))


def test_what_is_damaged_around_the_networks_is_mended(
    golden_repository: Path, tmp_path: Path
) -> None:
    """Nothing is exported again for it."""
    repository = tmp_path / "models"
    shutil.copytree(golden_repository, repository)
    again = (*GOLDEN_EXPORT, "--ensemble", "H1P1", "--repository", repository)
    assert run_export(*again).returncode == 0

    def content() -> dict[Path, bytes]:
        files = (path for path in repository.rglob("*") if path.is_file())
        return {path.relative_to(repository): path.read_bytes() for path in files}

    whole, ensemble = content(), next(repository.glob("flowturbo_*_planner")).name
    damages: list[tuple[str, Callable[[Path], object]]] = [
        (f"{contract.PREDICTOR}/config.pbtxt", lambda path: path.write_text("")),
        (f"{contract.PREDICTOR}/config.pbtxt", Path.unlink),
        (f"{ensemble}/1/model.py", Path.unlink),
        (f"{ensemble}/1/model.py", lambda path: path.write_text("")),
        (f"{ensemble}/config.pbtxt", cut),
        (f"{contract.ORCHESTRATOR}/1/model.py", Path.unlink),
        (f"{contract.ORCHESTRATOR}/1/model.py", lambda path: path.write_text("")),
        (f"{contract.ORCHESTRATOR}/config.pbtxt", older),
        (f"{contract.ORCHESTRATOR}/config.pbtxt", Path.unlink),
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
            check_tensors(config.input, contract.REQUEST_INPUTS, {"C": -1, "h": -1, "w": -1})
        else:
            found = content()
            different = [path for path in whole if found.get(path) != whole[path]]
            # The orchestrator's configuration has no comments any more.
            assert set(different) <= {Path(contract.ORCHESTRATOR, "config.pbtxt")}, file
            assert "up to date" in run_export(*again).stdout
    (repository / contract.ORCHESTRATOR / "config.pbtxt").write_text("parameters [ {")
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
    source = ("--predictor", GOLDEN / "predictor.pt", "--num-heads", "2")
    done = run_export(*source, "--class-names", names, "--repository", tmp_path / "models")
    assert done.returncode == 2
    assert re.search(said, done.stderr)


def test_names_and_presets_may_come_through_pipes(golden_repository: Path, tmp_path: Path) -> None:
    """Each is read once."""

    def pipe(name: str, text: str) -> Path:
        os.mkfifo(tmp_path / name)
        Thread(target=(tmp_path / name).write_text, args=(text,), daemon=True).start()
        return tmp_path / name

    repository = tmp_path / "models"
    source = ("--predictor", GOLDEN / "predictor.pt", "--num-heads", "2")
    names = [f"class {k}" for k in range(10)]
    presets = {"presets": {"quick": {"schedule": "H2"}}}
    done = run_export(
        *(*source, "--runtime", "onnxruntime", "--precision", "fp32", "--repository", repository),
        *("--class-names", pipe("names", "\n".join(names))),
        *("--presets", pipe("presets", json.dumps(presets))),
    )
    assert done.returncode == 0, done.stderr
    pipeline = Pipeline.load(repository)
    assert list(pipeline.class_names) == names
    assert str(pipeline.presets["quick"]) == "H2"
    fingerprint = installed_fingerprint(repository, contract.PREDICTOR)
    assert fingerprint["class_names"] == names


def test_models_of_two_exports_are_not_mixed(golden_repository: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    shutil.copytree(golden_repository, repository)
    build_file = repository / contract.REFINER / "build.json"
    build = json.loads(build_file.read_text())
    build["fingerprint"]["options"]["guidance_channels"] = 4
    build_file.write_text(json.dumps(build))
    with pytest.raises(RepositoryError, match="different exports"):
        LocalPipeline(repository)
    build_file.write_text("{")
    with pytest.raises(RepositoryError, match="export again"):
        LocalPipeline(repository)


def test_predictor_alone(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    done = run_export(
        "--predictor", GOLDEN / "predictor.pt", "--num-heads", "2", "--repository", repository
    )
    assert done.returncode == 0, done.stderr
    pipeline = LocalPipeline(repository)
    result = pipeline.generate([1, 2], [3, 4], "H2", 1.0)
    assert result.latent.shape == (2, 4, 8, 8)
    assert np.isfinite(result.latent).all()
    assert result.image is None
    with pytest.raises(ValueError, match="no velocity_refiner"):
        pipeline.generate(1, 1, "H1R1")


def test_a_failed_installation_brings_the_old_models_back(
    golden_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, staged = tmp_path / "models", tmp_path / "staged"
    shutil.copytree(golden_repository, repository)
    shutil.copytree(golden_repository, staged)
    (staged / contract.PREDICTOR / "new").touch()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self == staged / contract.REFINER:
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk full"):
        install(staged, repository, contract.COMPOSED)
    assert not (repository / contract.PREDICTOR / "new").exists()
    for model in (contract.PREDICTOR, contract.REFINER):
        assert installed_fingerprint(repository, model)


def test_the_default_guidance_is_the_repositorys(golden_repository: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    shutil.copytree(golden_repository, repository)
    assert Settings.load(repository).default_guidance_scale == 1.5
    for given, expected in ((("--guidance-scale", "2"), 2.0), ((), 2.0)):
        done = run_export(*GOLDEN_EXPORT, *given, "--repository", repository)
        assert done.returncode == 0, done.stderr
        assert Settings.load(repository).default_guidance_scale == expected
    for given, expected in ((("--guidance-scale", "0"), 0.0), ((), 1.5)):
        options = _options(
            [*map(str, GOLDEN_EXPORT), *given, "--repository", str(tmp_path / "new")]
        )
        assert export.pipeline._settings(options).default_guidance_scale == expected
    done = run_export(*GOLDEN_EXPORT, "--guidance-scale", "nan", "--repository", repository)
    assert done.returncode == 2 and "guidance_scale must be" in done.stderr
