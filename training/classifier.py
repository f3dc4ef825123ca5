"""A small classifier of glyphs: it judges whether an image shows the requested class."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data import to_unit
from training.glyphs import CLASS_NAMES, label_of
from training.loop import device, fit
from training.plan import TrainingConfig

SPATIAL_CHANNELS = 7  # as in ADM's evaluator for sFID
_THIRD, _LAST = 9, 12  # number of layers up to the activation of the third and last convolution
_BATCH = 256


def build() -> nn.Sequential:
    """Images [B, 3, 64, 64] in [-1, 1] to class logits [B, 36]."""
    layers: list[nn.Module] = []
    for read, write in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(read, write, 3, stride=2, padding=1), nn.GroupNorm(8, write)]
        layers += [nn.SiLU()]
    layers += [nn.Flatten(), nn.Dropout(0.2), nn.Linear(128 * 16, len(CLASS_NAMES))]
    return nn.Sequential(*layers)


def train(
    images: np.ndarray, plan: TrainingConfig, folder: Path, identity: Mapping[str, str]
) -> nn.Sequential:
    """Fits the classifier to `images` [N, 64, 64, 3] uint8. The index of an image gives its class.

    `identity` identifies the images.
    """
    torch.manual_seed(plan.seed)

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = np.sort(torch.randint(len(images), (plan.batch,), generator=generator).numpy())
        pixels = to_unit(images[rows])
        # A little noise, so that the texture of the VAE decoder does not affect the classifier.
        pixels = pixels + 0.1 * torch.randn(pixels.shape, generator=generator).to(pixels.device)
        target = torch.from_numpy(label_of(rows)).to(pixels.device)
        return F.cross_entropy(model(pixels).float(), target)

    trained = fit("classifier", build(), loss_of, plan, folder, identity=identity)
    assert isinstance(trained, nn.Sequential)
    return trained


@dataclass(frozen=True)
class Features:
    """A network's features of N images, float32, for FID, sFID and Inception Score.

    - `pooled` [N, D]: channels of the last convolution, averaged over the image.
    - `spatial` [N, S]: the first SPATIAL_CHANNELS channels of a middle convolution at every pixel,
      channels last.
    - `probability` [N, K]: class probabilities.
    """

    pooled: np.ndarray
    spatial: np.ndarray
    probability: np.ndarray

    @classmethod
    def join(cls, parts: Iterable["Features"]) -> "Features":
        """The features of all images of `parts`."""
        rows = ((part.pooled, part.spatial, part.probability) for part in parts)
        return cls(*(np.concatenate(of_kind) for of_kind in zip(*rows, strict=True)))


def extract_features(model: nn.Sequential, images: np.ndarray) -> Features:
    """The classifier's features of `images` [N, 64, 64, 3] uint8: 128 pooled, 448 spatial."""
    model = model.to(device()).eval()
    return Features.join(
        _look(model, images[k : k + _BATCH]) for k in range(0, len(images), _BATCH)
    )


@torch.no_grad()
def _look(model: nn.Sequential, images: np.ndarray) -> Features:
    maps = model[:_THIRD](to_unit(images))
    last = model[_THIRD:_LAST](maps)
    spatial = maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
    found = last.mean((2, 3)), spatial, model[_LAST:](last).softmax(1)
    return Features(*(tensor.cpu().numpy() for tensor in found))
