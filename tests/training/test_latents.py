"""Training's data: images to latents, latents to rows, and what is wrong with either."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save, save_file
from support import GLYPHS, ROOT, rewrite

from flowturbo.nets.sit import SiT, SiTConfig
from flowturbo.nets.vae import Decoder, load_vae
from flowturbo.textfile import TextFileError
from training.data import EncodedImages, encode
from training.glyphs.pictures import CLASS_NAMES, GlyphImages
from training.images import DataError, list_pictures
from training.latents import Storage, Writer, main
from training.loop import save_weights
from training.refiner import main as train
from training.shards import Shards, is_sharded

MODEL = SiTConfig(16, 2, 4, 4, 4, 32, 1, 2, num_classes=3)
CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return load_vae(GLYPHS / "vae")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four pictures a class, of several sizes and modes."""
    rng, folder = np.random.default_rng(0), tmp_path / "images"
    for name in reversed(CLASSES):  # their order on the disk is not their sorted order
        (folder / name).mkdir(parents=True)
        for k, size in enumerate([(64, 64), (100, 70), (64, 200), (65, 64)]):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            image = Image.fromarray(pixels).convert(("RGB", "L", "RGBA", "RGB")[k])
            image.save(folder / name / f"{k}.{('png', 'jpg', 'webp', 'bmp')[k]}")
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(images: Path, out: Path, *more: str) -> int:
    given = ("--images", images, "--vae", GLYPHS / "vae", "--out", out, *more)
    return main([str(word) for word in given])


def spoil(images: Path) -> Path:
    bad = images / "bee" / "0.png"
    bad.write_bytes(bad.read_bytes()[:200])
    return bad


def test_classes_are_the_sorted_folders(images: Path) -> None:
    pictures = list_pictures(images, 64)
    assert pictures.class_names == CLASSES
    assert len(pictures) == 12
    assert {(p.path.parent.name, p.label) for p in pictures.pictures} == {
        ("ant", 0),
        ("bee", 1),
        ("cat", 2),
    }


def test_images_to_latents(images: Path, tmp_path: Path, vae: AutoencoderKL) -> None:
    """In the scale of the flow model: the decoder of the service reads them."""
    assert run(images, tmp_path / "out", "--shard", "5", "--dtype", "float32", "--flip") == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["latent_shape"] == [4, 16, 16]
    assert index["scaling_factor"] == vae.config.scaling_factor
    assert (index["num_classes"], index["count"], index["skipped"]) == (3, 24, 0)
    assert [shard["count"] for shard in index["shards"]] == [5, 5, 5, 5, 4]
    shards = Shards(tmp_path / "out", MODEL)
    everything = shards.read(torch.arange(24))
    assert torch.equal(everything.label, torch.arange(3).repeat_interleave(8))
    rows = torch.tensor([23, 0, 8, 4, 5])
    read = shards.read(rows)
    pictures = list_pictures(images, 64, flip=True)
    for row, mean, label in zip(rows, read.mean, read.label, strict=True):
        picture = pictures.pictures[int(row)]
        assert picture.mirrored == bool(row % 2)
        assert int(label) == picture.label
        pixels = picture.load(64)
        expected, _ = encode(vae, np.stack([pixels]))
        torch.testing.assert_close(mean, expected[0], atol=1e-4, rtol=1e-4)
        unscaled = vae.decode(mean[None] / vae.config.scaling_factor).sample
        image = ((unscaled * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        # One level where a value is rounded at .5: sums depend on the number of threads.
        made = Decoder(vae)(mean[None])[0].int()
        assert (made - image[0].permute(1, 2, 0).int()).abs().max() <= 1
    assert torch.equal(read.std > 0, torch.ones_like(read.mean, dtype=torch.bool))


def test_means_alone_in_half_precision(images: Path, tmp_path: Path) -> None:
    assert run(images, tmp_path / "out", "--mean-only") == 0
    tensors = load_file(tmp_path / "out" / "shard-00000.safetensors")
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "mean": torch.float16,
        "label": torch.int64,
    }
    assert Shards(tmp_path / "out").read(torch.tensor([0])).std is None


KILLED = """
import os, signal, sys
from training import latents

write = latents._write

def write_or_die(path, content):
    if path.name == "shard-00003.safetensors":
        path.with_suffix(".partial").write_bytes(content[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)

latents._write = write_or_die
latents.main(sys.argv[1:])
"""


def test_encoding_goes_on_after_a_kill(images: Path, tmp_path: Path) -> None:
    """In the middle of the fourth shard."""
    out = tmp_path / "out"
    given = ["--images", images, "--vae", GLYPHS / "vae", "--out", out, "--shard", "1"]
    command = [sys.executable, "-c", KILLED, *map(str, given)]
    assert subprocess.run(command, cwd=ROOT, timeout=600).returncode == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert len(done) == 3
    with pytest.raises(DataError, match="python -m training.latents writes it when all is encoded"):
        Shards(out)
    assert run(images, out, "--shard", "1") == 0
    assert all(path.stat().st_mtime_ns == then for path, then in done.items())
    assert len(Shards(out)) == 12


def test_encoding_does_not_go_on_with_other_settings(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(images, tmp_path / "out") == 0
    for option, said in [
        (("--dtype", "float32"), "begun with dtype 'float16', now it is 'float32'"),
        (("--flip",), "begun with flip False, now it is True"),
        (("--ignore-orientation",), "begun with ignore_orientation False, now it is True"),
        (("--image-size", "32"), "begun with image_size 64, now it is 32"),
    ]:
        assert run(images, tmp_path / "out", *option) == 2
        assert said in (told := capsys.readouterr().err)
        assert f"take another --out or remove {tmp_path / 'out'}" in told
    other = load_vae(GLYPHS / "vae")
    other.register_to_config(shift_factor=0.1)
    other.save_pretrained(tmp_path / "vae")
    assert run(images, tmp_path / "out", "--vae", str(tmp_path / "vae")) == 2
    assert "was begun with another VAE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("settings.json", b"{", "settings.json is not JSON"),
        ("settings.json", b"[]", "settings.json must be an object, got []"),
        ("shard-00000.safetensors", b"cut", "shard-00000.safetensors is not a shard of"),
        ("shard-00000.safetensors", save({"label": torch.zeros(3)}), "is not a shard of"),
        ("shard-00000.safetensors", save({"mean": torch.zeros(3)}), "is not a shard of"),
    ],
    ids=("no JSON", "no object", "cut", "no count", "no label"),
)
def test_encoding_does_not_go_on_from_other_files(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    said: str,
) -> None:
    assert run(images, tmp_path / "out") == 0
    (tmp_path / "out" / name).write_bytes(content)
    assert run(images, tmp_path / "out") == 2
    assert said in capsys.readouterr().err


def test_images_that_change_are_encoded_again(
    images: Path, tmp_path: Path, vae: AutoencoderKL, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no others: replaced under its name, added, removed, of another class."""
    out = tmp_path / "out"

    def encode_all() -> tuple[str, dict[str, int]]:
        assert run(images, out, "--shard", "4", "--dtype", "float32") == 0
        times = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
        return capsys.readouterr().err, times

    def check() -> None:
        pictures = list_pictures(images, 64).pictures
        read = Shards(out).read(torch.arange(len(pictures)))
        expected, _ = encode(vae, np.stack([picture.load(64) for picture in pictures]))
        torch.testing.assert_close(read.mean, expected, atol=1e-4, rtol=1e-4)
        assert read.label.tolist() == [picture.label for picture in pictures]

    _, first = encode_all()
    assert encode_all()[1] == first
    spare = [images / "ant" / "3.bmp", images / "cat" / "3.bmp"]
    shutil.copy(spare[0], images / "bee" / "3.bmp")
    said, second = encode_all()
    assert "have changed: 1 of 3 shards are encoded again, 0 removed" in said
    assert {name for name in first if first[name] != second[name]} == {"shard-00001.safetensors"}
    check()
    (images / "ant" / "0.png").rename(images / "cat" / "9.png")
    shutil.copy(spare[1], images / "cat" / "4.bmp")
    assert "3 of 4 shards are encoded again" in encode_all()[0]
    check()
    for path in (images / "cat").iterdir():
        path.unlink()
    (images / "cat").rmdir()
    assert "2 removed" in encode_all()[0]
    check()


def test_images_that_change_meanwhile_are_told(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vae: AutoencoderKL
) -> None:
    pictures = list_pictures(images, 64)
    writer = Writer(pictures, vae, tmp_path / "out", Storage())
    encode_batch = writer._encode

    def touching(good: Any) -> Any:
        (images / "ant" / "0.png").touch()
        return encode_batch(good)

    monkeypatch.setattr(writer, "_encode", touching)
    with pytest.raises(DataError, match="images changed while they were encoded"):
        writer.write()
    assert not (tmp_path / "out" / "index.json").exists()


def test_files_that_are_not_used_are_told(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "bat").mkdir()
    bad = spoil(images)
    assert run(images, tmp_path / "out", "--skip-bad") == 0
    said = capsys.readouterr()
    notes = images / "notes.txt"
    assert f"skipped: 1 beside the class folders, not in one ({notes})" in said.err
    assert f"left out: {bad} is not a readable image" in said.err
    assert "without images: 1 classes (bat)" in said.err
    assert "11 latents in" in said.out and "of 4 classes (ant, bat, bee, ...); 1 images" in said.out
    assert "1 images left out, 1 other files skipped, 1 classes without images" in said.out
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["class_names"] == ["ant", "bat", "bee", "cat"]
    (reason,) = index["left_out"]
    assert reason.startswith(f"{bad} is not a readable image")
    assert index["other_files"] == {"beside the class folders, not in one": [str(notes)]}
    assert index["empty_classes"] == ["bat"]
    assert run(images, tmp_path / "twice", "--skip-bad", "--flip") == 0
    said = capsys.readouterr()
    assert "22 latents in" in said.out and "1 images left out" in said.out


def test_what_was_left_out_is_tried_again(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image that can be read now, though nothing about its file has changed."""
    out, bad = tmp_path / "out", images / "bee" / "0.png"
    content, then = bad.read_bytes(), bad.stat()
    bad.write_bytes(content[:200] + bytes(len(content) - 200))
    os.utime(bad, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert run(images, out, "--shard", "4", "--skip-bad") == 0
    times = {path: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    assert run(images, out, "--shard", "4", "--skip-bad") == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("shard-*")} == times
    assert run(images, out, "--shard", "4") == 2  # as in a folder that is new
    assert f"{bad} is not a readable image" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.glob("shard-*")} == times
    assert (out / "index.json").exists()
    assert run(images, out, "--shard", "4", "--skip-bad") == 0
    bad.write_bytes(content)
    os.utime(bad, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert run(images, out, "--shard", "4", "--skip-bad") == 0
    assert "1 of 3 shards are encoded again" in capsys.readouterr().err
    assert json.loads((out / "index.json").read_text())["count"] == 12


def test_shards_of_another_vae_are_not_mixed_in(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = load_vae(GLYPHS / "vae")
    other.register_to_config(scaling_factor=0.5)
    other.save_pretrained(tmp_path / "vae")
    one, two, common = tmp_path / "one", tmp_path / "two", ("--shard", "6")
    assert run(images, one, *common) == 0
    assert run(images, two, *common, "--vae", str(tmp_path / "vae")) == 0
    expected = Shards(one).read(torch.arange(12)).mean
    shutil.copy(two / "shard-00000.safetensors", one)
    with pytest.raises(DataError, match="00000.safetensors was encoded with another VAE or other"):
        Shards(one)
    assert run(images, one, *common) == 0
    assert "1 of 2 shards are encoded again" in capsys.readouterr().err
    assert torch.equal(Shards(one).read(torch.arange(12)).mean, expected)
    # Nothing says any more what the shards were made with.
    (one / "settings.json").unlink()
    assert run(images, one, *common, "--vae", str(tmp_path / "vae")) == 0
    assert "2 of 2 shards are encoded again" in capsys.readouterr().err
    both = (Shards(folder).read(torch.arange(12)).mean for folder in (one, two))
    assert torch.equal(*both)


def test_files_of_others_are_left_alone(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(images, out) == 0
    for name, said in [
        ("shard-weights.safetensors", "is not in index.json: remove it"),
        ("shard-00007.safetensors", "is not a shard of training.latents, remove it"),
    ]:
        foreign = out / name
        save_file({"weight": torch.zeros(3)}, foreign)
        if run(images, out) == 0:
            with pytest.raises(DataError, match=said):
                Shards(out)
        else:
            assert said in capsys.readouterr().err
        assert foreign.exists()
        foreign.unlink()


@pytest.mark.parametrize("out", ["latents", "cat/latents", ""])
def test_latents_are_not_written_into_the_images(
    images: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    assert run(images, images / out) == 2
    assert "is inside the data folder" in capsys.readouterr().err


def test_an_image_folder_with_files_of_these_names(images: Path) -> None:
    """A data set may have an index of its own."""
    for name, content in (("index.json", '{"images": []}'), ("settings.json", "no JSON")):
        (images / name).write_text(content)
    assert not is_sharded(images)
    (images / "settings.json").write_text('{"vae": "abc"}')
    assert is_sharded(images)


def test_a_folder_that_is_not_unicode(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(images, Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))) == 2
    assert "shards need a folder whose name is UTF-8" in capsys.readouterr().err


def test_a_corrupt_image_stops_the_encoding(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = spoil(images)
    assert run(images, tmp_path / "out") == 2
    assert f"{bad} is not a readable image" in capsys.readouterr().err
    assert not (tmp_path / "out" / "index.json").exists()
    assert run(images, tmp_path / "out", "--skip-bad") == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["count"], index["skipped"]) == (11, 1)
    left = Shards(tmp_path / "out").read(torch.arange(11))
    assert left.label.bincount().tolist() == [4, 3, 4]


def test_no_image_is_usable(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in images.rglob("*.*"):
        path.write_bytes(b"cut")
    assert run(images, tmp_path / "out") == 2
    assert "is not a readable image" in capsys.readouterr().err
    assert run(images, tmp_path / "other", "--skip-bad") == 2
    assert "none of the 12 images is usable" in capsys.readouterr().err


def test_sizes_that_the_vae_cannot_make(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(images, tmp_path / "out", "--image-size", "30") == 2
    assert "--image-size must be a multiple of the VAE's 4, got 30" in capsys.readouterr().err


def test_a_name_that_is_not_unicode(images: Path, tmp_path: Path) -> None:
    (images / "ant" / "0.png").rename(os.fsdecode(os.fsencode(images / "ant") + b"/caf\xe9.png"))
    assert run(images, tmp_path / "out") == 0


def test_images_encoded_as_they_are_read(images: Path, vae: AutoencoderKL) -> None:
    pictures = list_pictures(images, 64)
    source = EncodedImages(pictures, vae, MODEL)
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        read = source.read(torch.tensor([11, 2]))
    expected, _ = encode(vae, np.stack([pictures.pictures[k].load(64) for k in (11, 2)]))
    torch.testing.assert_close(read.mean, expected)
    assert read.label.tolist() == [2, 0]
    bad = spoil(images)
    with pytest.raises(DataError, match=f"{bad} is not a readable image.*--skip-bad"):
        EncodedImages(list_pictures(images, 64), vae, MODEL)
    left = EncodedImages(list_pictures(images, 64), vae, MODEL, skip_bad=True)
    assert (len(left), left.skipped) == (11, 1)
    assert left.read(torch.tensor([4, 10])).label.tolist() == [1, 2]


def test_more_classes_than_the_model_has(images: Path, vae: AutoencoderKL) -> None:
    (images / "dog").mkdir()
    Image.new("RGB", (64, 64)).save(images / "dog" / "0.png")
    with pytest.raises(DataError, match="dog: class folder 4 of 4, the predictor has 3 classes"):
        EncodedImages(list_pictures(images, 64), vae, MODEL)
    left = EncodedImages(list_pictures(images, 64), vae, MODEL, skip_bad=True)
    assert (len(left), left.skipped) == (12, 1)


@pytest.fixture
def shards(images: Path, tmp_path: Path) -> Path:
    assert run(images, tmp_path / "shards", "--shard", "6") == 0
    return tmp_path / "shards"


def test_a_wrong_label(shards: Path) -> None:
    path = shards / "shard-00001.safetensors"
    tensors = load_file(path)
    tensors["label"][2] = 3
    rewrite(path, tensors)
    with pytest.raises(DataError, match=r"shard-00001.*: labels must be 0 to 2, .*; got 3"):
        Shards(shards, MODEL)
    left = Shards(shards, MODEL, skip_bad=True)
    assert (len(left), left.skipped) == (11, 1)
    everything = left.read(torch.arange(11))
    assert everything.label.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    kept = [k for k in range(6) if k != 2]
    torch.testing.assert_close(everything.mean[6:], tensors["mean"][kept].float())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn])
def test_a_shard_of_another_type(shards: Path, dtype: torch.dtype) -> None:
    path = shards / "shard-00000.safetensors"
    tensors = load_file(path)
    rewrite(path, {**tensors, "mean": tensors["mean"].to(dtype)})
    with pytest.raises(DataError, match="others in BF16, F16, F32, F64; got "):
        Shards(shards, MODEL)
    left = Shards(shards, MODEL, skip_bad=True)
    assert (len(left), left.skipped) == (6, 6)


def test_a_broken_shard(shards: Path) -> None:
    path = shards / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="shard-00000.* is not a readable safetensors file"):
        Shards(shards, MODEL)
    left = Shards(shards, MODEL, skip_bad=True)
    assert (len(left), left.skipped) == (6, 6)
    path.unlink()
    with pytest.raises(DataError, match="shard-00000"):
        Shards(shards, MODEL)


@pytest.mark.parametrize(("name", "value"), [("mean", float("nan")), ("std", float("inf"))])
def test_latents_that_are_not_finite(shards: Path, name: str, value: float) -> None:
    """The row alone is left out; the label of another one in that shard is wrong too."""
    path = shards / "shard-00001.safetensors"
    tensors = load_file(path)
    tensors[name][4, 3, 15, 15] = value
    rewrite(path, tensors)
    with pytest.raises(DataError, match=r"shard-00001.*: the latents of row 4 are not finite \(1 "):
        Shards(shards, MODEL)
    tensors["label"][0] = 3
    rewrite(path, tensors)
    left = Shards(shards, MODEL, skip_bad=True)
    assert (len(left), left.skipped) == (10, 2)
    everything = left.read(torch.arange(10))
    torch.testing.assert_close(everything.mean[6:], tensors["mean"][[1, 2, 3, 5]].float())
    assert everything.std is not None and everything.std.isfinite().all()


def test_latents_that_half_precision_cannot_hold(
    images: Path, tmp_path: Path, vae: AutoencoderKL, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a scaling factor with which those of one picture are above its largest number."""
    pictures = list_pictures(images, 64)
    latents = [torch.cat(encode(vae, each.load(64)[None])) for each in pictures.pictures]
    largest = torch.stack([each.abs().max() for each in latents])
    middle = float(largest.topk(2).values.mean())
    bright = load_vae(GLYPHS / "vae")
    bright.register_to_config(scaling_factor=vae.config.scaling_factor * 65504 / middle)
    bright.save_pretrained(tmp_path / "vae")
    given = ("--vae", str(tmp_path / "vae"))
    assert run(images, tmp_path / "out", *given) == 2
    path = pictures.pictures[int(largest.argmax())].path
    assert f"{path} has latents that are not finite in float16" in capsys.readouterr().err
    assert run(images, tmp_path / "out", *given, "--skip-bad") == 0
    left = Shards(tmp_path / "out")
    assert len(left) == 11
    assert json.loads((tmp_path / "out" / "index.json").read_text())["skipped"] == 1


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"latent_shape": [4, 32]}, r"latent_shape must be \[C, h, w\], got \[4, 32\]"),
        ({"latent_shape": [4, 16, "16"]}, "latent_shape must be"),
        ({"vae": None}, "vae must be a digest, got None"),
        ({"shards": [{"file": "a"}]}, r"shards must be a list .* got \[\{'file': 'a'\}\]"),
        ([], r"index.json must be an object, got \[\]"),
    ],
)
def test_an_index_of_another_form(shards: Path, stated: dict | list, said: str) -> None:
    path = shards / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, **stated} if isinstance(stated, dict) else stated))
    with pytest.raises((DataError, TextFileError), match=said):
        Shards(shards, MODEL)


def test_a_shard_of_another_shape(shards: Path) -> None:
    path = shards / "shard-00000.safetensors"
    tensors = load_file(path)
    rewrite(path, {**tensors, "mean": tensors["mean"][:, :3].contiguous()})
    with pytest.raises(DataError, match=r"shard-00000.* must have the tensors .*'mean': \(6, 4,"):
        Shards(shards, MODEL)


@pytest.mark.parametrize("shard", [0, 1])
def test_a_shard_of_means_among_others(shards: Path, shard: int) -> None:
    path = shards / f"shard-{shard:05d}.safetensors"
    tensors = load_file(path)
    del tensors["std"]
    rewrite(path, tensors)
    with pytest.raises(DataError, match=f"{path} has no std, others have"):
        Shards(shards, MODEL, skip_bad=True)


@pytest.mark.parametrize(
    ("data", "size", "said"),
    [
        ("shards", 32, "latents must be (4, 32, 32) for this predictor, got (4, 16, 16)"),
        ("images", 16, "to encode images, give --vae"),
        ("nowhere", 16, "nowhere is not a folder"),
    ],
)
def test_training_refuses_before_it_starts(
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    data: str,
    size: int,
    said: str,
) -> None:
    model = SiT(SiTConfig(size, 2, 4, 4, 4, 32, 1, 2, num_classes=3))
    save_weights(model, tmp_path / "predictor.safetensors")
    out = ("--out", tmp_path / "refiner.safetensors", "--runs", tmp_path / "runs")
    given = ("--predictor", tmp_path / "predictor.safetensors", "--data", tmp_path / data, *out)
    assert train([*map(str, given), "--steps", "1"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_refiner_from_images(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Encoded on the way, with a picture of samples by the decoder."""
    (images / "cow").mkdir()
    model = SiT(MODEL)
    model.initialize()
    save_weights(model, tmp_path / "predictor.safetensors")
    given = {
        "predictor": tmp_path / "predictor.safetensors",
        "data": images,
        "vae": GLYPHS / "vae",
        "out": tmp_path / "refiner.safetensors",
        "runs": tmp_path,
        "steps": 2,
        "batch": 2,
        "sample-every": 2,
    }
    words = [word for k, v in given.items() for word in (f"--{k}", str(v))]
    assert train([*words, "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert "12 images (0 skipped) of 4 classes (ant, bee, cat, ...), 1 of them empty" in said
    with Image.open(tmp_path / "refiner" / "0000002.png") as picture:
        assert picture.size == (256, 256)
    unused = json.loads((tmp_path / "unused.json").read_text())
    assert unused["empty_classes"] == ["cow"]
    assert unused["left_out"] == []
    assert train([*words, "--skip-bad", "--runs", str(images / "runs")]) == 2
    assert "--runs" in (said := capsys.readouterr().err) and "is inside the data folder" in said
    (images / "ant" / "0.png").touch()  # another file may lie there now
    assert train([*words, "--skip-bad"]) == 2
    assert (
        "refiner.state.pt was trained with data of other content: remove" in capsys.readouterr().err
    )


def test_glyphs_to_latents(tmp_path: Path, vae: AutoencoderKL) -> None:
    """The data set's own images, without files between."""
    images = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    storage = Storage("float32", mean_only=True, shard=16)
    Writer(GlyphImages(images), vae, tmp_path, storage).write()
    shards = Shards(tmp_path)
    assert shards.class_names == CLASS_NAMES
    read = shards.read(torch.arange(40))
    assert read.label.tolist() == [k % 36 for k in range(40)]
    torch.testing.assert_close(read.mean, encode(vae, images)[0], atol=1e-4, rtol=1e-4)
