"""The velocity refiner: one transformer block that regresses the change of the velocity."""

from pathlib import Path

import torch
from torch import Tensor, nn

from flowturbo.generate import LARGEST_TRAINED_STEP
from flowturbo.nets.sit import SiT, refiner_config
from training.loop import Plan, device, fit
from training.predictor import draw_null


def train(latents: Tensor, labels: Tensor, predictor: SiT, plan: Plan, folder: Path) -> SiT:
    """Fits a refiner to `predictor` on `latents` [N, C, h, w] with class ids `labels` [N].

    FlowTurbo, section 3.2: with v = predictor(x_t, t), an Euler step of size dt leads to x_{t+dt},
    and the refiner reads [x_{t+dt}, v] at t + dt and learns predictor(x_{t+dt}, t + dt) - v. Both
    networks see the same label, null for a tenth of the rows.
    """
    torch.manual_seed(plan.seed)
    predictor = predictor.to(device()).eval()
    model = SiT(refiner_config(predictor.config))
    model.initialize()
    null = predictor.config.num_classes

    def loss_of(network: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (plan.batch,), generator=generator)
        data, label = latents[rows], draw_null(labels[rows], null, generator)
        noise = torch.randn(data.shape, generator=generator)
        step = LARGEST_TRAINED_STEP * (1 - torch.rand(plan.batch, generator=generator))
        t = torch.rand(plan.batch, generator=generator) * (1 - step)
        data, noise, step, t, label = (a.to(device()) for a in (data, noise, step, t, label))
        at = t[:, None, None, None]
        x = (1 - at) * noise + at * data
        with torch.autocast(x.device.type, torch.bfloat16):
            with torch.no_grad():
                velocity = predictor(x, t, label).float()
                x_next = x + step[:, None, None, None] * velocity
                target = predictor(x_next, t + step, label).float() - velocity
            change = network(torch.cat([x_next, velocity], 1), t + step, label)
        return (change.float() - target).square().mean()

    refiner = fit("refiner", model, loss_of, plan, folder)
    assert isinstance(refiner, SiT)
    return refiner
