"""Glyph scenes: prompts, images, the untrained networks, and the quality of the committed model."""

import re
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import ROOT

from research.quality.subjects import ALL, SETS, ScenePrompts
from training.judging import extract_features
from training.scenes import judge, pictures
from training.scenes.grammar import (
    COLOUR_NAMES,
    LAYOUTS,
    SIGNS,
    Scene,
    Sign,
    scenes,
    vocabulary,
)
from training.scenes.network import (
    TEXT_LENGTH,
    TextToImage,
    encode_prompts,
    make_tokenizer,
)
from training.scenes.pictures import load_images, render

WEIGHTS = ROOT / "weights" / "scenes"
# One of the training's fonts, which needs no Debian package.
FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def test_a_fifth_of_the_pairs_are_held_out_of_training() -> None:
    pairs = [Sign(sign, colour) for sign in SIGNS for colour in COLOUR_NAMES]
    held_out = [pair for pair in pairs if pair.held_out]
    assert len(held_out) / len(pairs) == pytest.approx(0.2, abs=0.01)
    # Each sign and each colour is in training, and each is held out with another.
    assert {pair.sign for pair in held_out} == set(SIGNS)
    assert {pair.colour for pair in held_out} == set(COLOUR_NAMES)
    assert not any(scene.held_out for scene in scenes(3000, 0))
    every = [sign for scene in scenes(300, 0, held_out=True) for sign in scene.signs]
    assert all(sign.held_out for sign in every)


def test_scenes_are_varied_and_visible() -> None:
    drawn = scenes(6000, 5)
    assert drawn[:3] == scenes(3, 5)
    assert len(set(drawn)) > 5000
    assert sum(len(scene.signs) == 2 for scene in drawn) / 6000 == pytest.approx(0.6, abs=0.02)
    layouts = Counter(scene.layout for scene in drawn)
    assert set(layouts) == set(LAYOUTS)
    assert all(sign.colour != scene.ground for scene in drawn for sign in scene.signs)


def read(prompt: str) -> Scene:
    """The scene of a plain prompt."""
    found = re.fullmatch(
        r"an? (\w+) (?:letter )?(\w)"
        r"(?: (left of|above) an? (\w+) (?:letter )?(\w)| (.+))? on (\w+)",
        prompt,
    )
    assert found, prompt
    colour, sign, relation, other_colour, other, place, ground = found.groups()
    signs = [Sign(sign.upper(), colour)]
    if relation:
        signs.append(Sign(other.upper(), other_colour))
    return Scene(relation or place, tuple(signs), ground)


def test_a_plain_prompt_says_the_whole_scene() -> None:
    for scene in scenes(400, 2, held_out=None):
        assert read(scene.prompt()) == scene
    two = Scene("above", (Sign("B", "orange"), Sign("7", "red")), "white")
    assert two.prompt() == "an orange letter b above a red 7 on white"


def test_a_paraphrase_says_the_same_in_other_words() -> None:
    scene = Scene("left of", (Sign("B", "green"), Sign("7", "red")), "white")
    said = {scene.prompt(np.random.default_rng(seed)) for seed in range(400)}
    assert len(said) > 100
    forward = [text for text in said if re.search(r"\bb\b.*(left of|to its right)", text)]
    backward = [text for text in said if re.search(r"\b7\b.*(right of|to its left)", text)]
    assert forward
    assert backward
    swapped = [text for text in said if re.search(r"\b7\b.*(left of|to its right)", text)]
    # The red 7 is never on the left, but "a red 7 is red and right of …, 7" may name it twice.
    assert not [text for text in swapped if "right of" not in text and "to its right" not in text]
    assert len(forward) + len(backward) == len(said)
    for text in said:
        assert {"green", "b", "red", "7", "white"} <= set(re.findall(r"\w+", text))


def test_every_word_is_one_token_and_every_prompt_fits(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(vocabulary(), tmp_path)
    words = {word for text in vocabulary() for word in re.findall(r"\w+|,", text)}
    assert words >= {*COLOUR_NAMES, *(sign.lower() for sign in SIGNS)}
    for word in words:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    lengths = [len(tokenizer(text).input_ids) for text in vocabulary()]
    assert max(lengths) <= TEXT_LENGTH
    # Unknown words are read in pieces, capitals as small letters.
    assert tokenizer.tokenize("Zebra") == tokenizer.tokenize("zebra") != ["zebra</w>"]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextToImage, object]:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(vocabulary(), tmp_path_factory.mktemp("tokenizer"))
    return TextToImage(tokenizer).eval(), tokenizer


def test_the_text_is_read_at_its_end_and_is_as_large_as_the_image(untrained) -> None:  # type: ignore[no-untyped-def]
    """Two traps: pooling at the largest id (eos 2), and text of size 0.03 beside images of 1."""
    model, tokenizer = untrained
    assert all(clip.config.eos_token_id == tokenizer.eos_token_id != 2 for clip in model.clips)
    ids = torch.from_numpy(encode_prompts(tokenizer, ["a red 7 on white", "a blue 7 on white"]))
    with torch.inference_mode():
        context, pooled = model.text_encoder()(ids, ids)
        state = model.clips[0](ids, output_hidden_states=True)
    # All is the same until the second word; the pooled text sees the difference.
    words = state.hidden_states[-2]
    torch.testing.assert_close(words[0, :2], words[1, :2])
    assert (words[0, 2] - words[1, 2]).norm() > 1
    assert (state.text_embeds[0] - state.text_embeds[1]).norm() > 0.01
    assert 0.5 < float(words.std()) < 3
    assert context.shape == (2, TEXT_LENGTH, 192)
    assert pooled.shape == (2, 192)


def test_the_untrained_network_answers_zero_and_learns_from_the_text(untrained) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = untrained
    ids = torch.from_numpy(encode_prompts(tokenizer, ["a red 7 on white"]))
    made = model(torch.randn(1, 8, 16, 16), torch.tensor([0.5]), ids)
    assert not made.any()


@pytest.fixture(scope="module")
def reader() -> torch.nn.Sequential:
    made = judge.build()
    made.load_state_dict(load_file(WEIGHTS / "judge.safetensors"))
    return made


@pytest.mark.parametrize("name", ["single-new", "two-new", "mixed"])
def test_the_judge_reads_rendered_scenes(reader: torch.nn.Sequential, name: str) -> None:
    rng, drawn = np.random.default_rng(31), scenes(300, 31, **SETS[name])
    images = np.stack([render(scene, rng, [FONT]) for scene in drawn])
    found = judge.readings(extract_features(reader, images).probability)
    assert (found == judge.answers_of(drawn)).all(1).mean() > 0.98


def test_images_are_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "fonts", lambda: [FONT])
    first = load_images(tmp_path, 5, 3, held_out=None)
    (kept,) = tmp_path.iterdir()
    before = kept.stat().st_mtime_ns
    assert np.array_equal(load_images(tmp_path, 5, 3, held_out=None), first)
    assert kept.stat().st_mtime_ns == before
    assert first.shape == (5, 64, 64, 3)


def test_the_figures_tell_right_from_swapped_from_shuffled() -> None:
    subject, seeds = ScenePrompts("two"), np.arange(40)
    wanted = judge.answers_of([scene for scene, _ in subject.scenes(seeds)])

    def outputs(answers: np.ndarray) -> np.ndarray:
        parts = [np.eye(len(of))[answers[:, k]] for k, of in enumerate(judge.HEADS.values())]
        return np.concatenate(parts, axis=1)

    right = subject.right(outputs(wanted), seeds)
    assert right[ALL].all()
    assert not right["swapped"].any()
    assert right["shuffled"].sum() <= 1
    swapped = wanted.copy()
    names = list(judge.HEADS)
    one, two = names.index("first colour"), names.index("second colour")
    swapped[:, [one, two]] = swapped[:, [two, one]]
    found = subject.right(outputs(swapped), seeds)
    differ = wanted[:, one] != wanted[:, two]
    assert (found["swapped"] == differ).all()
    assert found["first sign"].all()
    assert (found[ALL] == ~differ).all()


def test_refuses_an_unknown_set_of_scenes() -> None:
    with pytest.raises(ValueError, match="must be one of mixed, single, .* got 'triple'"):
        ScenePrompts("triple")
