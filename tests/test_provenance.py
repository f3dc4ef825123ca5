"""Files say how they were made, and the same picture can be made again."""

import io
from pathlib import Path

import numpy as np
import pytest
from flowturbo_client import FlowTurboClient, InvalidRequestError
from flowturbo_client.cli import main
from flowturbo_client.pictures import alpha_mask
from flowturbo_client.provenance import ROUNDING, read_metadata, replay
from PIL import Image

from flowturbo.errors import RequestError
from flowturbo.provenance import exif
from flowturbo.serving.tritonserver import ServerAddress


@pytest.fixture
def client(glyphs_server: ServerAddress):
    with FlowTurboClient(glyphs_server.grpc) as found:
        yield found


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_replay_of_classes(client: FlowTurboClient, tmp_path: Path, form: str) -> None:
    quality = None if form == "png" else 60
    made = client.generate(["A"], [7], "fast", output_format=form, output_quality=quality)
    assert made.encoded
    path = tmp_path / f"a.{form}"
    path.write_bytes(made.encoded[0])
    said = read_metadata(path)
    assert (said["pipeline"], said["class_name"], said["seed"]) == ("glyphs", "A", 7)
    assert said["schedule"] == made.settings["schedule"]
    assert said["program"].startswith("FlowTurbo")
    assert said.get("output_quality") == quality
    assert {"predictor", "decoder", "solvers"} <= said["digests"].keys()
    again = replay(client, path)
    assert (again.largest_difference, again.other) == (0, ())


def test_replay_of_prompts(client: FlowTurboClient, tmp_path: Path) -> None:
    made = client.generate(
        prompts=["a red circle", "a blue square — ü"],
        negative_prompts="green",
        seeds=[1, 2],
        pipeline="scenes",
        schedule="A8@2",
        guidance_scale=2.5,
        guidance_interval=(0.1, 0.9),
        output_format="png",
    )
    assert made.encoded
    path = tmp_path / "b.png"
    path.write_bytes(made.encoded[1])
    said = read_metadata(path)
    assert said["prompt"] == "a blue square — ü"
    assert replay(client, path).largest_difference <= ROUNDING  # two images were one batch


def test_replay_of_edits_needs_their_files(client: FlowTurboClient, tmp_path: Path) -> None:
    source, mask, other = (tmp_path / name for name in ("source.png", "mask.png", "other.png"))
    first = client.generate(["A"], [7], output_format="png")
    assert first.encoded
    source.write_bytes(first.encoded[0])
    white = np.zeros((64, 64), np.uint8)
    white[:, 32:] = 255
    Image.fromarray(white).save(mask)
    Image.fromarray(255 - white).save(other)
    transparent = np.full((64, 64, 4), 255, np.uint8)
    transparent[:, 32:, 3] = 0
    Image.fromarray(transparent).save(cut := tmp_path / "cut.png")
    for name, more in (
        ("edit.png", {"strength": 0.5}),
        ("filled.png", {"mask": mask}),
        ("alpha.png", {"mask": alpha_mask(cut)}),
        ("repainted.png", {"mask": mask, "strength": 0.7, "feather": 4}),
    ):
        made = client.generate(["B"], [8], image=source, output_format="png", **more)
        assert made.encoded
        path = tmp_path / name
        path.write_bytes(made.encoded[0])
        given = cut if name == "alpha.png" else more.get("mask")
        again = replay(client, path, source, given)
        assert again.largest_difference == 0, name
        with pytest.raises(InvalidRequestError, match="give --image"):
            replay(client, path)
        with pytest.raises(InvalidRequestError, match="is not the image"):
            replay(client, path, other, given)


def test_what_cannot_be_made_again(client: FlowTurboClient, tmp_path: Path) -> None:
    made = client.generate(
        ["A"], initial_noise=np.zeros((1, 4, 16, 16), np.float32), output_format="png"
    )
    assert made.encoded
    path = tmp_path / "noise.png"
    path.write_bytes(made.encoded[0])
    with pytest.raises(InvalidRequestError, match="it has no seed"):
        replay(client, path)
    stripped = client.generate(["A"], [1], output_format="png", strip_metadata=True)
    assert stripped.encoded
    path.write_bytes(stripped.encoded[0])
    with pytest.raises(InvalidRequestError, match="does not say how it was made"):
        replay(client, path)
    path.write_bytes(b"no image")
    with pytest.raises(InvalidRequestError, match="does not say how it was made"):
        replay(client, path)


def test_previews_do_not_say_that_they_are_the_image(client: FlowTurboClient) -> None:
    *previews, last = client.stream(["A"], schedule="H4", output_format="png")
    for update in previews:
        assert update.encoded
        with Image.open(io.BytesIO(update.encoded[0])) as image:
            assert not image.getexif()
    assert last.encoded and read_metadata(last.encoded[0])["schedule"] == "H4"


def test_the_command(
    glyphs_server: ServerAddress, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = ["--url", glyphs_server.grpc]
    wanted = ["generate", "--labels", "A", "--seed", "3", "--schedule", "fast"]
    assert main([*wanted, "--output", str(tmp_path), *url]) == 0
    (path,) = tmp_path.glob("A_seed3_fast.png")
    capsys.readouterr()
    assert main(["replay", str(path), *url, "--output", str(tmp_path / "again.png")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "the same picture"
    assert (tmp_path / "again.png").read_bytes() == path.read_bytes()
    damaged = np.asarray(Image.open(path)).copy()
    damaged[0, 0] ^= 0x80
    with Image.open(path) as image:
        Image.fromarray(damaged).save(tmp_path / "damaged.png", exif=image.getexif())
    assert main(["replay", str(tmp_path / "damaged.png"), *url]) == 1
    assert "colours differ by up to 128 of 255" in capsys.readouterr().out
    assert main([*wanted, "--strip-metadata", "--output", str(tmp_path), *url]) == 0
    assert main(["replay", str(path), *url]) == 1


@pytest.mark.unit
def test_metadata_that_no_jpeg_file_can_hold() -> None:
    record = {"prompt": "\x01" * 20_000}
    assert exif(record, "png")
    with pytest.raises(RequestError, match="at most 60000 bytes, here 120"):
        exif(record, "jpeg")
