"""A checkpoint is what its file says: read exactly, or refused by name."""

import argparse
import json
import logging
import os
import pathlib
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from support import GLYPHS, GOLDEN
from torch.optim.swa_utils import AveragedModel

from flowturbo.nets.checkpoint import (
    build_network,
    check_convention,
    infer_config,
    load_predictor,
    load_refiner,
)
from flowturbo.nets.sit import SiT, SiTConfig
from flowturbo.nets.weights import CheckpointError, load_checkpoint

pytestmark = pytest.mark.unit

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


@pytest.mark.parametrize(
    ("width", "patch_size"), [(384, 2), (384, 4), (384, 8), (768, 2), (1024, 2), (1152, 2)]
)
def test_public_configurations(tmp_path: Path, width: int, patch_size: int) -> None:
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
    with pytest.raises(CheckpointError, match="no 'ema'"):
        load_checkpoint(GLYPHS / "predictor.safetensors", "ema")


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


class Settings:
    """A class of a training script's own."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class Named(dict):
    """One of a dictionary's kin."""


class Listed(list):
    """One of a list's kin."""


def saved(path: Path, network: SiT, **beside: Any) -> Path:
    """A file as training scripts write it, with `beside` beside the weights."""
    weights = network.state_dict()
    torch.save({"model": weights, "ema": weights, **beside}, path)
    return path


@pytest.mark.parametrize(
    "beside",
    [
        {"args": argparse.Namespace(results_dir=pathlib.Path("results"), lr=1e-4)},
        {"args": argparse.Namespace(home=pathlib.PureWindowsPath("C:/runs"))},
        {"best_loss": np.float64(0.12), "epoch": np.int64(3), "fast": np.bool_(True)},
        {"random": np.random.default_rng(0).integers(9, size=3)},
        {"args": argparse.Namespace(counts=defaultdict(list, a=[1]))},
        {"config": OmegaConf.create({"model": {"depth": 2}, "steps": [1, 2], "path": None})},
        {"settings": Settings(lr=1e-4, inner=Settings())},
        {"settings": Named(a=1), "more": Listed([1])},
        {"args": argparse.Namespace(wide=np.longdouble(1), at=np.datetime64("2024-01-01"))},
    ],
    ids=[
        "path",
        "windows path",
        "numpy scalars",
        "numpy array",
        "defaultdict",
        "omegaconf",
        "own class",
        "kin of dict and list",
        "rare numpy scalars",
    ],
)
def test_training_arguments_do_not_stop_a_load(tmp_path: Path, beside: dict[str, Any]) -> None:
    network = SiT(SMALL)
    loaded = load_predictor(saved(tmp_path / "c.pt", network, **beside))
    assert torch.equal(loaded.pos_embed, network.pos_embed)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (Settings(a=1), r"holds a test_checkpoint\.Settings, not named tensors"),
        ({"pos_embed": Settings()}, r"'pos_embed' is a test_checkpoint\.Settings, not a tensor"),
        ({"ours": {"pos_embed": torch.zeros(1)}, "step": 3}, "has ours, step; named tensors"),
        ({}, "is not a state dict: it is empty"),
    ],
)
def test_weights_of_another_class_are_refused_by_name(
    tmp_path: Path, content: Any, said: str, zipped: bool
) -> None:
    torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_stands_in_place_of_weights(
    tmp_path: Path, content: bytes, said: str, suffix: str
) -> None:
    path = tmp_path / f"c{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(path)
    path.mkdir()
    with pytest.raises(CheckpointError, match="is a folder: give the file"):
        load_checkpoint(path)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    class Call:
        def __init__(self, function: Any, *arguments: Any) -> None:
            self.call = function, arguments

        def __reduce__(self) -> tuple[Any, ...]:
            return self.call

    def with_call(*call: Any) -> Path:
        torch.save({"model": SiT(SMALL).state_dict(), "args": Call(*call)}, tmp_path / "c.pt")
        return tmp_path / "c.pt"

    load_checkpoint(with_call(np.save, str(tmp_path / "ran.npy"), 1))  # stood in for, not called
    with pytest.raises(CheckpointError, match=r"class posix\.mkdir"):
        load_checkpoint(with_call(os.mkdir, str(tmp_path / "ran")))
    assert not list(tmp_path.glob("ran*"))


def test_another_pickle_protocol_is_told(tmp_path: Path) -> None:
    torch.save(SiT(SMALL).state_dict(), tmp_path / "c.pt", pickle_protocol=pickle.HIGHEST_PROTOCOL)
    with pytest.raises(CheckpointError, match="pickle protocol above 2"):
        load_checkpoint(tmp_path / "c.pt")


def test_wrappers_are_stripped_wherever_they_stand(tmp_path: Path) -> None:
    network = SiT(SMALL)

    def wrapped(name: str) -> str:
        inner = name.replace("attn.", "attn._checkpoint_wrapped_module.")
        return f"module._orig_mod.{inner.replace('mlp.', '_orig_mod.mlp._fsdp_wrapped_module.')}"

    weights = {wrapped(name): value for name, value in network.state_dict().items()}
    torch.save(OrderedDict(weights), tmp_path / "c.pt")
    loaded = load_predictor(tmp_path / "c.pt")
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in loaded.state_dict().items())
    averaged = AveragedModel(network)
    torch.save({"ema": averaged.state_dict()}, tmp_path / "average.pt")
    assert "n_averaged" in averaged.state_dict()
    assert torch.equal(load_predictor(tmp_path / "average.pt").pos_embed, network.pos_embed)
    torch.save({**network.state_dict(), "module.pos_embed": network.pos_embed}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="'pos_embed' twice.*'module.pos_embed'"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.full((384,), torch.nan), "blocks.0.attn.proj.bias must be finite"),
        (torch.ones(384, dtype=torch.int8), "blocks.0.attn.proj.bias must be floating-point"),
        (torch.ones(384).to_sparse(), "proj.bias must be a plain tensor, got torch.sparse_coo"),
        (torch.ones(384, device="meta"), "proj.bias must be a plain tensor, got a meta tensor"),
    ],
)
def test_weights_that_cannot_be_weights(tmp_path: Path, value: torch.Tensor, said: str) -> None:
    path = write(tmp_path / "c.pt", blocks__0__attn__proj__bias=value)
    with pytest.raises(CheckpointError, match=said):
        load_predictor(path)


def without_null_class(classes: int) -> SiT:
    return SiT(replace(SMALL, num_classes=classes, null_class=False))


@pytest.mark.parametrize("count", [int, np.int64, str])
@pytest.mark.parametrize("classes", [1, 5])
def test_classes_come_from_the_training_arguments(tmp_path: Path, classes: int, count: Any) -> None:
    arguments = argparse.Namespace(num_classes=count(classes))
    config = load_predictor(saved(tmp_path / "c.pt", without_null_class(classes), args=arguments))
    assert (config.config.num_classes, config.config.null_class) == (classes, False)
    network = SiT(replace(SMALL, num_classes=classes))
    config = load_predictor(saved(tmp_path / "c.pt", network, args=arguments))
    assert (config.config.num_classes, config.config.null_class) == (classes, True)


def test_classes_in_nested_arguments_and_metadata(tmp_path: Path) -> None:
    nested = OmegaConf.create({"data": {"num_classes": 5}, "model": {"num_classes": 5}})
    path = saved(tmp_path / "c.pt", without_null_class(5), config=nested)
    assert not load_predictor(path).config.null_class
    save_file(without_null_class(5).state_dict(), tmp_path / "c.safetensors", {"num_classes": "5"})
    assert not load_predictor(tmp_path / "c.safetensors").config.null_class
    # Of several numbers the one that the table can have, else the user says which.
    several = {"data": {"num_classes": 5}, "teacher": {"num_classes": 1000}}
    path = saved(tmp_path / "c.pt", without_null_class(5), config=several)
    assert not load_predictor(path).config.null_class
    unclear = {"data": {"num_classes": 5}, "training": {"num_classes": 4}}
    path = saved(tmp_path / "c.pt", without_null_class(5), config=unclear)
    with pytest.raises(CheckpointError, match="states both 5 and 4 classes: choose one"):
        load_predictor(path)
    assert load_predictor(path, num_classes=4).config.null_class
    # The network's own is the one that counts, and other networks' are not its own.
    for others in (
        {"num_classes": 5, "encoder": {"num_classes": 0}},
        {"model": {"num_classes": 5}, "data": {"num_classes": 4}},
        {"data": {"num_classes": 5, "shards": {"num_classes": "all"}}},
    ):
        path = saved(tmp_path / "c.pt", without_null_class(5), config=others)
        assert not load_predictor(path).config.null_class
    for others in ({"teacher": {"num_classes": 5}}, {"teacher": {"cfg_prob": 0}}):
        path = saved(tmp_path / "c.pt", without_null_class(5), config=others)
        assert load_predictor(path).config.null_class
    # A value of omegaconf that refers to another one.
    referring = OmegaConf.create({"classes": 5, "num_classes": "${classes}", "seed": "???"})
    path = saved(tmp_path / "c.pt", without_null_class(5), config=referring)
    assert not load_predictor(path).config.null_class


@pytest.mark.parametrize("name", ["ema_model", "model_ema", "state_dict_ema", "ema", "model_ema1"])
@pytest.mark.parametrize("last", ["model", "state_dict", "net"])
def test_averaged_weights_by_other_names(tmp_path: Path, name: str, last: str) -> None:
    network, average = SiT(SMALL), SiT(SMALL)
    content = {last: network.state_dict(), name: average.state_dict(), "ema_decay": 0.9}
    torch.save(content, tmp_path / "c.pt")
    for weights, expected in ((None, average), ("ema", average), ("model", network)):
        found = load_predictor(tmp_path / "c.pt", weights)
        assert torch.equal(found.pos_embed, expected.pos_embed)
        assert torch.equal(found.final_layer.linear.weight, expected.final_layer.linear.weight)


class Average:
    """As a training library pickles it."""

    def __init__(self, network: SiT) -> None:
        self.shadow = network.state_dict()


@pytest.mark.parametrize("form", [Average, lambda network: list(network.state_dict().values())])
def test_averages_that_cannot_be_read_are_not_passed_over(
    tmp_path: Path, form: Callable[[SiT], Any]
) -> None:
    network = SiT(SMALL)
    path = saved(tmp_path / "c.pt", network, ema=form(network))
    with pytest.raises(CheckpointError, match=r"'ema' is a .*, not named .*--weights model"):
        load_predictor(path)
    load_predictor(path, "model")
    weights = network.state_dict()
    torch.save({"model": weights, "ema1": weights, "ema2": weights}, path)
    with pytest.raises(CheckpointError, match="several averages, ema1, ema2"):
        load_predictor(path)


def test_names_with_one_prefix(tmp_path: Path) -> None:
    network = SiT(SMALL)
    content = {f"model.net.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": content, "epoch": 3}, tmp_path / "c.ckpt")
    assert torch.equal(load_predictor(tmp_path / "c.ckpt").pos_embed, network.pos_embed)
    content["vae.scale"] = torch.ones(1)
    torch.save({"state_dict": content, "epoch": 3}, tmp_path / "c.ckpt")
    with pytest.raises(CheckpointError, match=r"under 'model.net.' and other .* 'vae.scale'"):
        load_predictor(tmp_path / "c.ckpt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.sft", "weights.SAFETENSORS"])
def test_files_are_read_by_what_is_in_them(tmp_path: Path, name: str) -> None:
    network = SiT(SMALL)
    save_file(network.state_dict(), tmp_path / name)
    assert torch.equal(load_predictor(tmp_path / name).pos_embed, network.pos_embed)
    torch.save(network.state_dict(), tmp_path / "c.safetensors")
    assert torch.equal(load_predictor(tmp_path / "c.safetensors").pos_embed, network.pos_embed)


class ConfigDict:
    """As ml_collections pickles its own."""

    def __init__(self, **fields: Any) -> None:
        self._fields, self._locked = fields, True


@pytest.mark.parametrize(
    "stated",
    [
        {"config": ConfigDict(num_classes=5)},
        {"model_args": {"num_classes": 5}},
        {"args": json.dumps({"model": {"params": {"num_classes": 5}}})},
        {"args": {"num-classes": 5}},
        {"args": argparse.Namespace(nb_classes=5)},
        {"config": {"model": {"params": {"label_drop_prob": 0}}}},
    ],
)
def test_classes_in_other_words(tmp_path: Path, stated: dict[str, Any]) -> None:
    path = saved(tmp_path / "c.pt", without_null_class(5), **stated)
    assert not load_predictor(path).config.null_class


def test_heads_stated_deeper(tmp_path: Path) -> None:
    config = {"model": {"params": {"num_attention_heads": 4}}, "encoder": {"num_heads": 16}}
    assert load_predictor(saved(tmp_path / "c.pt", SiT(SMALL), config=config)).config.num_heads == 4


@dataclass
class Slotted:
    """Arguments whose class keeps them in slots."""

    __slots__ = ("num_classes",)
    num_classes: int


def test_arguments_in_slots(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pt", without_null_class(5), args=Slotted(5))
    assert not load_predictor(path).config.null_class


def test_an_option_overrides_what_cannot_be_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pt", SiT(SMALL), args={"num_heads": "auto"})
    with pytest.raises(CheckpointError, match="num_heads must be an integer above 0, got 'auto'"):
        load_predictor(path)
    assert load_predictor(path, num_heads=2).config.num_heads == 2


@pytest.mark.parametrize("name", ["class_dropout_prob", "cfg_prob"])
@pytest.mark.parametrize("share", [0, 0.1])
def test_no_null_class_where_training_left_no_label_out(
    tmp_path: Path, name: str, share: float
) -> None:
    arguments = argparse.Namespace(**{name: share})
    config = load_predictor(saved(tmp_path / "c.pt", SiT(SMALL), args=arguments)).config
    assert (config.num_classes, config.null_class) == ((5, True) if share else (6, False))


def test_classes_by_option(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path / "c.pt", without_null_class(5))
    assert load_predictor(path).config.num_classes == 4
    found = load_predictor(path, num_classes=5).config
    assert (found.num_classes, found.null_class) == (5, False)
    for options, said in [
        ({"num_classes": 7}, "label table of 5 rows, --num-classes says 7 classes: 7 rows .* or 8"),
        ({"num_classes": 3}, "label table of 5 rows"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            load_predictor(path, **options)
    stated = saved(tmp_path / "s.pt", SiT(SMALL), args=argparse.Namespace(num_classes=5))
    with pytest.raises(CheckpointError, match="states 5 classes, --num-classes says 6"):
        load_predictor(stated, num_classes=6)
    wrong = saved(tmp_path / "w.pt", SiT(SMALL), args=argparse.Namespace(num_classes=1000))
    with pytest.raises(CheckpointError, match="6 rows, the file states 1000 classes"):
        load_predictor(wrong)
    caplog.clear()
    assert load_predictor(wrong, num_classes=5).config.null_class
    assert "states 1000 classes, which does not fit its label table of 6 rows" in caplog.messages[0]
    bad = saved(tmp_path / "b.pt", SiT(SMALL), args=argparse.Namespace(num_classes=0.5))
    with pytest.raises(CheckpointError, match="num_classes must be an integer above 0, got 0.5"):
        load_predictor(bad)
    one = saved(tmp_path / "one.pt", without_null_class(1))
    with pytest.raises(CheckpointError, match="give --num-classes 1"):
        load_predictor(one)


def test_a_refiner_has_the_predictors_classes(tmp_path: Path) -> None:
    def refiner(**changes: Any) -> Path:
        return saved(tmp_path / "r.pt", SiT(replace(SMALL, in_channels=8, **changes)))

    guided, unguided = SMALL, replace(SMALL, null_class=False)
    assert load_refiner(refiner(), guided).config.null_class
    assert not load_refiner(refiner(null_class=False), unguided).config.null_class
    assert load_refiner(refiner(), unguided).config.num_classes == 5
    with pytest.raises(CheckpointError, match="no row for the null class, but the predictor has"):
        load_refiner(refiner(null_class=False), guided)
    with pytest.raises(CheckpointError, match="num_classes 8, the predictor has 5"):
        load_refiner(refiner(num_classes=8), guided)


def twin(network: SiT, *, at: float, sign: float) -> SiT:
    """A network that answers, at time t, `sign` times what `network` answers at time `at` - t.

    An exact twin: cos and sin of f (at - t) are linear in those of f t.
    """
    state = dict(network.state_dict())
    angle = network.t_embedder.frequencies.double() * at
    cosines, sines = state["t_embedder.mlp.0.weight"].double().chunk(2, 1)
    parts = cosines * angle.cos() + sines * angle.sin(), cosines * angle.sin() - sines * angle.cos()
    state["t_embedder.mlp.0.weight"] = torch.cat(parts, 1).float()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = sign * state[name]
    copy = SiT(network.config)
    copy.load_state_dict(state)
    return copy


@pytest.fixture(scope="module")
def glyphs() -> SiT:
    return load_predictor(GLYPHS / "predictor.safetensors")


def test_time_that_runs_backwards_is_refused_or_turned(tmp_path: Path, glyphs: SiT) -> None:
    """REPA's convention, its projectors along."""
    weights = twin(glyphs, at=1.0, sign=-1.0).state_dict()
    weights |= {"projectors.0.0.weight": torch.zeros(8, 8)}
    torch.save({"ema": weights, "steps": 4_000_000}, tmp_path / "repa.pt")
    with pytest.raises(CheckpointError, match=r"is -0\.8.*give --reverse-time"):
        load_predictor(tmp_path / "repa.pt", num_heads=6)
    turned = load_predictor(tmp_path / "repa.pt", num_heads=6, reverse_time=True)
    x, label = torch.randn(3, 4, 16, 16), torch.tensor([0, 7, 36])
    t = torch.tensor([0.0, 0.3, 1.0])
    assert torch.allclose(turned(x, t, label), glyphs(x, t, label), atol=1e-4)
    with pytest.raises(CheckpointError, match="omit --reverse-time"):
        load_predictor(GLYPHS / "predictor.safetensors", reverse_time=True)


@pytest.mark.parametrize("reverse_time", [False, True])
def test_a_network_that_answers_the_noise_is_refused(
    tmp_path: Path, glyphs: SiT, reverse_time: bool
) -> None:
    """Near the noise where all is noise, and not where all is data as REPA's."""
    network = twin(glyphs, at=0.0, sign=-1.0)
    network.config = replace(network.config, reverse_time=reverse_time)
    with pytest.raises(CheckpointError, match=r"predicts the noise itself at t = 0 \(cosine 0\.9"):
        check_convention(network, tmp_path / "c.pt")


def test_a_diffusion_transformer_is_refused(tmp_path: Path, glyphs: SiT) -> None:
    network = twin(glyphs, at=999.0, sign=-1.0)  # the noise at t = 999
    with pytest.raises(CheckpointError, match="as a DiT does"):
        check_convention(network, tmp_path / "c.pt")
    network.config = replace(network.config, reverse_time=True)
    with pytest.raises(CheckpointError, match="as a DiT does"):
        check_convention(network, tmp_path / "c.pt")
    path = saved(tmp_path / "c.pt", SiT(SMALL), args=argparse.Namespace(model="DiT-XL/2"))
    with pytest.raises(CheckpointError, match="was trained as DiT-XL/2"):
        load_predictor(path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"path_type": "GVP"}, "path_type 'GVP'"),
        ({"path_type": "Linear", "prediction": "score"}, "prediction 'score'"),
        ({"path_type": "Linear", "prediction": "velocity", "model": "SiT-XL/2"}, None),
        ({"path_type": "linear", "prediction": "v"}, None),
        ({"transport": {"path_type": "VP"}}, "path_type 'VP'"),
        ({"transport": {"params": {"path-type": "VP"}}}, "path_type 'VP'"),
        ({"train": {"diffusion": {"prediction": "noise"}}}, "prediction 'noise'"),
        ({"teacher": {"prediction": "noise", "num_heads": 7}, "model": {"num_heads": 4}}, None),
    ],
)
def test_other_paths_and_predictions_are_refused(
    tmp_path: Path, arguments: dict[str, Any], said: str | None
) -> None:
    path = saved(tmp_path / "c.pt", SiT(SMALL), args=argparse.Namespace(**arguments))
    if said is None:
        load_predictor(path)
        return
    with pytest.raises(CheckpointError, match=f"{said}, which is not supported"):
        load_predictor(path)


def test_verdicts_on_the_convention(
    tmp_path: Path, glyphs: SiT, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    check_convention(glyphs, tmp_path / "trained")
    untrained = SiT(SMALL)
    untrained.initialize()  # answers 0 throughout
    check_convention(untrained, tmp_path / "untrained")
    assert not caplog.messages
    torch.manual_seed(0)
    check_convention(SiT(SMALL), tmp_path / "random")
    (line,) = caplog.messages
    assert "random: the cosine between v(noise, t=0) and -noise is" in line
