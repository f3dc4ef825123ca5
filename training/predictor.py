"""The velocity predictor: flow matching with a linear path and a SiT."""

from pathlib import Path

import torch
from torch import Tensor, nn

from flowturbo.nets.sit import SiT, SiTConfig
from training.loop import Plan, device, fit

NULL_LABEL_PROBABILITY = 0.1


def config(num_classes: int) -> SiTConfig:
    """The glyphs predictor: 4.2M parameters on 4 x 16 x 16 latents."""
    return SiTConfig(
        latent_size=16,
        patch_size=2,
        in_channels=4,
        latent_channels=4,
        out_channels=4,
        width=192,
        depth=6,
        num_heads=6,
        num_classes=num_classes,
    )


def draw_null(label: Tensor, null: int, generator: torch.Generator) -> Tensor:
    """`label` [B] with a tenth of it replaced by the null label, for guidance."""
    dropped = torch.rand(label.shape, generator=generator) < NULL_LABEL_PROBABILITY
    return torch.where(dropped, null, label)


def train(latents: Tensor, labels: Tensor, num_classes: int, plan: Plan, folder: Path) -> SiT:
    """Fits a SiT to `latents` [N, C, h, w] with class ids `labels` [N]."""
    torch.manual_seed(plan.seed)
    model = SiT(config(num_classes))
    model.initialize()

    def loss_of(network: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (plan.batch,), generator=generator)
        data, label = latents[rows], draw_null(labels[rows], num_classes, generator)
        noise = torch.randn(data.shape, generator=generator)
        # Logit-normal times: most of the difficulty lies between the ends.
        t = torch.sigmoid(torch.randn(plan.batch, generator=generator))
        at = t[:, None, None, None]
        x, velocity = (1 - at) * noise + at * data, data - noise
        x, velocity, t, label = (a.to(device()) for a in (x, velocity, t, label))
        with torch.autocast(x.device.type, torch.bfloat16):
            predicted = network(x, t, label)
        return (predicted.float() - velocity).square().mean()

    trained = fit("predictor", model, loss_of, plan, folder)
    assert isinstance(trained, SiT)
    return trained
