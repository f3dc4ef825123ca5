"""Prompts on a real server with every family: figures, neighbours, errors, kept encodings."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from families.conftest import GOLDEN, NAMES
from flowturbo_client import FlowTurboClient, InvalidRequestError
from support import ROOT, Caller, post

from bench import perf_analyzer
from bench.perf_analyzer import Load, entry
from flowturbo import LocalPipeline
from flowturbo.contract import ORCHESTRATOR
from flowturbo.serving.tritonserver import ServerAddress

TEXTS = ["a", "red b on 7, k left of 9", "x " * 60, "7", "blue on red, a b c d e f g h i j"]
Metrics = Callable[[ServerAddress], dict[str, float]]


@pytest.fixture
def client(server: ServerAddress) -> Iterator[FlowTurboClient]:
    with FlowTurboClient(server.grpc) as connected:
        yield connected


def test_golden_figures(client: FlowTurboClient) -> None:
    """All cases at once."""
    figures = np.load(GOLDEN / "cases.npz")
    cases = json.loads((GOLDEN / "cases.json").read_text())["cases"]

    def ask(case: dict[str, Any]) -> np.ndarray:
        made = client.generate(
            prompts=case["prompt"],
            negative_prompts=case.get("negative_prompt"),
            schedule=case["schedule"],
            guidance_scale=case["guidance_scale"],
            initial_noise=figures["noise"],
            outputs=("latent", "image"),
            pipeline="golden",
        )
        assert made.truncated == (False, False) and made.class_names == ()
        assert made.latents is not None
        return made.latents

    with ThreadPoolExecutor(16) as pool:
        for case, found in zip(cases * 4, pool.map(ask, cases * 4), strict=True):
            want = figures[f"latent_{case['case']}"]
            assert np.abs(found - want).max() < 1e-4 * np.abs(want).max()


def test_a_row_does_not_depend_on_its_neighbours(client: FlowTurboClient, repository: Path) -> None:
    """Alone in process, and together: texts of every length, sizes, schedules, pipelines."""
    asked = [
        {
            "pipeline": name,
            "prompt": text,
            "seed": seed,
            "schedule": schedule,
            "size": size,
            "guidance_scale": scale,
        }
        for name in NAMES
        for seed, (text, schedule, size, scale) in enumerate(
            zip(
                TEXTS,
                ["H1P2", "E3@2", "A4", "P3", "H2Z1@1"],
                [(16, 16), (24, 16)] * 3,
                [1.0, 3.0, 2.0, 4.0, 3.0],
                strict=False,
            )
        )
    ]
    local = {name: LocalPipeline(repository, name) for name in NAMES}

    def together(each: dict[str, Any]) -> np.ndarray:
        options = {key: of for key, of in each.items() if key not in ("prompt", "seed")}
        made = client.generate(
            prompts=each["prompt"], seeds=each["seed"], outputs=("latent",), **options
        )
        assert made.latents is not None
        return made.latents

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(together, asked * 2))
    for each, latent in zip(asked * 2, found, strict=True):
        options = {key: of for key, of in each.items() if key != "pipeline"}
        want = local[str(each["pipeline"])].generate(**options).latent
        assert np.abs(latent - want).max() < 1e-4 * np.abs(want).max(), each


def test_one_prompt_serves_all_seeds(client: FlowTurboClient) -> None:
    made = client.generate(
        prompts="a red b", seeds=[1, 2, 3], pipeline="golden", outputs=("latent",), schedule="E2"
    )
    one = client.generate(
        prompts="a red b", seeds=2, pipeline="golden", outputs=("latent",), schedule="E2"
    )
    assert made.latents is not None and one.latents is not None
    assert np.abs(made.latents[1] - one.latents[0]).max() < 1e-4 * np.abs(one.latents).max()
    assert made.truncated == (False,) * 3
    assert made.settings["schedule"] == "E2@3"  # the grid of the pipeline


def test_equal_texts_are_encoded_once(
    client: FlowTurboClient, server: ServerAddress, read_metrics: Metrics
) -> None:
    def count(result: str) -> float:
        return read_metrics(server)[f'flowturbo_texts_total{{pipeline="golden",result="{result}"}}']

    client.generate(prompts="first 1", pipeline="golden", schedule="E1")  # the null prompt too
    before = count("hit"), count("miss")
    for prompts in (["new 1", "new 2"], ["new 2"], ["new 1", "new 2", "new 1"]):
        client.generate(prompts=prompts, pipeline="golden", schedule="E1")
    assert (count("hit") - before[0], count("miss") - before[1]) == (3 + 3, 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompts": ""}, "prompt must have content besides special tokens, got an empty text"),
        ({"prompts": " \n "}, "got an empty text"),
        ({"prompts": "<|endoftext|> <|startoftext|>"}, "besides special tokens, got '<|endoft"),
        ({"prompts": "</s> <|endoftext|>", "pipeline": "sd3"}, "besides special tokens, got '</s>"),
        ({"prompts": "a" * 8193}, "prompt must have at most 8192 bytes, got 8193"),
        (
            {"prompts": "a", "negative_prompts": "b", "guidance_scale": 1.0},
            "negative_prompt needs guidance",
        ),
        (
            {"prompts": ["a", "b"], "negative_prompts": ["a", "b", "c"]},
            "negative_prompt must have one entry, or one per image, 2 here, got 3",
        ),
        ({"prompts": "a", "prompts_to": "b"}, "prompt_to needs mix: give both or none"),
        ({"prompts": "a", "mix": [0.5]}, "mix needs prompt_to: give both or none"),
        ({"prompts": "a", "prompts_to": " ", "mix": [0.5]}, "prompt_to must have content"),
        ({"prompts": "a", "prompts_to": "b", "mix": [1.5]}, "mix must be 0 to 1, got 1.5"),
        ({"prompts": "a", "prompts_to": "b", "mix": [float("nan")]}, "mix must be 0 to 1, got nan"),
        (
            {"prompts": ["a", "b", "c"], "prompts_to": "b", "mix": [0, 1]},
            "mix must have one entry, or one per image, 3 here, got 2",
        ),
        ({"prompts": "a", "size": "100x16"}, "size 100x16 .* the nearest is 24x16"),
        ({"prompts": "a", "schedule": "H1P5R3"}, "pipeline golden has no refiner"),
        (
            {"labels": 3},
            "pipeline golden takes prompt, not label; pipelines that take label: none",
        ),
        ({"prompts": ["a", "b"], "seeds": [1, 2, 3]}, "seeds must be one per image"),
    ],
)
def test_bad_requests(client: FlowTurboClient, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        client.generate(**{"pipeline": "golden", **arguments})


def test_a_prompt_must_be_utf8(server: ServerAddress) -> None:
    text = np.array([b"\xff\xfe"], dtype=object)
    with Caller(server.grpc) as caller:
        with pytest.raises(triton.InferenceServerException, match="prompt must be UTF-8"):
            caller.infer(ORCHESTRATOR, ["seed"], prompt=text, pipeline="golden")


def test_a_mix_leads_from_text_to_text(client: FlowTurboClient) -> None:
    """Of every family; the ends are the texts alone, whatever shares the batch."""
    for name in NAMES:
        same = {"pipeline": name, "schedule": "E2", "outputs": ("latent",)}
        ends = client.generate(prompts=["a red b", "7 on blue"], seeds=[1, 1], **same).latents
        made = client.interpolate(1, 1, 3, prompts="a red b", prompts_to="7 on blue", **same)
        assert made.latents is not None and ends is not None
        limit = 1e-4 * np.abs(ends).max()
        assert np.abs(made.latents[[0, 2]] - ends).max() < limit
        if np.abs(ends[0] - ends[1]).max() > 10 * limit:  # the text matters
            assert np.abs(made.latents[1] - ends).max((1, 2, 3)).min() > limit


@pytest.mark.parametrize("name", NAMES)
def test_edits_of_every_family(client: FlowTurboClient, name: str) -> None:
    same = {"pipeline": name, "schedule": "E3", "prompts": "a red b", "seeds": [1, 2]}
    plain = client.generate(**same, outputs=("image", "latent"))
    assert plain.images is not None and plain.latents is not None
    image = plain.images[0]
    whole = client.generate(**same, image=image, strength=1.0, outputs=("latent",)).latents
    assert np.abs(whole - plain.latents).max() < 1e-4 * np.abs(plain.latents).max()
    mask = np.zeros(image.shape[:2], np.uint8)
    mask[:, mask.shape[1] // 2 :] = 255
    made = client.generate(**same, image=image, mask=mask)
    assert made.images is not None and made.start_time == pytest.approx(0.2)
    assert (made.images[:, mask == 0] == image[mask == 0]).all()


def test_long_texts_are_cut_and_told(client: FlowTurboClient) -> None:
    for name in NAMES:
        made = client.generate(
            prompts=["red", "x " * 300], pipeline=name, schedule="E1", outputs=("latent",)
        )
        assert made.truncated == (False, True)


def test_prompts_over_http(server: ServerAddress) -> None:
    """On the generate endpoint: text in, a picture as text out."""
    body = {"prompt": "a red b", "pipeline": "klein", "seed": 5, "output_format": "png_base64"}
    status, answer = post(server, "generate", body)
    assert status == 200 and answer["truncated"] is False
    assert answer["encoded_image"].startswith("iVBOR")
    assert json.loads(answer["settings"])["times"][0] == 0.0  # klein's own grid


def test_perf_analyzer_sends_prompts(server: ServerAddress) -> None:
    """Its own entries, and those that come with the source, for the default pipeline."""
    stored = json.loads((ROOT / "docker" / "perf_analyzer_prompts.json").read_text())["data"]
    made = [entry([f"a red b {k}"], "E1", pipeline="klein", first_seed=k) for k in range(3)]
    tool = perf_analyzer.find_perf_analyzer()
    for entries in (stored, made):
        result = perf_analyzer.run(tool, server.grpc, entries, Load(concurrency=2, requests=6))
        assert result.error is None and len(result.answers) >= 6


def test_what_is_served(client: FlowTurboClient) -> None:
    found = {each["name"]: each for each in client.pipelines()}
    assert sorted(found) == sorted(NAMES)
    golden = found["golden"]
    assert golden["condition"]["takes"] == ["prompt", "negative_prompt", "prompt_to", "mix"]
    assert all(each["edits"] for each in found.values())
    assert [each["name"] for each in found.values() if each["default"]] == [NAMES[0]]
    assert golden["sizes"] == [[16, 16], [16, 24]] and golden["family"] == "sd3"
    assert golden["default_guidance_scale"] == 4.5
