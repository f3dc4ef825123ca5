"""Encodes images once, for training: `python -m training.latents --images DIR --vae DIR --out DIR`.

Writes shards of latents (safetensors: `mean`, `std` [n, C, h, w] in the flow model's scale, `label`
[n] int64). At the end it writes `index.json`. A stopped run resumes where it was. `accelerate
launch -m training.latents` distributes the shards over GPUs.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from flowturbo.command import positive
from flowturbo.errors import FlowTurboError
from flowturbo.nets.vae import latent_factor, load_vae, sample_size
from flowturbo.textfile import read_json
from training.data import SCALE, Latents, encode, finite, text_digest, vae_digest
from training.images import DataError, check_outside, list_pictures, printable, shown, unused
from training.loop import atomic_write, device, exclusive, print_error, processes
from training.shards import INDEX, SETTINGS, SETTINGS_KEY, shard_files


class Images(Protocol):
    """Labelled images of size x size pixels, such as `training.images.Pictures`."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def size(self) -> int: ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """The options for reading the images, as JSON values."""

    def __len__(self) -> int: ...

    def read(self, rows: Iterable[int]) -> Iterator[tuple[np.ndarray | DataError, int]]:
        """Class ids with images [size, size, 3] uint8, or with errors of unreadable images."""

    @property
    def unused(self) -> Mapping[str, Any]:
        """What was found beside the images and not used, as JSON values."""

    def name(self, row: int) -> str:
        """A readable name of the image at `row`."""

    def identity(self) -> list[str]:
        """For each image a text that changes if the image or its file changes."""


@dataclass(frozen=True)
class Storage:
    """How to store latents: `dtype` is float16 or float32; `mean_only` leaves out `std`."""

    dtype: str = "float16"
    mean_only: bool = False
    shard: int = 4096  # images


class Writer:
    """Encodes `images` into the folder `out`, `batch` at a time.

    A bad image is unreadable, or its latents are not finite in the storage's type. It raises
    DataError. With `skip_bad` it is left out instead, and the index says which and why.
    """

    def __init__(
        self,
        images: Images,
        vae: AutoencoderKL,
        out: Path,
        storage: Storage,
        *,
        batch: int = 32,
        skip_bad: bool = False,
    ) -> None:
        try:
            str(out).encode()
        except UnicodeEncodeError:
            raise DataError(
                f"shards need a folder whose name is UTF-8, got {printable(out)}"
            ) from None
        self.images, self.out, self.storage = images, out, storage
        self.dtype = getattr(torch, storage.dtype)
        self.vae, self.batch, self.skip_bad = vae.to(device()).eval(), batch, skip_bad
        self.left_out: list[str] = []  # in the current shard: reasons
        self.unreadable: list[int] = []  # in the current shard: rows
        # Encode one black image to get the shape of an empty batch of latents.
        black = np.zeros((1, images.size, images.size, 3), np.uint8)
        self.none = self._encode([(black[0], 0)])[:0]
        self.paths = [
            out / f"shard-{k:05d}.safetensors" for k in range(-(-len(images) // storage.shard))
        ]
        self.digests = self._digests()
        self.settings = {**images.settings, "vae": vae_digest(self.vae), **asdict(storage)}
        self.settings_digest = text_digest(json.dumps(self.settings, sort_keys=True))

    def write(self) -> None:
        """Writes the shards that are missing or whose images have changed, then the index.

        Raises DataError if the folder was begun with another VAE, storage or way to read images.
        Raises it too if images change meanwhile, or if no image is usable. Raises PlanError if
        another run is using the folder.
        """
        with exclusive(self.out):
            self._write_missing(processes())

    def _write_missing(self, state: PartialState) -> None:
        self._check_settings(state)
        todo = [k for k in range(len(self.paths)) if not self._is_current(k)]
        state.wait_for_everyone()  # all processes list their work before one starts to change it
        if state.is_main_process:
            self._remove_outdated(todo)
        state.wait_for_everyone()  # nobody writes before outdated files are removed
        share = todo[state.process_index :: state.num_processes]
        with tqdm(total=sum(len(self._rows(k)) for k in share), desc="encode", unit="image") as bar:
            for shard in share:
                self._write_shard(shard, bar)
        state.wait_for_everyone()
        if state.is_main_process:
            if self._digests() != self.digests:
                raise DataError("images changed while they were encoded: run the command again")
            _write(self.out / INDEX, json.dumps(self._index(), indent=1).encode())

    def _rows(self, shard: int) -> range:
        start = shard * self.storage.shard
        return range(start, min(start + self.storage.shard, len(self.images)))

    def _write_shard(self, shard: int, bar: tqdm) -> None:
        rows, parts = self._rows(shard), [self.none]
        self.left_out.clear()
        self.unreadable.clear()
        for start in range(0, len(rows), self.batch):
            batch = rows[start : start + self.batch]
            parts.append(self._usable(batch))
            bar.update(len(batch))
        tensors = Latents.cat(parts).tensors(self.dtype)
        stated = {
            SETTINGS_KEY: self.settings_digest,
            "images": self.digests[shard],
            "left_out": json.dumps(self.left_out),
            "unreadable": json.dumps(self.unreadable),
        }
        _write(self.paths[shard], save(tensors, stated))

    def _usable(self, rows: range) -> Latents:
        """The latents of the images at `rows`, without bad images."""
        good, images = [], []
        for row, (image, label) in zip(rows, self.images.read(rows), strict=True):
            if isinstance(image, DataError):
                self._leave_out(str(image))
                self.unreadable.append(row)
            else:
                good.append(row)
                images.append((image, label))
        if not good:
            return self.none
        latents = self._encode(images)
        held = (part for part in (latents.mean, latents.std) if part is not None)
        usable = finite(*(part.to(self.dtype) for part in held))
        for k in (~usable).nonzero()[:, 0].tolist():
            name = self.images.name(good[k])
            self._leave_out(f"{name} has latents that are not finite in {self.storage.dtype}")
        return latents[usable]

    def _leave_out(self, what: str) -> None:
        if not self.skip_bad:
            raise DataError(f"{what}; --skip-bad leaves such images out")
        self.left_out.append(what)

    def _encode(self, good: Sequence[tuple[np.ndarray, int]]) -> Latents:
        mean, std = encode(self.vae, np.stack([image for image, _ in good]))
        label = torch.tensor([label for _, label in good])
        return Latents(mean.cpu(), label, None if self.storage.mean_only else std.cpu())

    def _digests(self) -> list[str]:
        """The digest of the images of each shard."""
        lines = self.images.identity()
        parts = (self._rows(shard) for shard in range(len(self.paths)))
        return [text_digest(*lines[rows.start : rows.stop]) for rows in parts]

    def _is_current(self, shard: int) -> bool:
        path = self.paths[shard]
        if not path.exists():
            return False
        stated = _stated(path)[1]
        wanted = self.settings_digest, self.digests[shard]
        if (stated[SETTINGS_KEY], stated["images"]) != wanted:
            return False
        # Retry unreadable images: the cause may have been permissions or a failing disk.
        again = self.images.read(stated["unreadable"])
        if not all(isinstance(image, DataError) for image, _ in again):
            return False
        for reason in stated["left_out"]:
            self._leave_out(reason)
        return True

    def _remove_outdated(self, todo: Sequence[int]) -> None:
        """Removes outdated shards. Also removes the index if any shard must be written."""
        changed = [self.paths[k] for k in todo if self.paths[k].exists()]
        surplus = sorted(set(shard_files(self.out)) - set(self.paths))
        for path in surplus:
            _stated(path)
        for path in (*changed, *surplus):
            path.unlink()
        if todo or surplus:
            (self.out / INDEX).unlink(missing_ok=True)
        if changed or surplus:
            print(
                f"images or settings have changed: {len(changed)} of {len(self.paths)} shards are "
                f"encoded again, {len(surplus)} removed",
                file=sys.stderr,
            )

    def _check_settings(self, state: PartialState) -> None:
        path = self.out / SETTINGS
        settings = self.settings
        if state.is_main_process and not path.exists():
            _write(path, json.dumps(settings, indent=1).encode())
        state.wait_for_everyone()
        begun = read_json(path)
        different = [key for key in settings if begun.get(key) != settings[key]]
        if different:
            key = different[0]
            said = f"{key} {begun.get(key)!r}, now it is {settings[key]!r}"
            raise DataError(
                f"{self.out} was begun with {'another VAE' if key == 'vae' else said}: "
                f"take another --out or remove {self.out}"
            )

    def _index(self) -> dict:
        shards, left_out, total = [], [], 0
        for path in self.paths:
            count, stated = _stated(path)
            shards.append({"file": path.name, "count": count})
            left_out += stated["left_out"]
            total += count
        # An image and its mirrored copy have the same fault: list it once.
        left_out = list(dict.fromkeys(left_out))
        config = self.vae.config
        if not total:
            raise DataError(
                f"none of the {len(self.images)} images is usable, at least 1 is needed"
            )
        return {
            "latent_shape": list(self.none.mean.shape[1:]),
            "image_size": self.images.size,
            "vae": self.settings["vae"],
            SETTINGS_KEY: self.settings_digest,
            **{name: getattr(config, name) for name in SCALE},
            "posterior": "mean" if self.storage.mean_only else "mean and std",
            "dtype": self.storage.dtype,
            "num_classes": len(self.images.class_names),
            "class_names": list(self.images.class_names),
            "count": total,
            "skipped": len(left_out),
            "left_out": left_out,
            **self.images.unused,
            "shards": shards,
        }


def _stated(path: Path) -> tuple[int, dict[str, Any]]:
    """The number of latents in a shard, and its metadata. Raises DataError for other files."""
    try:
        with safe_open(path, framework="pt") as file:
            count = file.get_slice("label").get_shape()[0]
            metadata = file.metadata()
            lists = {name: json.loads(metadata[name]) for name in ("left_out", "unreadable")}
            return count, {name: metadata[name] for name in (SETTINGS_KEY, "images")} | lists
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a shard of training.latents, remove it: {error}") from error


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, with one line on stderr, for errors that the user can fix."""
    args = _parser().parse_args(argv)
    try:
        check_outside("--out", args.out, args.images)
        vae = load_vae(args.vae)
        size = args.image_size or sample_size(vae)
        if size is None:
            raise DataError(
                f"--image-size is needed: the VAE states sample_size {vae.config.sample_size!r}"
            )
        if size % (factor := latent_factor(vae)):
            raise DataError(f"--image-size must be a multiple of the VAE's {factor}, got {size}")
        images = list_pictures(
            args.images,
            size,
            flip=args.flip,
            skip_bad=args.skip_bad,
            as_stored=args.ignore_orientation,
        )
        storage = Storage(args.dtype, args.mean_only, args.shard)
        Writer(images, vae, args.out, storage, batch=args.batch, skip_bad=args.skip_bad).write()
        if processes().is_main_process:
            index = read_json(args.out / INDEX)
            for line in unused(index["left_out"], images.skipped, images.empty):
                print(line, file=sys.stderr)
            print(
                f"{index['count']} latents in {args.out} of {shown(images.class_names)}; "
                f"{index['skipped']} images left out, {len(images.skipped)} other files skipped, "
                f"{len(images.empty)} classes without images (all of them in {INDEX})"
            )
    except (FlowTurboError, OSError) as error:
        print_error("latents", error)
        return 2  # no destroy_process_group: on GPUs it waits for others, which the launcher stops
    processes().destroy_process_group()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.latents",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Storage()
    add = parser.add_argument
    add(
        "--images",
        type=Path,
        required=True,
        help="image folder, one subfolder per class; their sorted order gives the class ids",
    )
    add("--vae", type=Path, required=True, help="diffusers AutoencoderKL folder")
    add("--out", type=Path, required=True, help="folder for shards and index")
    add("--image-size", type=positive, help="pixels (default: the VAE's sample_size)")
    add("--flip", action="store_true", help="encode every image twice, once mirrored")
    add(
        "--ignore-orientation",
        action="store_true",
        help="read images as stored, without the rotation of their EXIF data",
    )
    add("--dtype", choices=("float16", "float32"), default=default.dtype)
    add("--mean-only", action="store_true", help="store no standard deviations: train on the means")
    add("--shard", type=positive, default=default.shard, help="images per shard (default: 4096)")
    add("--batch", type=positive, default=32, help="images encoded together (default: 32)")
    add("--skip-bad", action="store_true", help="leave out and count images that cannot be used")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
