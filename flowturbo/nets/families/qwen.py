"""Qwen3 as a text encoder: hidden states of some of its layers."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn


class Qwen(nn.Module):
    """The hidden states after `layers` (numbers from 1), side by side, [B, L, D * layers].

    Later layers are never needed, nor is the head.
    """

    def __init__(self, model: Any, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.chosen = layers
        twin: Any = _twin(getattr(model, "model", model))
        twin.config = copy.copy(twin.config)
        twin.config.num_hidden_layers = max(layers)
        twin.layers = twin.layers[: max(layers)]
        twin.norm = nn.Identity()  # the library applies it to the last state
        self.model: Any = twin

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        return torch.cat([states[k] for k in self.chosen], -1)


def _twin(module: nn.Module) -> nn.Module:
    """A copy of `module` with the same weights, without the hooks that the library puts on it.

    Hooks record hidden states. On layers that two models share, each state came twice.
    """
    made = copy.copy(module)
    made._modules = {name: of and _twin(of) for name, of in module._modules.items()}
    made._forward_hooks = OrderedDict()
    made.__dict__.pop("_output_capturing_hooks_installed", None)
    return made
