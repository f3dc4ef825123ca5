"""Compares the largest magnitude that a network computes with the range of float16.

A network whose values leave that range gives NaN on a GPU. A CPU hides this, because ONNX Runtime
computes float16 models in float32 there. So the export always watches the float32 network.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from export.onnx_graph import ExportTarget
from export.parity import torch_evaluation, torch_figures
from flowturbo.conditions.class_label import LABEL
from flowturbo.contract import PAIR, SCALARS
from flowturbo.nets.blocks import StepBlock
from flowturbo.nets.sit import ByLabel
from flowturbo.parity import Figures
from flowturbo.rows import Tensors

LARGEST = torch.finfo(torch.float16).max
HEADROOM = 2.0  # safety factor: only a few inputs are tried, others may give larger values
_SMALL_TABLE, _ROWS = 64, 8  # labels, and rows per evaluation
HALVES = ("fp16", "fp8")  # an fp8 network computes in float16 between its matrix products


@dataclass(frozen=True)
class Peak:
    """The largest magnitude in any tensor, and the operation that computed it."""

    magnitude: float
    operation: str

    @property
    def fits_half(self) -> bool:
        """Whether it fits into float16 with a margin (HEADROOM). NaN does not fit."""
        return self.magnitude <= LARGEST / HEADROOM

    def __str__(self) -> str:
        return f"values up to {self.magnitude:.3g} ({self.operation})"


class PeakOf(TorchDispatchMode):
    """Records the peak of all floating-point tensors that are computed inside the with block."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = Peak(0.0, "nothing")
        # Plain attention, because fused attention hides the products of queries and keys.
        self._plain_attention = sdpa_kernel(SDPBackend.MATH)

    def __enter__(self) -> "PeakOf":
        self._plain_attention.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._plain_attention.__exit__(*error)

    def look_at(self, name: str, tensor: Tensor) -> None:
        """Updates the peak with `tensor`, the result of the operation `name`."""
        if tensor.is_floating_point() and tensor.numel():
            found = float(tensor.detach().abs().max())
            if not found <= self.peak.magnitude:  # true for NaN too
                self.peak = Peak(found, name)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.look_at(str(func), tensor)
        return result


def watched_figures(exported: ExportTarget) -> tuple[Figures, Peak]:
    """The reference figures of a model, and its peak.

    The peak covers the weights and all values computed for these figures and for `extremes`.
    """
    run = torch_evaluation(exported)
    with PeakOf() as watch:
        figures = torch_figures(exported)
        for inputs in extremes(exported):
            run(inputs)
    for name, parameter in exported.module.named_parameters():
        watch.look_at(name, parameter)
    return figures, watch.peak


def extremes(exported: ExportTarget) -> Iterator[Tensors]:
    """Inputs of a step block at the start, middle and end of the flow, for critical labels.

    From a small label table they are all labels. From a large one they are the labels with the
    largest embeddings, and the null class. Other conditions have real texts.
    """
    if not isinstance(exported.module, StepBlock):
        return
    for labels in _critical_labels(exported.module.network):
        rows = _ROWS if labels is None else len(labels)
        made = exported.random_inputs(rows, seed=0)
        made[PAIR] = torch.zeros_like(made[PAIR])
        if labels is not None:
            made[LABEL] = labels[:, None]
        for t in (0.0, 0.5, 1.0):
            made[SCALARS] = torch.full_like(made[SCALARS], t)
            yield {name: value.numpy() for name, value in made.items()}


def _critical_labels(network: nn.Module) -> list[Tensor | None]:
    """Batches of labels; one batch of None for a network without labels."""
    if not isinstance(network, ByLabel):
        return [None]
    table = network.network.y_embedder.embedding_table.weight
    labels = torch.arange(len(table))
    if len(table) > _SMALL_TABLE:
        largest = table.norm(dim=1).topk(_ROWS - 1).indices
        labels = torch.cat([largest, labels[-1:]])
    return list(labels.split(_ROWS))
