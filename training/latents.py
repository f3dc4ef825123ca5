"""Encodes images once, for training: `python -m training.latents --images DIR --vae DIR --out DIR`.

Writes shards of latents (safetensors: `mean`, `std` [n, C, h, w] in the flow model's scale, `label`
[n] int64) and, when all is encoded, `index.json`. A run that was stopped goes on where it was;
`accelerate launch -m training.latents` shares the shards among GPUs.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from flowturbo.errors import FlowTurboError
from flowturbo.nets.vae import latent_factor, load_vae
from training.data import Latents, encode, finite, text_digest, vae_digest
from training.images import DataError, list_pictures
from training.loop import alone, device, processes, tell, whole
from training.shards import INDEX, SETTINGS, read_object


class Images(Protocol):
    """Labelled images of size x size pixels, as `training.images.Pictures`."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def size(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, rows: Iterable[int]) -> Iterator[tuple[np.ndarray | DataError, int]]:
        """Images [size, size, 3] uint8, or what is wrong with each, and class ids."""

    def name(self, row: int) -> str:
        """Which image that is, for people."""

    def identity(self) -> list[str]:
        """What tells these images from others."""


@dataclass(frozen=True)
class Storage:
    """How latents are stored: `dtype` float16 or float32, without `std` if `mean_only`."""

    dtype: str = "float16"
    mean_only: bool = False
    shard: int = 4096  # images


class Writer:
    """Encodes `images` into the folder `out`, `batch` at a time.

    An image that cannot be read, or whose latents are not finite numbers (of the storage's type),
    raises DataError, or is left out with `skip_bad`.
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
        self.images, self.out, self.storage = images, out, storage
        self.dtype = getattr(torch, storage.dtype)
        self.vae, self.batch, self.skip_bad = vae.to(device()).eval(), batch, skip_bad
        # One black image tells what no latents at all look like.
        black = np.zeros((1, images.size, images.size, 3), np.uint8)
        self.none = self._encode([(black[0], 0)])[:0]
        self.paths = [
            out / f"shard-{k:05d}.safetensors" for k in range(-(-len(images) // storage.shard))
        ]

    def write(self) -> None:
        """Writes the shards that are not there yet, then the index.

        Raises DataError also for a folder that was begun with other images, VAE or storage, and
        where no image is left, PlanError where another run is at work in it.
        """
        with alone(self.out):
            self._write_missing(processes())

    def _write_missing(self, state: PartialState) -> None:
        self._check_settings(state)
        todo = [k for k, path in enumerate(self.paths) if not path.exists()]
        state.wait_for_everyone()  # nobody looks what is to do while another is already at work
        share = todo[state.process_index :: state.num_processes]
        with tqdm(total=sum(len(self._rows(k)) for k in share), desc="encode", unit="image") as bar:
            for shard in share:
                self._write_shard(shard, bar)
        state.wait_for_everyone()
        if state.is_main_process:
            _write(self.out / INDEX, json.dumps(self._index(), indent=1).encode())

    def _rows(self, shard: int) -> range:
        start = shard * self.storage.shard
        return range(start, min(start + self.storage.shard, len(self.images)))

    def _write_shard(self, shard: int, bar: tqdm) -> None:
        rows, parts = self._rows(shard), [self.none]
        for start in range(0, len(rows), self.batch):
            batch = rows[start : start + self.batch]
            parts.append(self._usable(batch))
            bar.update(len(batch))
        tensors = Latents.cat(parts).tensors(self.dtype)
        skipped = len(rows) - len(tensors["label"])
        _write(self.paths[shard], save(tensors, {"skipped": str(skipped)}))

    def _usable(self, rows: range) -> Latents:
        """The latents of the images at `rows`, without those to be left out."""
        good, images = [], []
        for row, (image, label) in zip(rows, self.images.read(rows), strict=True):
            if isinstance(image, DataError):
                self._leave_out(str(image))
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

    def _encode(self, good: Sequence[tuple[np.ndarray, int]]) -> Latents:
        mean, std = encode(self.vae, np.stack([image for image, _ in good]))
        label = torch.tensor([label for _, label in good])
        return Latents(mean.cpu(), label, None if self.storage.mean_only else std.cpu())

    def _check_settings(self, state: PartialState) -> None:
        path = self.out / SETTINGS
        settings = {
            "images": text_digest(*self.images.identity()),
            "count": len(self.images),
            "image_size": self.images.size,
            "vae": vae_digest(self.vae),
            **asdict(self.storage),
        }
        if state.is_main_process and not path.exists():
            _write(path, json.dumps(settings, indent=1).encode())
        state.wait_for_everyone()
        begun = read_object(path)
        different = [key for key in settings if begun.get(key) != settings[key]]
        if different:
            key = different[0]
            raise DataError(
                f"{self.out} was begun with {key} {begun.get(key)!r}, now it is {settings[key]!r}: "
                "take another --out or remove it"
            )

    def _index(self) -> dict:
        shards = []
        for path in self.paths:
            try:
                with safe_open(path, framework="pt") as file:
                    count = file.get_slice("label").get_shape()[0]
                    skipped = int(file.metadata()["skipped"])
            except (SafetensorError, LookupError, TypeError, ValueError) as error:
                raise DataError(f"{path} is no shard from here, remove it: {error}") from error
            shards.append({"file": path.name, "count": count, "skipped": skipped})
        config = self.vae.config
        count = sum(shard["count"] for shard in shards)
        if not count:
            raise DataError(
                f"none of the {len(self.images)} images is usable, at least 1 is needed"
            )
        return {
            "latent_shape": list(self.none.mean.shape[1:]),
            "image_size": self.images.size,
            "scaling_factor": config.scaling_factor,
            "shift_factor": config.shift_factor,
            "posterior": "mean" if self.storage.mean_only else "mean and std",
            "dtype": self.storage.dtype,
            "num_classes": len(self.images.class_names),
            "class_names": list(self.images.class_names),
            "count": count,
            "skipped": sum(shard["skipped"] for shard in shards),
            "shards": shards,
        }


def _write(path: Path, content: bytes) -> None:
    with whole(path) as file:
        file.write(content)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for what the user can put right."""
    args = _parser().parse_args(argv)
    try:
        vae = load_vae(args.vae)
        size = args.image_size or vae.config.sample_size
        if size % (factor := latent_factor(vae)):
            raise DataError(f"--image-size must be a multiple of the VAE's {factor}, got {size}")
        images = list_pictures(args.images, size, flip=args.flip, skip_bad=args.skip_bad)
        storage = Storage(args.dtype, args.mean_only, args.shard)
        Writer(images, vae, args.out, storage, batch=args.batch, skip_bad=args.skip_bad).write()
        if processes().is_main_process:
            index = json.loads((args.out / INDEX).read_text())
            print(
                f"{index['count']} latents in {args.out}, {index['skipped']} images "
                f"and {images.empty} empty class folders skipped"
            )
    except (FlowTurboError, OSError) as error:
        tell("latents", error)
        return 2  # on GPUs, to leave the group would wait for the others; the launcher ends them
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
    add("--images", type=Path, required=True, help="a subfolder a class, sorted order = class ids")
    add("--vae", type=Path, required=True, help="diffusers AutoencoderKL folder")
    add("--out", type=Path, required=True, help="folder for shards and index")
    add("--image-size", type=positive, help="pixels (default: the VAE's sample_size)")
    add("--flip", action="store_true", help="encode every image twice, once mirrored")
    add("--dtype", choices=("float16", "float32"), default=default.dtype)
    add("--mean-only", action="store_true", help="store no standard deviations: train on the means")
    add("--shard", type=positive, default=default.shard, help="images a shard (default: 4096)")
    add("--batch", type=positive, default=32, help="images encoded together (default: 32)")
    add("--skip-bad", action="store_true", help="leave out, and count, what cannot be used")
    return parser


def natural(text: str) -> int:
    """A whole number, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not natural(text):
        raise argparse.ArgumentTypeError("must be at least 1, got 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
