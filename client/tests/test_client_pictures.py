"""Images in requests: which tensors they become, the verbs over them, and what is refused."""

import asyncio
import io

import numpy as np
import pytest
from flowturbo_client import AsyncFlowTurboClient, FlowTurboClient, InvalidRequestError
from flowturbo_client.__main__ import main
from flowturbo_client.pictures import noise_between, padded
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
MASK = np.zeros((6, 10), dtype=np.uint8)
MASK[2:] = 255


def file(image=None, kind="PNG"):
    buffer = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def client(triton):
    with FlowTurboClient(triton.url) as connected:
        yield connected


@pytest.mark.parametrize("image", [PIXELS, PIXELS[None]])
@pytest.mark.parametrize("mask", [MASK, MASK[None], MASK > 0])
def test_arrays_are_sent_as_pixels(client, triton, image, mask):
    client.generate("A", image=image, mask=mask, strength=0.5, feather=3)
    inputs = triton.inputs()
    np.testing.assert_array_equal(inputs["image"], PIXELS[None])
    np.testing.assert_array_equal(inputs["mask"], MASK[None])
    assert inputs["strength"].tolist() == [0.5] and inputs["feather"].tolist() == [3]
    assert "start_time" in triton.output_names()


def test_files_are_sent_as_they_are(client, triton, tmp_path):
    path = tmp_path / "given.png"
    path.write_bytes(file())
    for image in (path, str(path), file(), [path]):
        client.generate("A", image=image, mask=file(Image.fromarray(MASK)))
        assert triton.inputs()["image_file"].tolist() == [file()]
        assert triton.inputs()["mask_file"].tolist() == [file(Image.fromarray(MASK))]


def test_pil_images_and_arrays_of_different_sizes_become_files(client, triton):
    client.generate(["A", "B"], image=[Image.fromarray(PIXELS), PIXELS[:3]])
    found = [np.asarray(Image.open(io.BytesIO(data))) for data in triton.inputs()["image_file"]]
    np.testing.assert_array_equal(found[0], PIXELS)
    np.testing.assert_array_equal(found[1], PIXELS[:3])


def test_images_of_equal_size_are_one_tensor(client, triton):
    client.generate(["A", "B"], image=[PIXELS, 255 - PIXELS])
    np.testing.assert_array_equal(triton.inputs()["image"], np.stack([PIXELS, 255 - PIXELS]))


def test_a_mask_of_transparent_pixels(client, triton):
    """As OpenAI's API has it: alpha 0 is to be repainted."""
    image = Image.fromarray(np.dstack([PIXELS, 255 - MASK]))
    client.inpaint(file(image), "alpha", "A")
    np.testing.assert_array_equal(triton.inputs()["mask"], MASK[None])


def test_a_transparent_array_and_a_turned_file(client, triton):
    """The mask is in the place of the image as the server turns it."""
    rgba = np.dstack([PIXELS, 255 - MASK])
    client.inpaint(rgba, "alpha", "A")
    assert "image" not in triton.inputs() and triton.inputs()["image_file"].shape == (1,)
    np.testing.assert_array_equal(triton.inputs()["mask"], MASK[None])
    image = Image.fromarray(rgba)
    exif = image.getexif()
    exif[0x0112] = 3
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    client.inpaint(buffer.getvalue(), "alpha", "A")
    np.testing.assert_array_equal(triton.inputs()["mask"], MASK[None, ::-1, ::-1])
    padded_image, _ = padded(buffer.getvalue(), 1, 0, 0, 0)
    shown = np.where(MASK[..., None] > 0, 255, PIXELS)[::-1, ::-1]
    np.testing.assert_array_equal(padded_image[:, 1:], shown)


def test_images_of_other_modes_are_sent(client, triton):
    client.generate("A", image=Image.new("CMYK", (3, 2)))
    (data,) = triton.inputs()["image_file"]
    assert Image.open(io.BytesIO(data)).mode == "RGB"


def test_one_prompt_serves_all_images(client, triton):
    client.generate(prompts="a red b", image=[PIXELS, PIXELS, PIXELS])
    assert triton.inputs()["image"].shape == (3, 6, 10, 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mask": MASK}, "mask needs an image"),
        ({"image": PIXELS.astype(float)}, "image must be uint8 of 3 or 4 dimensions, got float64"),
        ({"image": MASK}, "image must be uint8 of 3 or 4 dimensions"),
        ({"image": [PIXELS, PIXELS]}, "image must be one, or one per image, 1 here, got 2"),
        ({"image": 7}, "image must be a path, the bytes of a file, .* got int"),
        ({"image": "nowhere.png"}, "image cannot be read"),
        ({"image": PIXELS, "mask": "alpha"}, "needs an image with transparency"),
        ({"image": b"no image", "mask": "alpha"}, "image is no image"),
        ({"image": PIXELS, "feather": 1.5}, "feather must be an integer"),
        ({"image": PIXELS, "strength": "much"}, "strength must be a number"),
        ({"image": []}, "image must be one, or one per image, 1 here, got 0"),
        ({"image": PIXELS[None][:0]}, "image must be one, or one per image, 1 here, got 0"),
        ({"image": PIXELS, "mask": []}, "mask must be one, or one per image, 1 here, got 0"),
        ({"image": Image.new("F", (2, 2)), "mask": "alpha"}, "needs an image with transparency"),
    ],
)
def test_refused_before_sending(client, triton, given, said):
    with pytest.raises(InvalidRequestError, match=said):
        client.generate("A", **given)
    assert not triton.requests


def test_the_verbs_are_requests(client, triton):
    assert client.edit(PIXELS, "A").start_time == 0.5
    assert triton.inputs()["strength"].tolist() == pytest.approx([0.6])
    client.vary(PIXELS, ["A", "A"], seeds=[1, 2])
    assert triton.inputs()["strength"].tolist() == pytest.approx([0.7])
    client.inpaint(PIXELS, MASK, "A")
    assert {"image", "mask"} <= triton.inputs().keys() and "strength" not in triton.inputs()
    assert client.invert(PIXELS, "A").latents.shape == (1, 2, 1, 1)
    assert triton.inputs()["invert"].tolist() == [True]
    assert triton.output_names()[0] == "latent"


def test_the_verbs_of_the_other_client(triton):
    async def scenario():
        async with AsyncFlowTurboClient(triton.url) as client:
            assert (await client.edit(PIXELS, "A", strength=0.3)).start_time == 0.5
            assert len((await client.interpolate(3, 4, 5, "A")).seeds) == 5

    asyncio.run(scenario())


def test_interpolation_leads_from_seed_to_seed(client, triton):
    """The ends are the server's own noise; between them lengths stay those of noise."""
    client.interpolate(3, 4, 5, "A")
    inputs = triton.inputs()
    assert inputs["class_name"].tolist() == [b"A"] * 5
    np.testing.assert_array_equal(inputs["initial_noise"], noise_between(3, 4, 5, (2, 1, 1)))
    found = noise_between(3, 4, 5, (4, 64, 64))
    for end, seed in ((0, 3), (-1, 4)):
        own = np.random.Generator(np.random.Philox(seed))
        np.testing.assert_array_equal(
            found[end], own.standard_normal((4, 64, 64), dtype=np.float32)
        )
    assert found.std((1, 2, 3)) == pytest.approx(np.ones(5), abs=0.02)
    with pytest.raises(InvalidRequestError, match="count must be an integer from 2 on, got 1"):
        client.interpolate(3, 4, 1, "A")
    with pytest.raises(InvalidRequestError, match="'no' is unknown, known are glyphs, latents"):
        client.interpolate(3, 4, 2, "A", pipeline="no")


def test_interpolation_between_prompts(client, triton):
    """The noise may stay the same."""
    client.interpolate(3, 3, 3, prompts="a", prompts_to="b")
    inputs = triton.inputs()
    assert inputs["prompt_to"].tolist() == [b"b"] and inputs["mix"].tolist() == [0, 0.5, 1]
    noise = inputs["initial_noise"]
    assert (noise == noise[:1]).all() and noise[0].std() > 0


def test_outpainting_repeats_the_edge():
    image, mask = padded(PIXELS, 2, 0, 3, 1)
    assert image.shape == (7, 15, 3) and mask.shape == (7, 15)
    np.testing.assert_array_equal(image[:6, 2:12], PIXELS)
    assert (image[:6, :2] == PIXELS[:, :1]).all()
    assert (mask[:6, 2:12] == 0).all() and mask.sum() == 255 * (7 * 15 - 60)
    with pytest.raises(InvalidRequestError, match="border must have pixels"):
        padded(PIXELS, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        (["edit", "IMAGE", "--label", "A", "--strength", "0.25"], {"strength": [0.25]}),
        (["vary", "IMAGE", "--label", "A", "--count", "2"], {"seed": [0, 1]}),
        (["inpaint", "IMAGE", "MASK", "--id", "1", "--feather", "2"], {"feather": [2]}),
        (["inpaint", "IMAGE", "MASK", "--id", "1", "--strength", "1"], {"strength": [1.0]}),
        (["inpaint", "IMAGE", "--pad", "2", "2", "2", "2", "--prompt", "x"], {"prompt": [b"x"]}),
        (["invert", "IMAGE", "--label", "A", "--schedule", "M9"], {"schedule": [b"M9"]}),
        (["interpolate", "1", "2", "--label", "A", "--count", "3"], {"class_name": [b"A"] * 3}),
        (
            ["interpolate", "1", "1", "--prompt", "a", "--prompt-to", "b", "--count", "3"],
            {"prompt_to": [b"b"], "mix": [0.0, 0.5, 1.0]},
        ),
    ],
)
def test_commands(triton, tmp_path, capsys, words, sent):
    for name, image in (("IMAGE", PIXELS), ("MASK", MASK)):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    words = [str(tmp_path / f"{word}.png") if word in ("IMAGE", "MASK") else word for word in words]
    assert main([*words, "--url", triton.url, "--output", str(tmp_path / "out")]) == 0
    found = {name: triton.inputs()[name].tolist() for name in sent}
    assert found == sent
    written = capsys.readouterr().out.splitlines()
    assert sorted(map(str, (tmp_path / "out").iterdir())) == sorted(written)
    assert len(written) == len(triton.inputs().get("seed", [0])) or words[0] == "interpolate"


def test_interpolation_in_another_size(client, triton):
    client.interpolate(3, 4, 2, "A", size=(12, 8))
    assert triton.inputs()["initial_noise"].shape == (2, 2, 2, 2)
    for first, said in ((-1, "a seed must be an integer from 0 on, got -1"), (1.5, "got 1.5")):
        with pytest.raises(InvalidRequestError, match=said):
            client.interpolate(first, 4, 2, "A")


@pytest.mark.parametrize("words", [["MASK", "--pad", "1", "1", "1", "1"], []])
def test_inpaint_takes_a_mask_or_a_border(triton, tmp_path, capsys, words):
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path)
    assert main(["inpaint", str(path), *words, "--label", "A", "--url", triton.url]) == 1
    assert "give either MASK or --pad" in capsys.readouterr().err
