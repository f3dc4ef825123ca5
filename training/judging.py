"""Small convolutional networks that judge images of 64 x 64 pixels, and their features."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from training.data import to_unit
from training.frechet import Reference, Statistics
from training.loop import device

SPATIAL_CHANNELS = 7  # as in ADM's evaluator for sFID
REFERENCE_IMAGES = 10_000  # real images for the statistics of features
_REFERENCE_ROWS = 5_000  # of these, images whose features themselves are kept
_THIRD, _LAST = 9, 12  # number of layers up to the activation of the third and last convolution
_BATCH = 256


def build(outputs: int) -> nn.Sequential:
    """Images [B, 3, 64, 64] in [-1, 1] to logits [B, outputs]."""
    layers: list[nn.Module] = []
    for read, write in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(read, write, 3, stride=2, padding=1), nn.GroupNorm(8, write)]
        layers += [nn.SiLU()]
    layers += [nn.Flatten(), nn.Dropout(0.2), nn.Linear(128 * 16, outputs)]
    return nn.Sequential(*layers)


def noisy(images: np.ndarray, generator: torch.Generator) -> torch.Tensor:
    """`images` [B, H, W, 3] uint8 as the networks read them, with a little noise for training.

    With noise the texture of the VAE's decoder does not affect the judgement.
    """
    pixels = to_unit(images)
    return pixels + 0.1 * torch.randn(pixels.shape, generator=generator).to(pixels.device)


@dataclass(frozen=True)
class Features:
    """A network's features of N images, float32, for FID, sFID and Inception Score.

    - `pooled` [N, D]: channels of the last convolution, averaged over the image.
    - `spatial` [N, S]: the first SPATIAL_CHANNELS channels of a middle convolution at every pixel,
      channels last.
    - `probability` [N, K]: class probabilities, if the outputs are classes.
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
    """Features of `images` [N, 64, 64, 3] uint8 by a network of `build`.

    There are 128 pooled and 448 spatial ones.
    """
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


def reference(judge: nn.Sequential, images: np.ndarray) -> Reference:
    """Statistics of the judge's features of real `images` [N, 64, 64, 3] uint8."""
    seen = extract_features(judge, images)
    pooled, spatial = Statistics.of(seen.pooled), Statistics.of(seen.spatial)
    return Reference(pooled, spatial, seen.pooled[:_REFERENCE_ROWS])
