"""Checkpoints of the public families load and export; what does not fit is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support import GOLDEN, GOLDEN_EXPORT, run_export

from bench.networks import SMALL
from export.blocks import PredictorBlock
from export.install import install, installed_fingerprint
from export.onnx_graph import Exported, export_onnx
from export.parity import (
    TOLERANCES,
    VerificationError,
    block_outputs,
    check,
    torch_evaluation,
)
from flowturbo import LocalPipeline, contract
from flowturbo.errors import RepositoryError
from flowturbo.nets.sit import SiT
from flowturbo.onnx_session import open_model


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    network = SiT(SMALL)

    def exported() -> Exported:
        return Exported(contract.PREDICTOR, PredictorBlock(network, 3), (4, 8, 8), network.config)

    def verify() -> None:
        expected = block_outputs(exported(), torch_evaluation(exported()))
        check(contract.PREDICTOR, expected, found, TOLERANCES["fp32"])

    export_onnx(exported(), tmp_path / "model.onnx")
    found = block_outputs(exported(), open_model(tmp_path / "model.onnx"))
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


def test_a_damaged_repository_is_not_up_to_date(golden_repository: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    shutil.copytree(golden_repository, repository)
    models = (contract.PREDICTOR, contract.REFINER)
    whole = [installed_fingerprint(repository, model) for model in models]
    assert whole[0] == whole[1] is not None
    (repository / contract.REFINER / "1" / "model.onnx").unlink()
    assert installed_fingerprint(repository, contract.REFINER) is None


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
