"""A VAE folder is what its files say, in both directions, or is refused by name."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import GLYPHS
from torch import Tensor

from flowturbo.nets.vae import Decoder, Encoder, load_vae, sample_size
from flowturbo.nets.weights import CheckpointError
from flowturbo.textfile import TextFileError
from training.data import encode, vae_digest

pytestmark = pytest.mark.unit

WEIGHTS = "diffusion_pytorch_model.safetensors"
MEAN, STD = [-1.6, 1.2, 0.5, -0.7], [8.5, 5.9, 6.1, 5.2]
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """The glyphs VAE in a folder, with changes to its configuration and its tensors."""

    def made(
        config: Mapping[str, Any] | None = None,
        change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> Path:
        folder = tmp_path / "vae"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(GLYPHS / "vae", folder)
        stated = json.loads((folder / "config.json").read_text()) | dict(config or {})
        (folder / "config.json").write_text(json.dumps(stated))
        if change:
            save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
        return folder

    return made


def same(one: Path, other: Path = GLYPHS / "vae") -> bool:
    a, b = (load_vae(folder).state_dict() for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def without(*starts: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(starts)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("encoder.", "quant_conv"), "no tensor 'encoder.conv_in.weight'"),
        (without("decoder."), "no tensor 'decoder.conv_in.weight'"),
        (without("decoder.conv_out.weight"), "no tensor 'decoder.conv_out.weight'"),
        (lambda t: {**t, "loss.logvar": torch.zeros(1)}, "unknown tensor 'loss.logvar'"),
        (
            lambda t: {k.replace("up_blocks", "up"): v for k, v in t.items()},
            r"no tensor 'decoder.up_blocks.*names of an LDM checkpoint",
        ),
        (
            lambda t: {f"first_stage_model.{k}": v for k, v in t.items()},
            "no tensor 'encoder.conv_in.weight'.*LDM checkpoint",
        ),
        (
            lambda t: {**t, "decoder.conv_out.bias": torch.tensor([0.0, torch.inf, 0.0])},
            "decoder.conv_out.bias must be finite",
        ),
        (
            lambda t: {**t, "decoder.conv_out.bias": torch.zeros(4)},
            r"decoder.conv_out.bias must have shape \(3,\), got \(4,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(make: Make, change: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_vae(make(change=change))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name must be AutoencoderKL, got 'Autoenc"),
        ({"_class_name": None}, "_class_name must be AutoencoderKL, got None"),
        ({"in_channels": 4}, r"in_channels must be 3 \(RGB\), got 4"),
        ({"out_channels": 1}, r"out_channels must be 3 \(RGB\), got 1"),
        ({"temporal_scale": 4}, "temporal_scale is 4, but this AutoencoderKL does not know"),
        ({"scaling_factor": 10**400}, "scaling_factor must be a number above 0, got 1000"),
        ({"scaling_factor": 0}, "scaling_factor must be a number above 0, got 0"),
        ({"scaling_factor": "0.18"}, "scaling_factor must be a number above 0, got '0.18'"),
        ({"shift_factor": [1]}, r"shift_factor must be a number, got \[1\]"),
        ({"latents_mean": MEAN}, "has only latents_mean"),
        ({"latents_std": STD}, "has only latents_std"),
        ({"latents_mean": MEAN, "latents_std": STD[:3]}, "latents_std must be 4 numbers above 0"),
        ({"latents_mean": MEAN, "latents_std": [0, 1, 1, 1]}, "latents_std must be 4 numbers"),
        (
            {"latents_mean": MEAN, "latents_std": STD, "shift_factor": 0.1},
            "has both latents_mean and shift_factor 0.1",
        ),
        ({"sample_size": None}, "sample_size must be pixels, one or two sides, got None"),
        ({"act_fn": "no such"}, "describes no AutoencoderKL"),
    ],
)
def test_configurations_that_do_not_fit_are_named(
    make: Make, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_vae(make(config))


def test_fields_that_change_nothing_are_left_alone(make: Make) -> None:
    assert same(make({"_commit_hash": "abc", "later_addition": None}))


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [
        ({"scaling_factor": 0.5}, [0.0] * 4, [2.0] * 4),
        ({"scaling_factor": 1.5, "shift_factor": 0.06}, [0.06] * 4, [1 / 1.5] * 4),
        (
            {"scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD},
            MEAN,
            [2 * s for s in STD],
        ),
    ],
)
def test_the_latents_scale_in_both_directions(
    make: Make, config: dict[str, Any], mean: list[float], std: list[float]
) -> None:
    """As diffusers' pipelines compute: z = latent * std / scaling_factor + mean."""
    vae = load_vae(make(config))
    m, s = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        shown = (vae.decode(latent * s + m).sample * 0.5 + 0.5).clamp(0, 1) * 255
        difference = Decoder(vae)(latent).int() - shown.round().int().permute(0, 2, 3, 1)
        posterior = vae.encode(pixels).latent_dist
        got_mean, got_std = encode(vae, image)
        latent_of_image = Encoder(vae)(torch.from_numpy(image))
    assert difference.abs().max() <= 1
    assert torch.allclose(got_mean, (posterior.mean - m) / s, atol=1e-6)
    assert torch.allclose(latent_of_image, got_mean, atol=1e-6)
    assert torch.allclose(got_std, posterior.std / s, atol=1e-6)


def test_the_digest_tells_configurations_apart(make: Make) -> None:
    configs = ({}, {"shift_factor": 0.1}, {"latents_mean": MEAN, "latents_std": STD})
    digests = {vae_digest(load_vae(make(config))) for config in (*configs, {"norm_num_groups": 4})}
    assert len(digests) == 4


def test_a_variant_alone(make: Make) -> None:
    folder = make(change=lambda tensors: {k: v.half() for k, v in tensors.items()})
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    loaded = load_vae(folder).state_dict()
    for name, value in load_vae(GLYPHS / "vae").state_dict().items():
        assert torch.equal(loaded[name], value.half().float())
    shutil.copy(
        folder / "diffusion_pytorch_model.fp16.safetensors",
        folder / "diffusion_pytorch_model.bf16.safetensors",
    )
    with pytest.raises(CheckpointError, match="several sets of weights, keep one: .*bf16.*fp16"):
        load_vae(folder)
    # The full weights come first, whatever lies beside them.
    shutil.copy(GLYPHS / "vae" / WEIGHTS, folder)
    assert same(folder)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards_with_an_index(make: Make, variant: str, form: str) -> None:
    folder = make()
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, infix = sorted(tensors), f".{variant}" if variant else ""
    files = [f"diffusion_pytorch_model{infix}-0000{k}-of-00002.{form}" for k in (1, 2)]
    where = {name: files[k % 2] for k, name in enumerate(names)}
    for file in files:
        held = {name: tensors[name] for name in names if where[name] == file}
        (save_file if form == "safetensors" else torch.save)(held, folder / file)
    index = folder / f"diffusion_pytorch_model.{form}.index{infix}.json"

    def write(weight_map: dict[str, str]) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    write(where)
    assert same(folder)
    moved = {**where, names[0]: files[0] if where[names[0]] == files[1] else files[1]}
    ghost = {**where, "decoder.ghost": files[0]}
    fewer = {name: file for name, file in where.items() if name != names[0]}
    for wrong, said in [
        (moved, f"{names[0]} is (not )?in it"),
        (ghost, "decoder.ghost is not in it"),
        (fewer, f"{names[0]} is in it"),
        ({**where, names[0]: f"../vae/{where[names[0]]}"}, r"names \.\./vae/.*, which is not in"),
    ]:
        write(wrong)
        with pytest.raises(CheckpointError, match=said):
            load_vae(folder)
    write(where)
    (folder / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"names {files[1]}, which is not in"):
        load_vae(folder)


def test_older_formats(make: Make) -> None:
    """Attention as diffusers named it until 0.12 (sd-vae-ft-ema has it so), and a .bin file."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for today, before in old.items():
            tensors = {
                name.replace(f"attentions.0.{today}.", f"attentions.0.{before}."): value
                for name, value in tensors.items()
            }
        return tensors

    folder = make(change=renamed)
    assert "decoder.mid_block.attentions.0.query.weight" in load_file(folder / WEIGHTS)
    assert same(folder)
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert same(folder)
    (folder / "diffusion_pytorch_model.bin").rename(folder / "diffusion_pytorch_model.ema.bin")
    assert same(folder)
    tensors = load_file(GLYPHS / "vae" / WEIGHTS)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(renamed(tensors) | copies, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="twice, once under its old name"):
        load_vae(folder)


@pytest.mark.parametrize(("stated", "size"), [(64, 64), ([64, 64], 64), ([64, 32], None)])
def test_the_size_of_its_images(make: Make, stated: Any, size: int | None) -> None:
    assert sample_size(load_vae(make({"sample_size": stated}))) == size


def test_folders_that_are_no_vae(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config.json"):
        load_vae(tmp_path)
    shutil.copytree(GLYPHS / "vae", tmp_path / "vae")
    with pytest.raises(CheckpointError, match=f"give {tmp_path / 'vae'}"):
        load_vae(tmp_path)
    config = tmp_path / "vae" / "config.json"
    stated = json.loads(config.read_text())
    stated["down_block_types"][0] = "DownBlock2D"
    config.write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=r"down_block_types must be of .*got 'DownBlock2D'"):
        load_vae(tmp_path / "vae")
    (tmp_path / "vae" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        load_vae(tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text("[]")
    with pytest.raises(TextFileError, match=r"must be an object, got \[\]"):
        load_vae(tmp_path / "vae")
