"""Checkpoints to networks: the architecture is read off the tensor shapes."""

import argparse
import hashlib
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowturbo.errors import FlowTurboError
from flowturbo.nets.sit import SiT, SiTConfig

# Width to heads of the public configurations: S, B, L, XL.
KNOWN_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
WEIGHTS_KEYS = ("model", "ema")


class CheckpointError(FlowTurboError):
    """A checkpoint cannot be read, or does not fit the architecture."""


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors by name, and its text metadata (safetensors only)."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def load_checkpoint(
    path: str | Path, weights: str | None = None, *, usual: str = "model"
) -> Checkpoint:
    """Reads a `.pt` or `.safetensors` file.

    `weights` says which weights of a `.pt` with several, "model" or "ema"; without it they are the
    `usual` ones, if it has them. Raises CheckpointError.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if weights not in (None, *WEIGHTS_KEYS):
        raise CheckpointError(f"weights must be model or ema, got {weights!r}")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    return Checkpoint(path, _choose(path, _load_pt(path), weights, usual), {})


def _load_pt(path: Path) -> Any:
    try:
        # The public training script keeps its command line beside the weights: a plain namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            mmap = zipfile.is_zipfile(path)  # files from before torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # the unpickler raises whatever the bytes make it do
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is not a checkpoint of plain tensors: {reason}") from error


def _load_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return Checkpoint(path, _without_wrappers(tensors), file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def _choose(path: Path, content: Any, weights: str | None, usual: str) -> Mapping[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not named tensors")
    nested = [key for key in WEIGHTS_KEYS if isinstance(content.get(key), Mapping)]
    if nested:
        key = weights or (usual if usual in nested else nested[0])
        if key not in nested:
            raise CheckpointError(f"{path} has no {key!r} weights, it has {', '.join(nested)}")
        content = content[key]
    elif weights == "ema":
        raise CheckpointError(f"{path} holds one set of weights and no 'ema'")
    bad = [k for k, v in content.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if bad or not content:
        found = f"{bad[0]!r} is no named tensor" if bad else "it is empty"
        raise CheckpointError(f"{path} is not a state dict: {found}")
    return _without_wrappers(content)


def _without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as the network has them: without those that DDP and torch.compile put in front."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): each for key, each in tensors.items()}


def infer_config(
    checkpoint: Checkpoint,
    *,
    reads_velocity: bool,
    num_heads: int | None = None,
    known_heads: Mapping[int, int] = KNOWN_HEADS,
) -> SiTConfig:
    """The architecture of `checkpoint`, a refiner if it `reads_velocity`, else a predictor.

    Heads leave no trace in the shapes: they are given, or come from the file's metadata, or are
    `known_heads` of the width. Raises CheckpointError.
    """
    patch = _shape(checkpoint, "x_embedder.proj.weight", 4)
    tokens = _shape(checkpoint, "pos_embed", 3)[1]
    classes = _shape(checkpoint, "y_embedder.embedding_table.weight", 2)[0] - 1
    final = _shape(checkpoint, "final_layer.linear.weight", 2)[0]
    hidden = _shape(checkpoint, "blocks.0.mlp.fc1.weight", 2)[0]
    width, in_channels, patch_size, _ = patch
    side = math.isqrt(tokens)
    out_channels = final // patch_size**2
    if side * side != tokens or out_channels * patch_size**2 != final:
        raise CheckpointError(
            f"{checkpoint.path}: pos_embed has {tokens} tokens (a square is needed), "
            f"final_layer.linear.weight {final} rows (a multiple of {patch_size**2} is needed)"
        )
    blocks = (re.match(r"blocks\.(\d+)\.", key) for key in checkpoint.tensors)
    depth = 1 + max(int(block[1]) for block in blocks if block)
    return SiTConfig(
        latent_size=side * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        latent_channels=_latent_channels(checkpoint, in_channels, out_channels, reads_velocity),
        out_channels=out_channels,
        width=width,
        depth=depth,
        num_heads=_heads(checkpoint, num_heads, known_heads.get(width, 0), width, reads_velocity),
        num_classes=classes,
        mlp_ratio=hidden / width,
    )


def _latent_channels(
    checkpoint: Checkpoint, in_channels: int, out_channels: int, reads_velocity: bool
) -> int:
    """C: all that a predictor reads, half of what a refiner reads; it writes C or 2C."""
    latent = in_channels // 2 if reads_velocity else in_channels
    if out_channels not in (latent, 2 * latent) or reads_velocity and in_channels % 2:
        role, fits = (
            ("refiner", "2C to C or 2C") if reads_velocity else ("predictor", "C to C or 2C")
        )
        raise CheckpointError(
            f"{checkpoint.path}: {in_channels} channels in and {out_channels} out do not fit a "
            f"{role} ({fits}); are predictor and refiner swapped?"
        )
    return latent


def _heads(
    checkpoint: Checkpoint, given: int | None, known: int, width: int, reads_velocity: bool
) -> int:
    stated = checkpoint.metadata.get("num_heads", "")
    heads = given or (int(stated) if stated.isdecimal() else known)
    if heads <= 0:
        option = "--refiner-num-heads (training: --heads)" if reads_velocity else "--num-heads"
        raise CheckpointError(
            f"{checkpoint.path}: the number of heads at width {width} is not known, "
            f"give it with {option}"
        )
    if width % heads:
        raise CheckpointError(f"num_heads {heads} does not divide the width {width}")
    return heads


def _shape(checkpoint: Checkpoint, key: str, dims: int) -> tuple[int, ...]:
    tensor = checkpoint.tensors.get(key)
    if tensor is None:
        raise CheckpointError(f"{checkpoint.path} has no tensor {key!r}: it is not a SiT")
    if tensor.ndim != dims:
        raise CheckpointError(
            f"{checkpoint.path}: {key} must have {dims} dimensions, got {tuple(tensor.shape)}"
        )
    return tuple(tensor.shape)


def load_predictor(path: Path, weights: str | None = None, num_heads: int | None = None) -> SiT:
    """The predictor in `path`; of a `.pt` that holds both, the averaged weights, as SiT takes them.

    Raises CheckpointError.
    """
    checkpoint = load_checkpoint(path, weights, usual="ema")
    return build_network(checkpoint, reads_velocity=False, num_heads=num_heads)


def load_refiner(
    path: Path, predictor: SiTConfig, weights: str | None = None, num_heads: int | None = None
) -> SiT:
    """The refiner in `path`; of a `.pt` that holds both, the last weights, as FlowTurbo takes them.

    One as wide as the `predictor` has its heads, if nothing else is said. Raises CheckpointError
    also for another latent size or other classes than the predictor's.
    """
    network = build_network(
        load_checkpoint(path, weights, usual="model"),
        reads_velocity=True,
        num_heads=num_heads,
        known_heads={**KNOWN_HEADS, predictor.width: predictor.num_heads},
    )
    for key in ("latent_channels", "latent_size", "num_classes"):
        got, want = getattr(network.config, key), getattr(predictor, key)
        if got != want:
            raise CheckpointError(f"the refiner has {key} {got}, the predictor {want}")
    return network


def build_network(
    checkpoint: Checkpoint,
    *,
    reads_velocity: bool,
    num_heads: int | None = None,
    known_heads: Mapping[int, int] = KNOWN_HEADS,
) -> SiT:
    """The network of `checkpoint` in float32, for evaluation (arguments as `infer_config`).

    Raises CheckpointError naming the first tensor that is missing, unknown or of another shape.
    """
    config = infer_config(
        checkpoint, reads_velocity=reads_velocity, num_heads=num_heads, known_heads=known_heads
    )
    with torch.device("meta"):
        model = SiT(config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, shape in expected.items():
        if key not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path} has no tensor {key!r} of shape {shape}")
        got = tuple(checkpoint.tensors[key].shape)
        if got != shape:
            raise CheckpointError(f"{checkpoint.path}: {key} must have shape {shape}, got {got}")
    unknown = sorted(checkpoint.tensors.keys() - expected.keys())
    if unknown:
        raise CheckpointError(f"{checkpoint.path} has an unknown tensor {unknown[0]!r}")
    weights = {key: value.float() for key, value in checkpoint.tensors.items()}
    # The time embedder's frequencies are a buffer outside the state dict: made, not loaded.
    network = SiT(config)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def sha256(path: Path) -> str:
    """Digest of a file, or of the names and contents of a folder's files."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if path.is_dir():
            digest.update(file.name.encode())
        with file.open("rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
