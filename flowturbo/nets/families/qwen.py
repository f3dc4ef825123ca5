"""Qwen3 as a text encoder: hidden states of some of its layers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Qwen(nn.Module):
    """The hidden states after `layers` (numbers from 1), side by side, [B, L, D * layers].

    Later layers are never needed, nor is the head.
    """

    def __init__(self, model: Any, layers: tuple[int, ...]) -> None:
        super().__init__()
        whole = getattr(model, "model", model)
        self.chosen = layers
        self.model: Any = copy.copy(whole)  # with the same weights
        self.model.config = copy.copy(whole.config)
        self.model.config.num_hidden_layers = max(layers)
        self.model._modules = {
            **whole._modules,
            "layers": whole.layers[: max(layers)],
            "norm": nn.Identity(),  # the library applies it to the last state
        }

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        return torch.cat([states[k] for k in self.chosen], -1)
