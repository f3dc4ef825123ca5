"""Trains the predictor of glyph scenes and its CLIPs: flow matching on latents and prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTokenizer

from flowturbo.nets.vae import Decoder
from flowturbo.solver.calls import Network
from flowturbo.solver.program import compile_program
from flowturbo.solver.schedule import Schedule
from training.flow_matching import dropped, either, loss
from training.loop import LossOf, device, digest_of, fit
from training.plan import TrainingConfig
from training.samples import PromptSheet
from training.scenes.grammar import Scene
from training.scenes.network import (
    LATENT_CHANNELS,
    LATENT_SIZE,
    TextToImage,
    encode_prompts,
)

# Two phases of one rule: a constant rate, which more steps can extend, and then its decay.
PHASES = ("predictor", "predictor_decay")
_SAMPLES = 16  # images of a sample grid


def train(
    latents: np.ndarray,
    scenes: Sequence[Scene],
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    plans: Mapping[str, TrainingConfig],
    folder: Path,
    identity: Mapping[str, str],
) -> TextToImage:
    """Fits the networks to `latents` [N, C, h, w] of `scenes`, each time with another paraphrase.

    `vae` decodes sample images. `identity` identifies the data.
    """
    torch.manual_seed(plans[PHASES[0]].seed)
    model = TextToImage(tokenizer)
    for name in PHASES:
        loss_of = _loss(latents, scenes, tokenizer, plans[name].batch)
        preview = _Preview(tokenizer, scenes, vae)
        trained = fit(name, model, loss_of, plans[name], folder, identity=identity, preview=preview)
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
        return loss(network, data, noise, t, ids)

    return loss_of


class _Preview:
    """Draws images of the first scenes with the predictor in training, guided at 3."""

    every = 1000

    def __init__(
        self, tokenizer: CLIPTokenizer, scenes: Sequence[Scene], vae: AutoencoderKL
    ) -> None:
        prompts = [scene.prompt() for scene in scenes[:_SAMPLES]]
        ids = encode_prompts(tokenizer, [*prompts, ""])
        self._ids, self._vae = torch.from_numpy(ids).to(device()), vae

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> np.ndarray:
        """The picture, [H, W, 3] uint8."""
        assert isinstance(network, TextToImage)
        made = network.text_encoder()(self._ids, self._ids)
        sheet = PromptSheet(
            (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE),
            [each[:-1] for each in made],
            [each[-1:].expand(_SAMPLES, *each.shape[1:]) for each in made],
            compile_program(Schedule.parse("A12")),
            3.0,
            Decoder(self._vae),
        )
        return sheet.draw({Network.PREDICTOR: network.velocity()})
