"""Checkpoints of the public families load and export; what does not fit is named."""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import GOLDEN, GOLDEN_EXPORT, run_export

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
from flowturbo.nets.checkpoint import (
    CheckpointError,
    build_network,
    infer_config,
    load_checkpoint,
    load_predictor,
    load_refiner,
)
from flowturbo.nets.sit import SiT, SiTConfig
from flowturbo.onnx_session import open_model

SMALL = SiTConfig(
    latent_size=8,
    patch_size=4,
    in_channels=4,
    latent_channels=4,
    out_channels=8,
    width=384,
    depth=1,
    num_heads=6,
    num_classes=5,
)


def write(path: Path, config: SiTConfig = SMALL, **changes: torch.Tensor | None) -> Path:
    tensors = SiT(config).state_dict() | {k.replace("__", "."): v for k, v in changes.items()}
    torch.save({key: value for key, value in tensors.items() if value is not None}, path)
    return path


@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("width", [384, 768, 1024, 1152])
def test_public_configurations(tmp_path: Path, patch_size: int, width: int) -> None:
    heads = {384: 6, 768: 12, 1024: 16, 1152: 16}[width]
    config = replace(SMALL, patch_size=patch_size, width=width, num_heads=heads, latent_size=16)
    read = infer_config(load_checkpoint(write(tmp_path / "p.pt", config)), reads_velocity=False)
    assert read == config
    refiner = replace(config, in_channels=8)
    path = write(tmp_path / "r.pt", refiner)
    assert infer_config(load_checkpoint(path), reads_velocity=True) == refiner


def test_safetensors_and_half_precision(tmp_path: Path) -> None:
    network = SiT(SMALL)
    half = {key: value.half() for key, value in network.state_dict().items()}
    save_file(half, tmp_path / "p.safetensors", {"num_heads": "4"})
    loaded = build_network(load_checkpoint(tmp_path / "p.safetensors"), reads_velocity=False)
    assert loaded.config.num_heads == 4
    assert loaded.pos_embed.dtype is torch.float32


def test_files_of_the_public_training_script(tmp_path: Path) -> None:
    """Weights twice, the optimizer's state, the arguments; names as wrappers left them."""
    weights = SiT(SMALL).state_dict()
    wrapped = {f"_orig_mod.module._orig_mod.{key}": value for key, value in weights.items()}
    arguments = argparse.Namespace(model="SiT-XL/2", lr=5e-5)
    content = {"model": wrapped, "ema": weights, "opt": {"state": {}}, "args": arguments}
    torch.save(content, tmp_path / "c.pt")
    assert load_checkpoint(tmp_path / "c.pt").tensors.keys() == weights.keys()
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_checkpoint(tmp_path / "old.pt").tensors.keys() == weights.keys()


def test_model_or_ema_is_a_choice() -> None:
    model, ema = (
        load_checkpoint(GOLDEN / "refiner.pt", weights).tensors for weights in ("model", "ema")
    )
    assert any(not torch.equal(model[key], ema[key]) for key in model)
    default = load_checkpoint(GOLDEN / "refiner.pt").tensors
    assert all(torch.equal(model[key], default[key]) for key in model)
    with pytest.raises(CheckpointError, match="no 'ema'"):
        load_checkpoint(GOLDEN / "predictor.pt", "ema")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pos_embed": None}, "no tensor 'pos_embed'"),
        ({"blocks__0__attn__proj__bias": None}, "no tensor 'blocks.0.attn.proj.bias'"),
        (
            {"blocks__0__attn__qkv__weight": torch.zeros(5, 384)},
            r"blocks.0.attn.qkv.weight must have shape \(1152, 384\), got \(5, 384\)",
        ),
        ({"extra": torch.zeros(1)}, "unknown tensor 'extra'"),
        ({"pos_embed": torch.zeros(1, 3, 384)}, "3 tokens"),
        ({"x_embedder__proj__weight": torch.zeros(384, 16)}, "must have 4 dimensions"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], said: str
) -> None:
    checkpoint = load_checkpoint(write(tmp_path / "p.pt", **changes))
    with pytest.raises(CheckpointError, match=said):
        build_network(checkpoint, reads_velocity=False)


def test_what_is_read_of_each_role(tmp_path: Path) -> None:
    """SiT's code reads a predictor's averaged weights, FlowTurbo's a refiner's last ones."""

    def both(name: str, config: SiTConfig) -> Path:
        state = SiT(config).state_dict()
        kinds = {"model": 1.0, "ema": 2.0}
        torch.save(
            {k: {**state, "pos_embed": 0 * state["pos_embed"] + v} for k, v in kinds.items()},
            tmp_path / name,
        )
        return tmp_path / name

    def kind(network: SiT) -> float:
        return float(network.pos_embed.mean())

    path = both("p.pt", SMALL)
    predictor = load_predictor(path, num_heads=12)
    assert (kind(predictor), kind(load_predictor(path, "model"))) == (2, 1)
    path = both("r.pt", replace(SMALL, in_channels=8))
    refiner = load_refiner(path, predictor.config)
    assert (kind(refiner), kind(load_refiner(path, predictor.config, "ema"))) == (1, 2)
    # Heads: what is asked, what the file says, the predictor's at its width, those of the width.
    save_file(refiner.state_dict(), tmp_path / "r.safetensors", {"num_heads": "4"})
    noted = tmp_path / "r.safetensors"
    assert load_refiner(noted, predictor.config, num_heads=2).config.num_heads == 2
    assert load_refiner(noted, predictor.config).config.num_heads == 4
    assert refiner.config.num_heads == 12
    wider = replace(predictor.config, width=768)
    assert load_refiner(path, wider).config.num_heads == 6


def test_heads_and_roles(tmp_path: Path) -> None:
    path = write(tmp_path / "r.pt", replace(SMALL, in_channels=8, width=32))
    with pytest.raises(CheckpointError, match="give it with --refiner-num-heads .*--heads"):
        load_refiner(path, SMALL)
    with pytest.raises(CheckpointError, match="give it with --num-heads"):
        infer_config(load_checkpoint(GOLDEN / "predictor.pt"), reads_velocity=False)
    with pytest.raises(CheckpointError, match="swapped"):
        infer_config(load_checkpoint(GOLDEN / "predictor.pt"), reads_velocity=True, num_heads=2)


@pytest.mark.parametrize(
    "content", [b"not a checkpoint", b"", b"\x80\x04\x95.\x00", b"PK\x03\x04broken"]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="broken"):
        load_checkpoint(path)


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    network = SiT(replace(SMALL, width=64, num_heads=2))

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
