"""Trains the predictor of glyph scenes and its CLIPs: flow matching on latents and prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from training.flow_matching import dropped, either, path
from training.loop import LossOf, device, digest_of, fit
from training.plan import TrainingConfig
from training.scenes.grammar import Scene
from training.scenes.network import TextToImage, encode_prompts

# Two phases of one rule: a constant rate, which more steps can extend, and then its decay.
PHASES = ("predictor", "predictor_decay")


def train(
    latents: np.ndarray,
    scenes: Sequence[Scene],
    tokenizer: CLIPTokenizer,
    plans: Mapping[str, TrainingConfig],
    folder: Path,
    identity: Mapping[str, str],
) -> TextToImage:
    """Fits the networks to `latents` [N, C, h, w] of `scenes`, each time with another paraphrase.

    `identity` identifies the data.
    """
    torch.manual_seed(plans[PHASES[0]].seed)
    model = TextToImage(tokenizer)
    for name in PHASES:
        loss_of = _loss(latents, scenes, tokenizer, plans[name].batch)
        trained = fit(name, model, loss_of, plans[name], folder, identity=identity)
        model.load_state_dict(trained.state_dict())
        identity = {**identity, "start": digest_of(model.state_dict())}
    return model.eval().requires_grad_(False)


def _loss(
    latents: np.ndarray, scenes: Sequence[Scene], tokenizer: CLIPTokenizer, batch: int
) -> LossOf:
    def loss_of(network: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator).numpy()
        data = torch.from_numpy(latents[rows].astype(np.float32))
        words = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        no_text = dropped(batch, generator).tolist()
        prompts = [
            "" if empty else scenes[row].prompt(words)
            for row, empty in zip(rows, no_text, strict=True)
        ]
        ids = torch.from_numpy(encode_prompts(tokenizer, prompts))
        noise = torch.randn(data.shape, generator=generator)
        t = either(batch, generator)
        x, velocity = path(data, noise, t)
        x, velocity, t, ids = (a.to(device()) for a in (x, velocity, t, ids))
        return (network(x, t, ids).float() - velocity).square().mean()

    return loss_of
