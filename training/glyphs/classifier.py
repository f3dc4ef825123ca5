"""A small classifier of glyphs: it judges whether an image shows the requested class."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import judging
from training.glyphs.pictures import CLASS_NAMES, label_of
from training.loop import fit
from training.plan import TrainingConfig


def build() -> nn.Sequential:
    """Images [B, 3, 64, 64] in [-1, 1] to class logits [B, 36]."""
    return judging.build(len(CLASS_NAMES))


def train(
    images: np.ndarray, plan: TrainingConfig, folder: Path, identity: Mapping[str, str]
) -> nn.Sequential:
    """Fits the classifier to `images` [N, 64, 64, 3] uint8. The index of an image gives its class.

    `identity` identifies the images.
    """
    torch.manual_seed(plan.seed)

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = np.sort(torch.randint(len(images), (plan.batch,), generator=generator).numpy())
        pixels = judging.noisy(images[rows], generator)
        target = torch.from_numpy(label_of(rows)).to(pixels.device)
        return F.cross_entropy(model(pixels).float(), target)

    trained = fit("classifier", build(), loss_of, plan, folder, identity=identity)
    assert isinstance(trained, nn.Sequential)
    return trained
