"""The largest magnitude that a network computes, against the range of float16.

A network whose values leave that range answers NaN on a GPU, where a CPU hides it: ONNX Runtime
computes float16 in float32 there. So the float32 network is watched, wherever the export runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGEST = torch.finfo(torch.float16).max
HEADROOM = 2.0  # other inputs than the few that are tried reach further
HALVES = ("fp16", "fp8")  # an fp8 network computes in float16 between its matrix products


@dataclass(frozen=True)
class Peak:
    """The largest magnitude of any tensor, and the operation that made it."""

    magnitude: float
    operation: str

    @property
    def fits_half(self) -> bool:
        """Whether float16 holds it, with room to spare; NaN does not fit."""
        return self.magnitude <= LARGEST / HEADROOM

    def __str__(self) -> str:
        return f"values up to {self.magnitude:.3g} ({self.operation})"


class PeakOf(TorchDispatchMode):
    """Watches every floating-point tensor that is computed while the block runs."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = Peak(0.0, "nothing")
        # Plain attention: the products of queries and keys are tensors of their own.
        self._plain_attention = sdpa_kernel(SDPBackend.MATH)

    def __enter__(self) -> "PeakOf":
        self._plain_attention.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._plain_attention.__exit__(*error)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                found = float(tensor.detach().abs().max())
                if not found <= self.peak.magnitude:  # true for NaN too
                    self.peak = Peak(found, str(func))
        return result
