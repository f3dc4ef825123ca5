"""The velocity predictor: flow matching with a linear path and a SiT."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from flowturbo.nets.sit import SiT, SiTConfig
from training.data import Latents
from training.flow_matching import dropped, logit_normal, loss, uniform
from training.loop import LossOf, digest_of, fit
from training.plan import TrainingConfig


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


# Training phases in order: the name of the plan, and how times are drawn. Logit-normal times alone
# hardly train the first steps from noise, and these steps decide the class.
PHASES = (("predictor", logit_normal), ("predictor_uniform", uniform))


def train(
    data: Latents,
    num_classes: int,
    plans: dict[str, TrainingConfig],
    folder: Path,
    identity: Mapping[str, str],
) -> SiT:
    """Fits a SiT to the means of `data` in two phases. `identity` identifies the data."""
    torch.manual_seed(plans["predictor"].seed)
    model = SiT(config(num_classes))
    model.initialize()
    for name, draw_times in PHASES:
        loss_of = _loss(data.mean, data.label, num_classes, plans[name].batch, draw_times)
        trained = fit(name, model, loss_of, plans[name], folder, identity=identity)
        model.load_state_dict(trained.state_dict())
        identity = {**identity, "start": digest_of(model.state_dict())}
    return model.eval().requires_grad_(False)


def _loss(
    latents: Tensor,
    labels: Tensor,
    null: int,
    batch: int,
    draw_times: Callable[[int, torch.Generator], Tensor],
) -> LossOf:
    def loss_of(network: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator)
        data = latents[rows]
        label = torch.where(dropped(batch, generator), null, labels[rows])
        noise = torch.randn(data.shape, generator=generator)
        t = draw_times(batch, generator)
        return loss(network, data, noise, t, label)

    return loss_of
