"""Rows of images, one row per schedule, and the files that they are written to."""

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .client import FlowTurboClient
from .grid import labelled_grid
from .protocol import Generation

_MAX_BYTES = 60


@dataclass(frozen=True)
class Row:
    """Images of one schedule, in the order of the labels."""

    schedule: str | None
    images: tuple[NDArray[np.uint8], ...]
    files: tuple[bytes, ...]
    """PNG, with the metadata of their making."""
    seeds: tuple[int, ...]
    class_names: tuple[str, ...]
    """Names of classes, or the prompts."""
    latency_ms: float
    """Per image: the sum over the row's requests, divided by its number of images."""
    guidance_scale: float | None = None
    """The requested scale; None means the server's default."""

    @property
    def caption(self) -> str:
        """Schedule and latency, on two lines."""
        return f"{self.schedule or 'default'}\n{self.latency_ms:.1f} ms/image"


def generate_row(
    client: FlowTurboClient,
    labels: Sequence[int] | Sequence[str],
    schedule: str | None,
    *,
    base_seed: int | None,
    batch: int,
    progress: Callable[[str], None],
    guidance_scale: float | None = None,
    of_prompts: bool = False,
    **options: Any,
) -> Row:
    """Generate one image per label in requests of at most `batch`, one after another.

    The labels are texts if `of_prompts`. Image i has seed `base_seed` + i; if it is None the server
    chooses. `options` go to `FlowTurboClient.generate`.
    """
    done = []
    for start in range(0, len(labels), batch):
        part = labels[start : start + batch]
        seeds = None if base_seed is None else [base_seed + start + i for i in range(len(part))]
        asked: dict[str, Any] = {"prompts" if of_prompts else "labels": part}
        done.append(
            client.generate(
                **asked,
                seeds=seeds,
                schedule=schedule,
                guidance_scale=guidance_scale,
                output_format="png",
                **options,
            )
        )
        progress(
            f"{schedule or 'default schedule'}: {start + len(part)}/{len(labels)} images, "
            f"{1e3 * done[-1].latency_s:.0f} ms"
        )
    return Row(
        schedule=schedule,
        images=tuple(np.asarray(image) for one in done for image in one.pil()),
        files=tuple(file for one in done for file in one.encoded or ()),
        seeds=tuple(int(seed) for one in done for seed in one.seeds),
        class_names=tuple(map(str, labels))
        if of_prompts
        else tuple(name for one in done for name in one.class_names),
        latency_ms=1e3 * sum(one.latency_s for one in done) / len(labels),
        guidance_scale=guidance_scale,
    )


def row_of(
    generation: Generation, labels: Sequence[int] | Sequence[str], schedule: str | None
) -> Row:
    """The row of one answered request for PNG files."""
    return Row(
        schedule=schedule,
        images=tuple(map(np.asarray, generation.pil())),
        files=generation.encoded or (),
        seeds=tuple(int(seed) for seed in generation.seeds),
        class_names=generation.class_names or tuple(map(str, labels)),
        latency_ms=1e3 * generation.latency_s / len(labels),
    )


def write_row(row: Row, folder: Path) -> list[Path]:
    """Write one PNG per image and return the paths.

    The names have class, seed and schedule, and the guidance scale if one was requested.
    """
    paths = []
    for file, seed, name in zip(row.files, row.seeds, row.class_names, strict=True):
        stem = f"{file_part(name)}_seed{seed}_{file_part(row.schedule or 'default')}"
        if row.guidance_scale is not None:
            stem += f"_g{row.guidance_scale:g}"
        paths.append(folder / f"{stem}.png")
        paths[-1].write_bytes(file)
    return paths


def write_grid(rows: Sequence[Row], folder: Path) -> Path:
    """Write `grid.png`: one row per schedule, one column per label; return its path."""
    path = folder / "grid.png"
    captions = [row.caption for row in rows]
    labelled_grid([row.images for row in rows], captions, rows[0].class_names).save(path)
    return path


def file_part(text: str) -> str:
    """Return `text` as part of a file name: letters, digits, `-` and `.`, not too long."""
    if re.fullmatch(r"[\w.]+( [\w.]+)*", text) and len(text.encode()) <= _MAX_BYTES:
        return text.replace(" ", "-")
    # File systems limit names in bytes, so a cut may fall within a character.
    part = re.sub(r"[^\w.-]+", "-", text).encode()[:_MAX_BYTES].decode(errors="ignore")
    # The digest distinguishes texts that differ only in what was replaced or cut.
    return f"{part}-{zlib.crc32(text.encode()):08x}"
