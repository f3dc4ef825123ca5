"""Loads SiT networks from checkpoints: the tensor shapes give the architecture."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowturbo.nets.sit import SiT, SiTConfig
from flowturbo.nets.weights import Checkpoint, CheckpointError, load_checkpoint, load_exactly

# Width to number of heads in the public configurations: S, B, L, XL.
KNOWN_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
_PATCHES = "x_embedder.proj.weight"
_LABEL_TABLE = "y_embedder.embedding_table.weight"
_TRAINING_ONLY = "projectors."  # tensors of REPA (arXiv 2410.06940) that no sampler reads
# Training arguments that say what a network predicts, and the allowed values.
_CONVENTIONS = {"path_type": ("linear",), "prediction": ("velocity", "v")}
_LEFT_OUT = ("class_dropout_prob", "cfg_prob")  # the share of labels that training left out
_CLEAR = 0.3  # a cosine beyond this shows the direction of time
_NEAR_NOISE = 0.95
_NEARER = 0.02
_LAST_DIFFUSION_STEP = 999.0  # of DiT's 1000
_logger = logging.getLogger(__name__)


def infer_config(
    checkpoint: Checkpoint,
    *,
    reads_velocity: bool,
    num_heads: int | None = None,
    num_classes: int | None = None,
    known_heads: Mapping[int, int] = KNOWN_HEADS,
) -> SiTConfig:
    """The architecture of `checkpoint`, a refiner if it `reads_velocity`, else a predictor.

    Shapes do not show the number of heads. It is `num_heads`, else the file's metadata, else
    `known_heads` of the width. The number of classes is the file's own statement, else
    `num_classes`. If neither is there, the last row of the label table is the null class, as in the
    public checkpoints. There is no null class if the file says that training left no label out.
    Raises CheckpointError.
    """
    patch = _shape(checkpoint, _PATCHES, 4)
    tokens = _shape(checkpoint, "pos_embed", 3)[1]
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
    classes, null_class = _classes(checkpoint, num_classes)
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
        null_class=null_class,
    )


def _classes(checkpoint: Checkpoint, given: int | None) -> tuple[int, bool]:
    """The number of classes, and whether the label table has one more row: the null class."""
    rows = _shape(checkpoint, _LABEL_TABLE, 2)[0]
    stated = checkpoint.integers("num_classes")
    fitting = _fitting(stated, rows)
    if given and fitting and given not in fitting:
        raise CheckpointError(
            f"{checkpoint.path} states {fitting[0]} classes, --num-classes says {given}: omit "
            "--num-classes"
        )
    if not given and len(fitting) > 1:
        raise CheckpointError(
            f"{checkpoint.path} has a label table of {rows} rows and states both {fitting[0]} and "
            f"{fitting[1]} classes: choose one with --num-classes"
        )
    source = "--num-classes says" if given else "the file states"
    classes = given or [*fitting, *stated, _unstated_classes(checkpoint, rows)][0]
    if not classes:
        raise CheckpointError(
            f"{checkpoint.path} has a label table of 1 row and does not state the number of "
            "classes: give --num-classes 1"
        )
    if rows not in (classes, classes + 1):
        raise CheckpointError(
            f"{checkpoint.path} has a label table of {rows} rows, {source} {classes} classes: "
            f"{classes} rows are needed, or {classes + 1} with the null class of guidance"
        )
    if given and stated and not fitting:
        _logger.warning(
            "%s states %d classes, which does not fit its label table of %d rows: using the given "
            "%d classes",
            checkpoint.path,
            stated[0],
            rows,
            given,
        )
    return classes, rows > classes


def _fitting(stated: list[int], rows: int) -> list[int]:
    """The stated numbers of classes that a label table of `rows` rows can have."""
    return [classes for classes in stated if rows in (classes, classes + 1)]


def _unstated_classes(checkpoint: Checkpoint, rows: int) -> int:
    """All rows if training left no label out, else all but the null class."""
    dropped = [share for name in _LEFT_OUT for share in checkpoint.stated(name)]
    return rows if dropped and not any(map(_above_0, dropped)) else rows - 1


def _above_0(value: Any) -> bool:
    try:
        return float(value) > 0
    except ValueError:
        return True


def _latent_channels(
    checkpoint: Checkpoint, in_channels: int, out_channels: int, reads_velocity: bool
) -> int:
    """C: a predictor reads C channels, a refiner reads 2C; both write C or 2C."""
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
    stated = [] if given else checkpoint.integers("num_heads")
    heads = given or (stated[0] if len(stated) == 1 else 0) or (0 if stated else known)
    if heads <= 0:
        option = "--refiner-num-heads (training: --heads)" if reads_velocity else "--num-heads"
        raise CheckpointError(
            f"{checkpoint.path}: the number of heads at width {width} is not known"
            f"{' (stated: ' + ', '.join(map(str, stated)) + ')' if stated else ''}, "
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


def load_predictor(
    path: Path,
    weights: str | None = None,
    num_heads: int | None = None,
    *,
    num_classes: int | None = None,
    reverse_time: bool = False,
) -> SiT:
    """The predictor in `path`. A `.pt` with both kinds of weights gives the averaged ones, as SiT.

    `reverse_time` is for networks that predict noise - data with noise at t = 1 (REPA's).
    `check_convention` compares the network's output with its convention. Raises CheckpointError.
    """
    checkpoint = _without_prefix(load_checkpoint(path, weights, usual="ema"))
    _check_arguments(checkpoint)
    network = build_network(
        checkpoint, reads_velocity=False, num_heads=num_heads, num_classes=num_classes
    )
    if reverse_time:
        network.config = replace(network.config, reverse_time=True)
    check_convention(network, Path(path))
    return network


def load_refiner(
    path: Path, predictor: SiTConfig, weights: str | None = None, num_heads: int | None = None
) -> SiT:
    """The refiner in `path`. A `.pt` with both kinds of weights gives the last, as FlowTurbo.

    A refiner of the predictor's width has the predictor's heads by default. Raises CheckpointError,
    also if its latent size or classes differ from the predictor's.
    """
    checkpoint = _without_prefix(load_checkpoint(path, weights, usual="model"))
    classes, rows = predictor.num_classes, _shape(checkpoint, _LABEL_TABLE, 2)[0]
    stated = _fitting(checkpoint.integers("num_classes"), rows) or [classes]
    the_same = classes in _fitting(stated, rows)
    network = build_network(
        checkpoint,
        reads_velocity=True,
        num_heads=num_heads,
        num_classes=classes if the_same else None,
        known_heads={**KNOWN_HEADS, predictor.width: predictor.num_heads},
    )
    for key in ("latent_channels", "latent_size", "num_classes"):
        got, want = getattr(network.config, key), getattr(predictor, key)
        if got != want:
            raise CheckpointError(f"the refiner has {key} {got}, the predictor has {want}")
    if predictor.null_class and not network.config.null_class:
        raise CheckpointError(
            f"{path} has no row for the null class, but the predictor has one: guidance evaluates "
            "both without a class, so the refiner needs one too"
        )
    return network


def _without_prefix(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` without a prefix that all its tensor names share.

    Raises CheckpointError if other tensors are beside those with the prefix.
    """
    names = checkpoint.tensors
    prefixes = [name.removesuffix(_PATCHES) for name in names if name.endswith(f".{_PATCHES}")]
    if _PATCHES in names or not prefixes:
        return checkpoint
    if others := [name for name in names if not name.startswith(prefixes[0])]:
        several = ", ".join(repr(prefix) for prefix in prefixes)
        raise CheckpointError(
            f"{checkpoint.path} has a network under {several} and other tensors beside it, such as "
            f"{others[0]!r}: save only the tensors of the network, without the prefix "
            f"{prefixes[0]!r}, to a new file"
        )
    tensors = {name.removeprefix(prefixes[0]): tensor for name, tensor in names.items()}
    return replace(checkpoint, tensors=tensors)


def build_network(
    checkpoint: Checkpoint,
    *,
    reads_velocity: bool,
    num_heads: int | None = None,
    num_classes: int | None = None,
    known_heads: Mapping[int, int] = KNOWN_HEADS,
) -> SiT:
    """The network of `checkpoint` in float32, for evaluation (arguments as in `infer_config`).

    Raises CheckpointError, which names the first tensor that is missing, unknown or of another
    shape.
    """
    config = infer_config(
        checkpoint,
        reads_velocity=reads_velocity,
        num_heads=num_heads,
        num_classes=num_classes,
        known_heads=known_heads,
    )
    # The time embedder's frequencies are a buffer outside the state dict: computed, not loaded.
    network = SiT(config)
    tensors = checkpoint.tensors
    load_exactly(
        network,
        {key: value for key, value in tensors.items() if not key.startswith(_TRAINING_ONLY)},
        checkpoint.path,
    )
    return network.eval().requires_grad_(False)


def _check_arguments(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if the network does not predict the velocity of a linear path."""
    for model in checkpoint.stated("model"):
        if str(model).lower().startswith("dit"):
            raise CheckpointError(
                f"{checkpoint.path} was trained as {model}: a DiT predicts the noise of a "
                "diffusion process, but a network that predicts the velocity of a flow is needed"
            )
    for name, allowed in _CONVENTIONS.items():
        for stated in checkpoint.stated(name):
            if str(stated).lower() not in allowed:
                raise CheckpointError(
                    f"{checkpoint.path} was trained with {name} {stated!r}, which is not "
                    f"supported: allowed is {' or '.join(allowed)}"
                )


@torch.no_grad()
def check_convention(network: SiT, path: Path) -> None:
    """Checks the predictor's output for noise against that of a velocity.

    At t = 0 the state x is noise. With v(x, 0) = data - noise the cosine between v and -x is near
    1. A cosine below -0.3 means that time runs the other way. A cosine in between is logged. An
    untrained network, which outputs 0 everywhere, gives no verdict. Raises CheckpointError if time
    runs the other way. Raises it too if the network predicts the noise itself: a DiT at t = 999,
    others at t = 0.
    """
    config, count = network.config, 4
    shape = config.latent_shape
    x = torch.randn((count, *shape), generator=torch.Generator().manual_seed(0))
    label = torch.arange(count) % config.num_classes

    def cosine(t: float, direction: Tensor) -> float:
        answer = network(x, torch.full((count,), t), label).flatten(1).double()
        if not answer.isfinite().all():
            raise CheckpointError(f"{path}: the output for noise has values that are not finite")
        return float(F.cosine_similarity(answer, direction.flatten(1)).mean())

    def as_in_training(t: float) -> float:
        return cosine(1 - t, -x) if config.reverse_time else cosine(t, x)

    noise = as_in_training(_LAST_DIFFUSION_STEP)
    # Velocity networks reach a cosine of at most 0.86 there, and no higher one than at t = 1.
    if noise > _NEAR_NOISE and noise > as_in_training(1.0) + _NEARER:
        raise CheckpointError(
            f"{path} predicts the noise itself at t = 999, as a DiT does (the noise of a diffusion "
            "process): a network that predicts the velocity of a flow is needed"
        )
    found = cosine(0.0, -x)
    at_0 = as_in_training(0.0)
    # REPA's networks predict noise - data, which is nearest to the noise at their t = 1.
    if at_0 > max(_CLEAR, as_in_training(1.0) + _NEARER):
        raise CheckpointError(
            f"{path} predicts the noise itself at t = 0 (cosine {at_0:.3f}), as a network trained "
            "with --prediction noise does: one that predicts the velocity of a flow is needed"
        )
    if found < -_CLEAR:
        remedy = "omit --reverse-time" if config.reverse_time else "give --reverse-time"
        raise CheckpointError(
            f"{path}: time runs the other way: the cosine between v(noise, t=0) and -noise is "
            f"{found:.3f}, near 1 is expected; {remedy}"
        )
    if 0 < abs(found) <= _CLEAR:
        _logger.warning(
            "%s: the cosine between v(noise, t=0) and -noise is %.3f, near 1 is expected of a "
            "trained velocity network",
            path,
            found,
        )
