"""A small network with six heads: it reads the layout, signs, colours and ground of an image."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import judging
from training.loop import fit
from training.plan import TrainingConfig
from training.scenes.grammar import COLOUR_NAMES, LAYOUTS, SIGNS, Scene

NONE = "none"  # there is no second sign
# What each head reads, and its answers. The first sign is the left or upper one.
HEADS: dict[str, tuple[str, ...]] = {
    "layout": LAYOUTS,
    "first sign": SIGNS,
    "first colour": COLOUR_NAMES,
    "second sign": (*SIGNS, NONE),
    "second colour": (*COLOUR_NAMES, NONE),
    "ground": COLOUR_NAMES,
}
_SIZES = [len(answers) for answers in HEADS.values()]


def build() -> nn.Sequential:
    """Images [B, 3, 64, 64] in [-1, 1] to the logits of all heads, side by side."""
    return judging.build(sum(_SIZES))


def answers_of(scenes: Sequence[Scene]) -> np.ndarray:
    """The right answer of every head, [n, 6] int64, as an index into HEADS."""
    found = []
    for scene in scenes:
        first, *others = scene.signs
        second = (others[0].sign, others[0].colour) if others else (NONE, NONE)
        named = (scene.layout, first.sign, first.colour, *second, scene.ground)
        pairs = zip(HEADS.values(), named, strict=True)
        found.append([head.index(name) for head, name in pairs])
    return np.array(found, dtype=np.int64)


def train(
    images: np.ndarray,
    scenes: Sequence[Scene],
    plan: TrainingConfig,
    folder: Path,
    identity: Mapping[str, str],
) -> nn.Sequential:
    """Fits the judge to `images` [N, 64, 64, 3] uint8 of `scenes`. `identity` identifies both."""
    torch.manual_seed(plan.seed)
    answers = answers_of(scenes)

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = np.sort(torch.randint(len(images), (plan.batch,), generator=generator).numpy())
        pixels = judging.noisy(images[rows], generator)
        target = torch.from_numpy(answers[rows]).to(pixels.device)
        heads = model(pixels).float().split(_SIZES, dim=1)
        losses = [F.cross_entropy(h, target[:, k]) for k, h in enumerate(heads)]
        return torch.stack(losses).sum()

    trained = fit("judge", build(), loss_of, plan, folder, identity=identity)
    assert isinstance(trained, nn.Sequential)
    return trained


def readings(outputs: np.ndarray) -> np.ndarray:
    """The answer of every head, [n, 6] int64, from the judge's `outputs` [n, K].

    A softmax over all outputs changes none of them.
    """
    heads = np.split(outputs, np.cumsum(_SIZES)[:-1], axis=1)
    return np.stack([head.argmax(1) for head in heads], axis=1)
