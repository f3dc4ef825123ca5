"""A folder with the images of one spec as PNG: image i has seed i and the subject of that seed.

Existing images are not made again, so a run can be stopped, resumed and extended.
"""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from flowturbo.textfile import read_json
from research.quality.engine import BATCH, Make
from research.quality.subjects import Subject

_SPEC, _SPEED = "spec.json", "speed.json"


@dataclass(frozen=True)
class Speed:
    """The number of images made, and the time that it took; existing images do not count."""

    images: int
    seconds: float

    @property
    def ms_per_image(self) -> float | None:
        """Milliseconds per image, including writing the file; None if none was made."""
        return 1e3 * self.seconds / self.images if self.images else None


def beside(path: Path) -> Path:
    """A path that only this process writes, for an atomic write: rename it to `path`.

    Makes the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


class ImageFolder:
    """The folder `path` of images of `subject`, made with `spec`, any JSON object.

    Raises ValueError if the folder has images of another spec.
    """

    def __init__(self, path: Path, spec: Mapping[str, Any], subject: Subject) -> None:
        self.path, self.subject = path, subject
        self._shape: tuple[int, ...] | None = None
        path.mkdir(parents=True, exist_ok=True)
        stated = json.dumps({**spec, **subject.stated}, indent=1, sort_keys=True) + "\n"
        written = path / _SPEC
        if not written.exists():
            written.write_text(stated)
        if written.read_text() != stated:
            there, wanted = (" ".join(text.split()) for text in (written.read_text(), stated))
            raise ValueError(
                f"{path} has images of {there or 'an unknown spec'}, not of {wanted}: remove it, "
                "or use another folder"
            )

    @property
    def speed(self) -> Speed:
        """The speed over all images that `fill` made here, in this run and in earlier ones."""
        path = self.path / _SPEED
        return Speed(**read_json(path)) if path.exists() else Speed(0, 0.0)

    def missing(self, count: int) -> np.ndarray:
        """Seeds below `count` without an image, in ascending order."""
        there = {entry.name for entry in os.scandir(self.path)}
        return np.array([k for k in range(count) if self._file(k).name not in there], np.int64)

    def write(self, seeds: np.ndarray, images: np.ndarray) -> None:
        """Writes `images` [n, H, W, 3] uint8 of `seeds` [n], each file atomically."""
        for seed, image in zip(seeds, images, strict=True):
            partial = beside(self._file(int(seed)))
            Image.fromarray(image).save(partial, "png")
            partial.rename(self._file(int(seed)))

    def read(self, seeds: Iterable[int]) -> np.ndarray:
        """Images [n, H, W, 3] uint8 of `seeds`."""
        return np.stack([self._read(self._file(int(seed))) for seed in seeds])

    def _read(self, path: Path) -> np.ndarray:
        image = np.asarray(Image.open(path))
        if self._shape is None:
            self._shape = image.shape
        if image.shape != self._shape:
            raise ValueError(f"{path} must be {self._shape} like the others, it is {image.shape}")
        return image

    def batches(self, count: int, size: int = 500) -> Iterator[np.ndarray]:
        """Images of the seeds below `count`, in order, `size` at a time."""
        for start in range(0, count, size):
            yield self.read(range(start, min(start + size, count)))

    def fill(self, count: int, make: Make, *, batch: int = BATCH, in_flight: int = 1) -> Speed:
        """Makes the missing ones of `count` images, `in_flight` batches at a time.

        Returns the speed. Raises what `make` raises. The images made until then are kept and count
        in `speed`.
        """
        missing = self.missing(count)
        parts = [missing[k : k + batch] for k in range(0, len(missing), batch)]

        def work(seeds: np.ndarray) -> None:
            self.write(seeds, make(seeds))

        started_s = time.perf_counter()
        pool = ThreadPoolExecutor(in_flight)
        try:
            for _ in tqdm(pool.map(work, parts), self.path.name, len(parts), disable=not parts):
                pass
        finally:
            pool.shutdown(cancel_futures=True)  # on a failure or Ctrl-C, do not wait for the rest
            made = len(missing) - len(self.missing(count))
            done = Speed(made, time.perf_counter() - started_s)
            self._add(done)
        return done

    def to_npz(self, path: Path, count: int) -> None:
        """Writes the first `count` images as ADM's sampling script does, for its evaluator.

        `arr_0` is uint8 [N, H, W, 3]; `arr_1` has the classes, int64 [N], if there are classes.
        One batch is in memory at a time. The write is atomic.
        """
        partial = beside(path)
        with zipfile.ZipFile(partial, "w") as file:
            with file.open("arr_0.npy", "w", force_zip64=True) as member:
                for number, images in enumerate(self.batches(count)):
                    if number == 0:
                        header = np.lib.format.header_data_from_array_1_0(images)
                        header["shape"] = (count, *images.shape[1:])
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(images.tobytes())
            if (labels := self.subject.labels(np.arange(count))) is not None:
                with file.open("arr_1.npy", "w") as member:
                    np.lib.format.write_array(member, labels)
        partial.rename(path)

    def _add(self, done: Speed) -> None:
        before = self.speed
        total = Speed(before.images + done.images, before.seconds + done.seconds)
        if done.images:
            partial = beside(self.path / _SPEED)
            partial.write_text(json.dumps(asdict(total)) + "\n")
            partial.rename(self.path / _SPEED)

    def _file(self, seed: int) -> Path:
        return self.path / f"{seed:06d}.png"
