"""Prompts: requests, the command line, and folders of pictures that go on where they stopped."""

import json

import pytest
from flowturbo_client import AsyncFlowTurboClient, FlowTurboClient, InvalidRequestError
from flowturbo_client.cli import main
from PIL import Image


def test_a_prompt_per_image(triton):
    with FlowTurboClient(triton.url) as client:
        made = client.generate(
            prompts=["a cat", "x" * 50],
            negative_prompts="dogs",
            seeds=[1, 2],
            size="32x16",
            pipeline="sd35",
        )
    sent = triton.inputs()
    assert sent["prompt"].tolist() == [b"a cat", b"x" * 50]
    assert sent["negative_prompt"].tolist() == [b"dogs"]
    assert sent["size"].tolist() == [16, 32]  # height, width
    assert triton.output_names() == ["image", "seed", "settings", "truncated"]
    assert made.truncated == (False, True) and made.class_names == ()


def test_one_prompt_serves_all_seeds(triton):
    with FlowTurboClient(triton.url) as client:
        made = client.generate(prompts="a cat", seeds=[4, 5, 6], size=(32, 16))
    assert made.seeds.tolist() == [4, 5, 6] and made.truncated == (False,) * 3
    assert triton.inputs(0)["size"].tolist() == [16, 32]


async def _async_prompts(url):
    client = AsyncFlowTurboClient(url)
    try:
        return await client.generate(prompts=["a", "b"])
    finally:
        await client.close()


def test_prompts_with_asyncio(triton):
    import asyncio

    assert len(asyncio.run(_async_prompts(triton.url)).pil()) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "give either labels or prompts, got neither"),
        ({"labels": 0, "prompts": "a"}, "got both"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [1]}, "prompt must be a string, got 1"),
        ({"prompts": "a", "size": "32"}, "size must be .*, got '32'"),
        ({"prompts": "a", "size": (1, 2, 3)}, "size must be"),
        ({"prompts": "a", "size": "0x32"}, "size must be in 1"),
        ({"prompts": ["a", "b"], "seeds": [1]}, "2 images, 1 seeds"),
    ],
)
def test_what_cannot_be_right_is_not_sent(triton, arguments, said):
    with FlowTurboClient(triton.url) as client:
        with pytest.raises(InvalidRequestError, match=said):
            client.generate(**arguments)
    assert triton.requests == []


def test_the_command_takes_texts(triton, tmp_path, capsys):
    arguments = ["generate", "--url", triton.url, "--prompt", "a cat", "on a mat"]
    arguments += ["--count", "2", "--seed", "7", "--negative-prompt", "dogs", "--size", "32x16"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "a-cat_seed7_default.png",
        "a-cat_seed8_default.png",
        "grid.png",
        "on-a-mat_seed10_default.png",
        "on-a-mat_seed9_default.png",
    ]
    assert triton.inputs()["prompt"].tolist() == [b"a cat"] * 2 + [b"on a mat"] * 2
    assert triton.inputs()["size"].tolist() == [16, 32]


def run_file(triton, tmp_path, *options):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \r\na cat\n", encoding="utf-8")
    arguments = ["generate", "--url", triton.url, "--prompts", str(tmp_path / "prompts.txt")]
    return main([*arguments, "--output", str(tmp_path / "out"), *options])


def test_a_file_of_prompts_becomes_a_folder(triton, tmp_path, capsys):
    assert run_file(triton, tmp_path, "--batch", "2", "--seed", "5") == 0
    lines = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [(e["prompt"], e["seed"]) for e in entries] == [("a cat", 5), ("a dog", 6), ("a cat", 7)]
    for entry in entries:
        with Image.open(tmp_path / "out" / entry["file"]) as image:
            assert image.getpixel((0, 0)) == (entry["seed"],) * 3
    assert entries[0]["settings"]["schedule"] == "H1P5R3"
    assert "3 of 3 images made" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(triton, tmp_path, capsys):
    """Also if the last line of the manifest was cut off, and if a picture is gone."""
    assert run_file(triton, tmp_path) == 0
    manifest = tmp_path / "out" / "manifest.jsonl"
    manifest.write_text(manifest.read_text()[:-30])
    (first,) = (tmp_path / "out").glob("00000_*.png")
    first.unlink()
    triton.requests.clear()
    assert run_file(triton, tmp_path) == 0
    (request,) = triton.requests
    assert triton.inputs()["seed"].tolist() == [0, 2]
    assert "2 of 3 images made, 1 were there" in capsys.readouterr().out
    triton.requests.clear()
    assert run_file(triton, tmp_path) == 0
    assert triton.requests == []


def test_pictures_of_other_options_are_not_mixed(triton, tmp_path, capsys):
    assert run_file(triton, tmp_path) == 0
    assert run_file(triton, tmp_path, "--schedule", "H2") == 1
    assert "has pictures of other options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"), [(b"\n \n", "has no prompt"), (b"\xff\xfe\x00", "must be UTF-8")]
)
def test_files_that_are_no_prompts(triton, tmp_path, capsys, content, said):
    (tmp_path / "bad.txt").write_bytes(content)
    command = ["generate", "--url", triton.url, "--prompts", str(tmp_path / "bad.txt")]
    assert main([*command, "--output", str(tmp_path / "out")]) == 1
    assert said in capsys.readouterr().err
