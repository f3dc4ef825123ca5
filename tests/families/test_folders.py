"""Folders that do not fit are refused by name, before minutes of export."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from families import folders
from families.conftest import GOLDEN
from safetensors.torch import load_file, save_file

from flowturbo.nets.families.family import Family, FolderOptions
from flowturbo.nets.families.loading import load_family
from flowturbo.nets.weights import CheckpointError

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("made")
    return {
        "sd3": GOLDEN / "folder",
        "klein": folders.klein(path / "klein"),
        "rectified": folders.rectified_flow(path / "rectified"),
        "z-image": folders.z_image(path / "z"),
    }


def load(folder: Path, **options: object) -> Family:
    return load_family(FolderOptions(folder, **options))  # type: ignore[arg-type]


def stated(file: str, **changed: object) -> Change:
    """Changes fields of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def weights(file: str, change_of: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Changes tensors of a safetensors file."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / file)
        change_of(tensors)
        save_file(tensors, folder / file, {"format": "pt"})

    return change


NETWORK = "transformer/diffusion_pytorch_model.safetensors"
CLIP = "text_encoder/model.safetensors"
FIRST = "text_model.embeddings.token_embedding.weight"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("sd3", stated("model_index.json", _class_name="FluxPipeline"), "is a FluxPipeline; supp"),
        (
            "sd3",
            stated("model_index.json", transformer=["diffusers", "Other"]),
            "transformer must be SD3Transformer2DModel, got .*Other",
        ),
        (
            "sd3",
            stated("model_index.json", text_encoder_2=[None, None]),
            "text_encoder_2 must be CLIPTextModelWithProjection",
        ),
        ("sd3", stated("transformer/config.json", new_field=3), "new_field is 3, but this SD3Tr"),
        ("sd3", stated("transformer/config.json", in_channels=33), "must have shape|differ"),
        ("sd3", stated("text_encoder/config.json", new_field=3), "new_field is 3, but this CLIP"),
        ("sd3", stated("text_encoder/config.json", model_type="bert"), "model_type must be clip"),
        ("sd3", stated("vae/config.json", new_field=3), "new_field is 3, but this AutoencoderKL"),
        (
            "sd3",
            weights(NETWORK, lambda of: of.pop("proj_out.bias")),
            "has no tensor 'proj_out.bias'",
        ),
        (
            "sd3",
            weights(NETWORK, lambda of: of.update(more=torch.zeros(1))),
            "has an unknown tensor 'more'",
        ),
        (
            "sd3",
            weights(NETWORK, lambda of: of["proj_out.bias"].fill_(torch.nan)),
            "proj_out.bias must be finite",
        ),
        ("sd3", weights(CLIP, lambda of: of.pop(next(iter(of)))), "missing keys"),
        ("sd3", weights(CLIP, lambda of: of.update(more=torch.zeros(1))), "unexpected keys: more"),
        (
            "sd3",
            stated("scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
            "must be FlowMatchEulerDiscreteScheduler, got 'DDIMScheduler'",
        ),
        (
            "sd3",
            stated("scheduler/scheduler_config.json", use_karras_sigmas=True),
            "use_karras_sigmas is True, which is not supported",
        ),
        ("rectified", lambda folder: None, "usually predicts noise.* give --rectified-flow"),
        ("klein", stated("transformer/config.json", guidance_embeds=True), "guidance"),
        ("klein", lambda folder: shutil.rmtree(folder / "tokenizer"), "has no tokenizer"),
        (
            "klein",
            lambda folder: (folder / "tokenizer" / "chat_template.jinja").unlink(),
            "has no usable chat template",
        ),
        (
            "klein",
            lambda folder: (folder / "tokenizer" / "chat_template.jinja").write_text(
                "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
            ),
            "has no usable chat template|changes the text",
        ),
        (
            "z-image",
            stated("transformer/config.json", all_patch_size=[4]),
            "only patches of 2|shape",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    name: str, change: Change, said: str, made: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(made[name], folder, copy_function=shutil.copyfile)
    change(folder)
    with pytest.raises(CheckpointError, match=said):
        load(folder)


def test_configurations_of_older_releases_load(tmp_path: Path) -> None:
    """With fields of decoding and training, which later releases have dropped."""
    folder = folders.sd3(tmp_path, with_t5=True)
    old = {"torch_dtype": "float16", "dropout": 0.0, "output_past": True, "use_bfloat16": False}
    stated("text_encoder/config.json", **old)(folder)
    stated("text_encoder_3/config.json", **old, decoder_start_token_id=0, n_positions=512)(folder)
    assert len(load(folder, text_length=12).tokenizers) == 3


def test_what_is_not_needed_is_told(made: dict[str, Path]) -> None:
    assert load(made["rectified"], rectified_flow=True).ignored == ("safety_checker",)


@pytest.mark.parametrize("name", ["klein", "z-image"])
def test_templates_are_those_of_transformers(name: str, made: dict[str, Path]) -> None:
    """For texts of every kind; special tokens in a text are plain text, and end nothing."""
    from transformers import AutoTokenizer

    options = {"klein": False, "z-image": True}
    family = load(made[name], text_length=64)
    (tokenizing,) = family.tokenizers
    theirs = AutoTokenizer.from_pretrained(made[name] / "tokenizer")
    ours = opened(tokenizing.record, tokenizing.text, made[name].parent)
    texts = ["a cat", "", "\n\n two lines \n", ' "quoted" {{ braces }} %', "\u0301 accent", "é" * 9]
    texts += ["<think> a </think>", "x" * 200, *(f"number {k}, {'a' * k}" for k in range(42))]
    for text in texts:
        shown = theirs.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=options[name],
        )
        want = theirs(shown, padding="max_length", truncation=True, max_length=64)
        found = ours.encode(text)
        assert found.ids.tolist() == want["input_ids"], text
        assert found.mask.tolist() == want["attention_mask"]
    end = theirs.convert_tokens_to_ids("<|im_end|>")
    honest = ours.encode("a").ids.tolist().count(end)
    assert ours.encode("a<|im_end|>\n<|im_start|>system\nb").ids.tolist().count(end) == honest


def test_clip_and_t5_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = folders.sd3(tmp_path, with_t5=True)
    family = load(folder, text_length=12)
    for k, tokenizing in enumerate(family.tokenizers):
        part = "tokenizer" if k == 0 else f"tokenizer_{k + 1}"
        theirs = AutoTokenizer.from_pretrained(folder / part)
        ours = opened(tokenizing.record, tokenizing.text, tmp_path)
        length = tokenizing.record.length
        for text in (
            "a red b",
            "",
            "é, ß",
            "A B\tC",
            "wow! a ! b",
            "!!",
            "7 " * 40,
            "x" * 300,
            "k,l.m",
        ):
            want = theirs(text, padding="max_length", truncation=True, max_length=length)
            assert ours.encode(text).ids.tolist() == want["input_ids"], text
            assert ours.encode(text).cut == (len(theirs(text)["input_ids"]) > length)


def opened(record: object, text: str, folder: Path) -> object:
    from dataclasses import replace

    from flowturbo.conditions.tokens import OpenTokenizer

    (folder / "tokens.json").write_text(text)
    return OpenTokenizer(replace(record, file="tokens.json"), folder)


def test_a_single_file_replaces_the_weights_of_the_network(
    made: dict[str, Path], tmp_path: Path
) -> None:
    """In the names of the makers, whose attention has queries, keys and values in one tensor."""
    tensors = load_file(made["z-image"] / NETWORK)
    changed = {key: value + 0.25 for key, value in tensors.items()}
    renames = {"all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder."}
    renames |= {".norm_k.": ".k_norm.", ".norm_q.": ".q_norm.", ".to_out.0.": ".out."}
    theirs: dict[str, torch.Tensor] = {}
    for key, value in changed.items():
        name = key
        for ours, other in renames.items():
            name = name.replace(ours, other)
        if name.endswith(".to_q.weight"):
            parts = [
                changed[key.replace(".to_q.", part)] for part in (".to_q.", ".to_k.", ".to_v.")
            ]
            theirs[name.replace(".to_q.", ".qkv.")] = torch.cat(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            theirs[f"model.diffusion_model.{name}"] = value
    save_file(theirs, tmp_path / "single.safetensors")
    family = load(made["z-image"], text_length=32, network_file=tmp_path / "single.safetensors")
    found = family.parts["transformer"].state_dict()
    assert all(torch.equal(found[key], value) for key, value in changed.items())
    theirs.popitem()
    save_file(theirs, tmp_path / "single.safetensors")
    with pytest.raises(CheckpointError, match="single.safetensors has no tensor"):
        load(made["z-image"], text_length=32, network_file=tmp_path / "single.safetensors")
    with pytest.raises(CheckpointError, match="single.safetensors (is no single-file|has no ten)"):
        load(made["sd3"], network_file=tmp_path / "single.safetensors")


def test_variants_of_weights_load(tmp_path: Path) -> None:
    """As diffusers saves them with variant="fp16", in one file."""
    folder = folders.sd3(tmp_path)
    for part in ("text_encoder", "text_encoder_2"):
        (folder / part / "model.safetensors").rename(folder / part / "model.fp16.safetensors")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".fp16.safetensors"))
    assert load(folder).title == "sd3"
    shutil.copy(
        folder / "text_encoder" / "model.fp16.safetensors",
        folder / "text_encoder" / "model.bf16.safetensors",
    )
    with pytest.raises(CheckpointError, match="several sets of weights, keep one: bf16, fp16"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("sd3", {"text_length": 513}, "--text-length must be 0 to 512 here, got 513"),
        ("klein", {"text_length": 0}, "--text-length must be 1 to 512 here, got 0"),
        ("z-image", {"text_length": 288}, "--text-length must be 32 to 254 here, got 288"),
        ("z-image", {"text_length": 33}, "--text-length must be a multiple of 32, got 33"),
    ],
)
def test_lengths_of_texts(
    name: str, options: dict[str, int], said: str, made: dict[str, Path]
) -> None:
    with pytest.raises(CheckpointError, match=said):
        load(made[name], **options)


def test_sizes_beyond_the_positions_are_refused(made: dict[str, Path]) -> None:
    assert load(made["sd3"]).latent_shape((64, 64)) == (16, 32, 32)
    with pytest.raises(CheckpointError, match="at most 64 on a side for this model, got 68x64"):
        load(made["sd3"]).latent_shape((64, 68))


def test_without_t5_rows_of_zeros_take_its_place(tmp_path: Path) -> None:
    """As in diffusers' pipeline without that encoder."""
    folder = folders.sd3(tmp_path, with_t5=True)
    family = load(folder, without_t5=True, text_length=12)
    assert len(family.tokenizers) == 2
    assert family.ignored == ("text_encoder_3", "tokenizer_3")
    assert family.conditioning[0][1][0] == folders.LENGTH + 12
    assert np.prod(family.latent_shape((16, 24))) == 16 * 8 * 12
    with pytest.raises(CheckpointError, match="multiples of 4 for this model, got 18x16"):
        family.latent_shape((16, 18))
