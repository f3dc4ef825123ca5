"""Reads rows from a folder of latents, as `python -m training.latents` writes it."""

import bisect
import hashlib
import re
import reprlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from flowturbo.nets.sit import SiTConfig
from flowturbo.textfile import TextFileError, read_json
from training.data import Latents, finite
from training.images import DataError
from training.loop import digest_of, local_rows, processes

INDEX = "index.json"  # written when all shards are complete
SETTINGS = "settings.json"  # written first: what the shards depend on
SETTINGS_KEY = "settings"  # digest of the settings, in the index and in each shard
_SHARD = re.compile(r"shard-\d{5,}\.safetensors")
_DTYPES = {"BF16", "F16", "F32", "F64"}  # of latents


class Shards:
    """Shards of latents in a folder from `python -m training.latents`, mapped into memory.

    At the start all data are read once, to find latents that are not finite and to compute the
    `digest` of the usable data. All processes share that work. `skipped` counts rows that
    `skip_bad` left out; `left_out` says why.

    Raises DataError for bad rows without `skip_bad`, and for a broken shard or one that the index
    does not name. Raises it for another latent shape or unknown labels than those of `model`; None
    accepts all.
    """

    def __init__(
        self, folder: Path, model: SiTConfig | None = None, *, skip_bad: bool = False
    ) -> None:
        index = _read_index(folder)
        channels, height, width = index["latent_shape"]
        self.shape: tuple[int, int, int] = (channels, height, width)
        self.vae: str = index["vae"]  # digest of the VAE that encoded them
        self.class_names: tuple[str, ...] = tuple(index["class_names"])
        if model:
            check_shape(folder / INDEX, self.shape, model)
        stated = (folder / name for name in (INDEX, SETTINGS))
        digest = hashlib.sha256(b"".join(p.read_bytes() for p in stated if p.exists()))
        self.skipped, self.left_out = 0, list[str]()
        self.unused: dict[str, Any] = {}  # empty: the index lists images that were not encoded
        named = {entry["file"] for entry in index["shards"]}
        for path in sorted(folder.glob("*.safetensors")):
            if path.name not in named:
                raise DataError(f"{path} is not in {INDEX}: remove it, or encode again")
        self._files, self._starts, self._labels, paths, rows = [], [], [], [], []
        start = 0
        for entry in index["shards"]:
            path = folder / entry["file"]
            try:
                file, label = _open_shard(path, self.shape, entry["count"], index[SETTINGS_KEY])
                good = _known(path, label, model, skip_bad=skip_bad)
            except DataError as error:
                if not skip_bad:
                    raise
                self.skipped += entry["count"]
                self.left_out.append(f"all of a shard: {error}")
                continue
            if unknown := len(label) - len(good):
                self.skipped += unknown
                self.left_out.append(f"{path}: {unknown} rows of labels that the predictor lacks")
            paths.append(path)
            self._files.append(file)
            self._starts.append(start)
            rows.append(start + good)
            self._labels.append(label)
            start += len(label)
        means = [path for path, file in zip(paths, self._files, strict=True) if not _has_std(file)]
        if 0 < len(means) < len(paths):
            raise DataError(f"{means[0]} has no std, others have: give all shards a std, or none")
        known = torch.cat([torch.empty(0, dtype=torch.int64), *rows])
        broken, digests = _read_all(paths, skip_bad=skip_bad)
        at = [self._starts[shard] + row for shard, row in broken]
        self._rows = known[~torch.isin(known, torch.tensor(at, dtype=torch.int64))]
        self.skipped += len(known) - len(self._rows)
        self.left_out += [f"{paths[shard]}: row {row} is not finite" for shard, row in broken]
        if not len(self._rows):
            raise DataError(f"{folder} has no usable latents, at least 1 is needed")
        digest.update("".join(digests).encode() + self._rows.numpy().tobytes())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: Tensor) -> Latents:
        return Latents.cat([self._read(int(row)) for row in self._rows[rows]])

    def _read(self, row: int) -> Latents:
        shard = bisect.bisect_right(self._starts, row) - 1
        at, file = row - self._starts[shard], self._files[shard]
        names = ("mean", "std") if _has_std(file) else ("mean",)
        held = {name: file.get_slice(name)[at : at + 1].float() for name in names}
        return Latents(label=self._labels[shard][at : at + 1], **held)


def _has_std(file: Any) -> bool:
    return "std" in file.keys()  # noqa: SIM118


def is_sharded(folder: Path) -> bool:
    """Whether `folder` is a complete or unfinished folder of latents.

    Checks the content too: a data set of images may have other files with these names.
    """
    for name, key in ((INDEX, "shards"), (SETTINGS, "vae")):
        with suppress(TextFileError, OSError):
            if key in read_json(folder / name):
                return True
    return bool(shard_files(folder))


def shard_files(folder: Path) -> list[Path]:
    """The files in `folder` that have a shard's name, sorted."""
    return sorted(path for path in folder.glob("*.safetensors") if _SHARD.fullmatch(path.name))


def _whole(value: Any, smallest: int = 0) -> bool:
    return type(value) is int and value >= smallest  # not isinstance: a bool is an int too


# Required fields of an index: what is allowed, and a test of a value.
_FIELDS = {
    "latent_shape": (
        "[C, h, w]",
        lambda value: (
            isinstance(value, list) and len(value) == 3 and all(_whole(side, 1) for side in value)
        ),
    ),
    "vae": ("a digest", lambda value: isinstance(value, str)),
    SETTINGS_KEY: ("a digest", lambda value: isinstance(value, str)),
    "class_names": ("a list of names", lambda value: isinstance(value, list)),
    "shards": (
        "a list of objects with file and count",
        lambda value: (
            isinstance(value, list)
            and all(isinstance(each, dict) for each in value)
            and all(isinstance(each.get("file"), str) for each in value)
            and all(_whole(each.get("count")) for each in value)
        ),
    ),
}


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = read_json(path)
    except FileNotFoundError:
        raise DataError(
            f"{folder} has no {INDEX}: python -m training.latents writes it when all is encoded"
        ) from None
    for name, (allowed, fits) in _FIELDS.items():
        if not fits(index.get(name)):
            found = reprlib.repr(index[name]) if name in index else "none"
            raise DataError(f"{path}: {name} must be {allowed}, got {found}")
    return index


def _open_shard(
    path: Path, shape: tuple[int, int, int], count: int, settings: str
) -> tuple[Any, Tensor]:
    """The open file and its labels. Raises DataError for a file that does not fit the index."""
    try:
        file = safe_open(path, framework="pt")
        made_by = (file.metadata() or {}).get(SETTINGS_KEY)
        stated = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        dtypes = {file.get_slice(name).get_dtype() for name in stated if name != "label"}
        label = file.get_tensor("label") if "label" in stated else torch.empty(0)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}") from error
    tensors = {"mean": (count, *shape), "label": (count,)}
    if "std" in stated:
        tensors["std"] = tensors["mean"]
    if stated != tensors or label.dtype != torch.int64 or not dtypes <= _DTYPES:
        allowed, found = (", ".join(sorted(each)) for each in (_DTYPES, dtypes))
        raise DataError(
            f"{path} must have the tensors {tensors}, labels in int64, others in {allowed}; "
            f"got {stated}, {label.dtype}, {found}"
        )
    if made_by != settings:
        raise DataError(
            f"{path} was encoded with another VAE or other settings than {INDEX} says: encode again"
        )
    return file, label


def _read_all(
    paths: Sequence[Path], *, skip_bad: bool
) -> tuple[Sequence[tuple[int, int]], Sequence[str]]:
    """Shard and row of each latent that is not finite, and the digest of each shard.

    All processes share the work, with one shard in memory at a time. Raises DataError for latents
    that are not finite, unless `skip_bad`.
    """
    share = local_rows(torch.arange(len(paths))).tolist()
    quiet = not processes().is_main_process
    bad, digests = [], []
    for shard in tqdm(share, "check", unit="shard", delay=2, disable=quiet):
        with safe_open(paths[shard], framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        digests.append((shard, digest_of(tensors)))
        good = finite(*(tensor for name, tensor in tensors.items() if name != "label"))
        bad += [(shard, row) for row in (~good).nonzero()[:, 0].tolist()]
    bad, digests = sorted(gather_object(bad)), sorted(gather_object(digests))
    if bad and not skip_bad:
        shard, row = bad[0]
        raise DataError(
            f"{paths[shard]}: the latents of row {row} are not finite "
            f"({len(bad)} such rows; --skip-bad leaves them out)"
        )
    return bad, [digest for _, digest in digests]


def _known(path: Path, label: Tensor, model: SiTConfig | None, *, skip_bad: bool) -> Tensor:
    """Rows with a label that the model knows. Raises DataError for others unless `skip_bad`."""
    if model is None:
        return torch.arange(len(label))
    good = (label >= 0) & (label < model.num_classes)
    if not good.all() and not skip_bad:
        raise DataError(
            f"{path}: labels must be 0 to {model.num_classes - 1}, the predictor's classes; "
            f"got {int(label[~good][0])}"
        )
    return good.nonzero()[:, 0]


def check_shape(path: Path, shape: tuple[int, ...], model: SiTConfig) -> None:
    """Raises DataError unless `shape` is the shape of the model's latents."""
    expected = model.latent_shape
    if tuple(shape) != expected:
        raise DataError(f"{path}: latents must be {expected} for this predictor, got {shape}")
