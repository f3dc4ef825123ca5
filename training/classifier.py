"""A small classifier of glyphs: the judge of whether an image shows the class asked for."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data import to_unit
from training.glyphs import CLASS_NAMES, label_of
from training.loop import device, fit
from training.plan import Plan


def build() -> nn.Sequential:
    """Images [B, 3, 64, 64] in [-1, 1] to class logits [B, 36]."""
    layers: list[nn.Module] = []
    for read, write in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(read, write, 3, stride=2, padding=1), nn.GroupNorm(8, write)]
        layers += [nn.SiLU()]
    layers += [nn.Flatten(), nn.Dropout(0.2), nn.Linear(128 * 16, len(CLASS_NAMES))]
    return nn.Sequential(*layers)


def train(images: np.ndarray, plan: Plan, folder: Path) -> nn.Sequential:
    """Fits the classifier to `images` [N, 64, 64, 3] uint8, whose class follows from the index."""
    torch.manual_seed(plan.seed)

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = np.sort(torch.randint(len(images), (plan.batch,), generator=generator).numpy())
        pixels = to_unit(images[rows])
        # A little noise keeps it from reading anything into the decoder's own texture.
        pixels = pixels + 0.1 * torch.randn(pixels.shape, generator=generator).to(pixels.device)
        target = torch.from_numpy(label_of(rows)).to(pixels.device)
        return F.cross_entropy(model(pixels).float(), target)

    trained = fit("classifier", build(), loss_of, plan, folder)
    assert isinstance(trained, nn.Sequential)
    return trained


def recognise(model: nn.Sequential, images: np.ndarray) -> np.ndarray:
    """Class ids [N] that the classifier reads in `images` [N, 64, 64, 3] uint8."""
    return _evaluate(model, images).argmax(1)


def features(model: nn.Sequential, images: np.ndarray) -> np.ndarray:
    """Channels of the last convolution averaged over the image, [N, 128], as FID takes them."""
    return _evaluate(model[:-3], images).mean((2, 3))


@torch.no_grad()
def _evaluate(model: nn.Module, images: np.ndarray) -> np.ndarray:
    model = model.to(device()).eval()
    parts = [
        model(to_unit(images[start : start + 256])).cpu() for start in range(0, len(images), 256)
    ]
    return torch.cat(parts).numpy()
