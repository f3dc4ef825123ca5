"""Refiners, step-distilled models and engines of model families."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from families import folders
from families.conftest import GOLDEN
from support import read_config, run_export

from flowturbo import LocalPipeline
from flowturbo.contract import Role
from flowturbo.errors import RequestError
from flowturbo.latents import noise
from flowturbo.pipeline import Defaults, read_pipeline

FP32 = ("--precision", "fp32", "--runtime", "onnxruntime")


def refiner_folder(path: Path, **options: int) -> Path:
    """A refiner of the golden SD3 model that changes nothing: it answers zeros."""
    predictor = SD3Transformer2DModel.from_pretrained(GOLDEN / "folder" / "transformer")
    config = {**predictor.config, "in_channels": 32, "out_channels": 16, "num_layers": 1, **options}
    refiner = SD3Transformer2DModel.from_config(config)
    for name in ("context_embedder", "time_text_embed.text_embedder"):
        refiner.get_submodule(name).load_state_dict(predictor.get_submodule(name).state_dict())
    torch.nn.init.zeros_(refiner.proj_out.weight)
    torch.nn.init.zeros_(refiner.proj_out.bias)
    refiner.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("refined")
    refiner = refiner_folder(path / "refiner")
    done = run_export(
        *("--diffusers", GOLDEN / "folder", "--refiner", refiner, "--name", "refined", *FP32),
        *("--repository", path / "models"),
    )
    assert done.returncode == 0, done.stderr
    return path / "models"


def test_a_refiner_that_changes_nothing_keeps_the_velocity(refined: Path) -> None:
    """R is then Z. The pipeline has one size, whose engine files have fixed sides."""
    pipeline = LocalPipeline(refined)
    asked = {"prompt": ["a red b", "k 9"], "initial_noise": noise(np.arange(2), (16, 8, 8))}
    with_refiner = pipeline.generate(schedule="H1P1R2", **asked)  # type: ignore[arg-type]
    kept = pipeline.generate(schedule="H1P1Z2", **asked)  # type: ignore[arg-type]
    largest = np.abs(kept.latent).max()
    assert np.abs(with_refiner.latent - kept.latent).max() < 1e-5 * largest
    config = read_config(refined / "refined_velocity_predictor" / "config.pbtxt")
    assert list(config.input[0].dims) == [16, 8, 8]


def test_a_pipeline_is_exported_once_and_verified_again(refined: Path) -> None:
    refiner = refined.parent / "refiner"
    source = ("--diffusers", GOLDEN / "folder", "--refiner", refiner, "--name", "refined")
    again = run_export(*source, *FP32, "--repository", refined)
    assert again.returncode == 0 and "refined is up to date" in again.stdout
    verified = run_export("verify", *source, "--repository", refined)
    assert verified.returncode == 0, verified.stderr
    assert "against diffusers' own pipeline" in verified.stdout and "FAILED" not in verified.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"in_channels": 16}, "a refiner has in_channels 32 and out_channels 16, got 16 and 16"),
        ({"caption_projection_dim": 32}, "context_embedder|cannot|describes"),
    ],
)
def test_refiners_that_do_not_fit(options: dict[str, int], said: str, tmp_path: Path) -> None:
    predictor = SD3Transformer2DModel.from_pretrained(GOLDEN / "folder" / "transformer")
    config = {**predictor.config, "in_channels": 32, "num_layers": 1, **options}
    if "in_channels" in options:
        SD3Transformer2DModel.from_config(config).save_pretrained(tmp_path / "refiner")
    else:  # its own text embedder
        config.pop("caption_projection_dim")
        other = SD3Transformer2DModel.from_config({**config, "caption_projection_dim": 64})
        other.save_pretrained(tmp_path / "refiner")
    done = run_export(
        *("--diffusers", GOLDEN / "folder", "--refiner", tmp_path / "refiner", *FP32),
        *("--repository", tmp_path / "models"),
    )
    assert done.returncode == 2
    assert any(part in done.stderr for part in said.split("|"))


def test_a_step_distilled_model_takes_euler_steps_alone(tmp_path: Path) -> None:
    """Which klein's folder states itself; on the grid of its own."""
    folder = folders.klein(tmp_path / "klein", distilled=True)
    done = run_export(
        *("--diffusers", folder, "--name", "fast", "--text-length", "32", *FP32),
        *("--size", "16x16", "--repository", tmp_path / "models"),
    )
    assert done.returncode == 0, done.stderr
    pipeline = LocalPipeline(tmp_path / "models")
    assert str(pipeline.default_schedule) == "E4"
    made = pipeline.generate(prompt="a red b", seed=1)
    assert made.image is not None and made.image.shape == (1, 16, 16, 3)
    for schedule, letter in (("H2", "H"), ("E2A2", "A"), ("E1Z1", "Z"), ("E1P1", "P")):
        with pytest.raises(RequestError, match=f"step-distilled.* got {letter} in schedule"):
            pipeline.generate(prompt="a", schedule=schedule)
    with pytest.raises(RequestError, match="no preset|cannot be read|presets here are none"):
        pipeline.generate(prompt="a", schedule="fast")
    with pytest.raises(RequestError, match="step-distilled model, which takes no guidance"):
        pipeline.generate(prompt="a", guidance_scale=2.0)
    with pytest.raises(
        RequestError, match="negative_prompt cannot be used: this is a step-distilled"
    ):
        pipeline.generate(prompt="a", negative_prompt="b")


@pytest.mark.parametrize("name", ["golden", "rectified", "klein", "z-image"])
def test_engines_of_every_family(name: str, cases: dict, tmp_path: Path) -> None:
    """TensorRT for RTX, bf16, for two kinds of GPU: one profile per size."""
    case = cases[name]
    export = (
        *("--diffusers", case.folder, "--name", name, *case.arguments, "--engine", "tensorrt"),
        *("--precision", "bf16", "--max-rows", "4", "--size", "16x16", "24x16"),
        *("--repository", tmp_path, "--timing-cache", tmp_path / "cache"),
    )
    for capability in ("8.9", "12.0"):
        done = run_export(*export, "--compute-capability", capability)
        assert done.returncode == 0, done.stderr
    pipeline = read_pipeline(tmp_path, name)
    for role, record in pipeline.models.items():
        assert set(record.engines) == {"8.9", "12.0"}
        config = read_config(tmp_path / pipeline.model(role) / "config.pbtxt")
        assert set(config.cc_model_filenames) == {"8.9", "12.0"}
        sized = role is not Role.TEXT_ENCODER
        assert len(record.engines["8.9"]["sides"]) == (2 if sized else 0)
        assert config.optimization.cuda.graphs == (not sized)
        (group,) = config.instance_group
        assert len(group.profile) == len(record.engines["8.9"]["profiles"])
    kinds = {spec.name: spec.dtype for spec in pipeline.condition.block_inputs}
    assert kinds["context"] is np.float16


def test_large_images_are_decoded_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit of 16 pixels: the decoder is exported for tiles, and the edges are their own."""
    monkeypatch.setattr("flowturbo.nets.vae._WHOLE_DECODE", 16)
    done = run_export(
        *("--diffusers", GOLDEN / "folder", "--name", "tiled", "--size", "24x16", *FP32),
        *("--repository", tmp_path / "models"),
    )
    assert done.returncode == 0, done.stderr
    pipeline = LocalPipeline(tmp_path / "models")
    assert pipeline.pipeline.image_size == (16, 24) and pipeline.pipeline.largest_decode == 8
    made = pipeline.generate(prompt="a red b", seed=1, schedule="E2")
    assert made.image is not None and made.image.shape == (1, 16, 24, 3)
    config = read_config(tmp_path / "models" / "tiled_vae_decoder" / "config.pbtxt")
    assert list(config.input[0].dims) == [16, 8, 8]
    first, _ = pipeline._models[Role.DECODER]({"latent": made.latent[:, :, :, :8]})
    np.testing.assert_array_equal(made.image[:, :, :8], first[:, :, :8])


def test_defaults_that_no_request_could_use_are_not_installed(tmp_path: Path) -> None:
    """They would keep the server from starting. Defaults of a model go with it."""
    folder = folders.klein(tmp_path / "klein", distilled=True)
    export = (
        *("--diffusers", folder, "--name", "one", "--text-length", "32", *FP32),
        *("--size", "16x16", "--repository", tmp_path / "models"),
    )
    done = run_export(*export, "--default-schedule", "H4")
    assert done.returncode == 2 and "step-distilled and takes E steps" in done.stderr
    assert run_export(*export).returncode == 0
    assert read_pipeline(tmp_path / "models", "one").defaults == Defaults("E4", None)
    other = run_export(
        *("--diffusers", GOLDEN / "folder", "--name", "one", *FP32),
        *("--repository", tmp_path / "models"),
    )
    assert other.returncode == 0, other.stderr
    assert read_pipeline(tmp_path / "models", "one").defaults == Defaults(None, 4.5)


def test_labels_and_prompts_do_not_mix_on_the_command_line(tmp_path: Path) -> None:
    for arguments, said in (
        ((), "give either --predictor"),
        (("--diffusers", "x", "--predictor", "y"), "give either --predictor"),
        (("--diffusers", "x", "--num-classes", "3"), "--num-classes does not go with --diffusers"),
        (("--predictor", "x", "--size", "8x8"), "--size does not go with --predictor"),
        (("--diffusers", "x", "--size", "8"), "must be WIDTHxHEIGHT"),
        (("--diffusers", "x", "--ensemble", "H2"), "--ensemble is for pipelines with classes"),
    ):
        done = run_export(*arguments, "--repository", tmp_path / "models")
        assert done.returncode == 2 and said in done.stderr, done.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    done = run_export("--diffusers", empty, "--repository", tmp_path / "models")
    assert done.returncode == 2 and "is not a diffusers folder" in done.stderr
    shutil.copytree(GOLDEN / "folder", tmp_path / "copy", copy_function=shutil.copyfile)
    (tmp_path / "copy" / "model_index.json").write_text(json.dumps({"_class_name": "Other"}))
    done = run_export("--diffusers", tmp_path / "copy", "--repository", tmp_path / "models")
    assert done.returncode == 2 and "is a Other; supported are" in done.stderr, done.stderr
