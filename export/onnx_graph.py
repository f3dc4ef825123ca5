"""Exports PyTorch modules as ONNX files."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowturbo.conditions import Condition
from flowturbo.contract import IMAGE, PAIR, Role, Specs, composed_tensors, latent_sizes

OPSET = 22  # the first version with bfloat16 in Conv
# PyTorch's types. An fp8 model is exported in float16; export/quantize.py then converts it.
PRECISIONS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float16,
}


@dataclass(frozen=True)
class ExportTarget:
    """A module to export: its role, the shape of its latents (C, h, w), and its condition."""

    role: Role
    module: nn.Module
    latent_shape: tuple[int, int, int]
    condition: Condition

    @property
    def tensors(self) -> tuple[Specs, Specs]:
        """Its inputs and outputs (flowturbo.contract)."""
        return composed_tensors(self.role, self.condition.block_inputs)

    def sizes(self, outputs: Mapping[str, np.ndarray]) -> dict[int | str, int]:
        """The values of the contract's letters: C, h, w, and for a decoder H and W of its image."""
        sizes = latent_sizes(self.latent_shape)
        if self.role is Role.DECODER:
            sizes |= dict(zip("HW", outputs[IMAGE].shape[1:3], strict=True))
        return sizes

    def random_inputs(self, rows: int, seed: int) -> dict[str, Tensor]:
        """Random inputs by name, in the contract's order.

        Rows are guided pairs; an odd last row has no partner.
        """
        generator = torch.Generator().manual_seed(seed)
        specs, _ = self.tensors
        sizes = latent_sizes(self.latent_shape)
        made: dict[str, Tensor] = {}
        for spec in specs:
            shape = (rows, *(int(sizes.get(dim, dim)) for dim in spec.dims))
            made[spec.name] = torch.rand(shape, generator=generator)
            if spec.dims[0] == "C":
                made[spec.name] = torch.randn(shape, generator=generator)
        if self.role is not Role.DECODER:
            conditions = self.condition.sample(rows, np.random.default_rng(seed))
            made |= {name: torch.from_numpy(value) for name, value in conditions.items()}
            made[PAIR] = _pairs(rows)
        return made


def _pairs(rows: int) -> Tensor:
    pair = torch.zeros((rows, 1), dtype=torch.int32)
    paired = rows - rows % 2
    pair[:paired:2], pair[1:paired:2] = 1, -1
    return pair


def to_precision(module: nn.Module, precision: str) -> None:
    """Casts the parameters of `module` in place, one by one, so memory never holds two copies.

    Buffers keep their type: the time embedder's frequencies need float32.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(PRECISIONS[precision])


def export_onnx(exported: ExportTarget, path: Path) -> None:
    """Writes the module as ONNX for any number of rows; large weights get a file beside it."""
    example = exported.random_inputs(4, seed=0)
    _, outputs = exported.tensors
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            exported.module.eval(),
            tuple(example.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(example),
            output_names=[spec.name for spec in outputs],
            dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in example),
            custom_translation_table={
                torch.ops.aten.scaled_dot_product_attention.default: _attention
            },
            verbose=False,
        )
    assert program is not None
    program.save(str(path), external_data=_bytes_of(exported.module) > 1 << 30)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Scaled dot-product attention, [B, heads, tokens, d], with as few nodes as possible.

    The exporter's own form also reshapes and scales the keys. No runtime fuses these nodes.
    """
    from onnxscript import opset22 as op  # imported here: PyTorch programs need no ONNX

    assert mask is None and not dropout and not causal and not enable_gqa
    factor = scale or query.shape[-1] ** -0.5
    scores = op.MatMul(op.Mul(query, factor), op.Transpose(key, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def count_attentions(path: Path) -> int:
    """The number of attentions in the ONNX file `path`: each has one softmax."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return sum(node.op_type == "Softmax" for node in graph.node)


def _bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
