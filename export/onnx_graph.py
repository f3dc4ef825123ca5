"""Exports PyTorch modules as ONNX files."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowturbo.conditions import Condition
from flowturbo.contract import (
    BLOCK_INPUTS,
    IMAGE,
    PAIR,
    VAE_ROLES,
    Role,
    Specs,
    TensorSpec,
    composed_tensors,
    latent_sizes,
)
from flowturbo.nets.blocks import InFloat32
from flowturbo.rows import Tensors

_MASKED = -1e4  # a score whose softmax is 0 beside any other, within float16
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
    """A module to export: its role, the shape of its latents (C, h, w), and its condition.

    `other_shapes` are those of the other sizes that it serves. `conditioning` has real conditioning
    tensors [k, ...] for checks; random ones are used without. An image is `factor` times as wide as
    its latent.
    """

    role: Role
    module: nn.Module
    latent_shape: tuple[int, int, int]
    condition: Condition
    other_shapes: tuple[tuple[int, int, int], ...] = ()
    conditioning: Tensors | None = None
    factor: int = 1

    @property
    def tensors(self) -> tuple[Specs, Specs]:
        """Its inputs and outputs (flowturbo.contract)."""
        condition = self.condition
        return composed_tensors(self.role, condition.block_inputs, condition.encoder_inputs)

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """The dimensions that vary, per argument of the module: rows, and h and w with sizes."""
        free, specs = torch.export.Dim.DYNAMIC, self.tensors[0]

        def of(spec: TensorSpec) -> dict[int, Any]:
            sides = {k: free for k, dim in enumerate(spec.dims, 1) if dim in ("h", "w", "H", "W")}
            return {0: free, **(sides if self.other_shapes else {})}

        found = tuple(map(of, specs))
        if self.role in VAE_ROLES:
            return found
        # The conditioning, and the ids of texts, are the variadic arguments.
        named = 0 if self.role is Role.TEXT_ENCODER else len(BLOCK_INPUTS)
        return (*found[:named], found[named:])

    def sizes(self, outputs: Mapping[str, np.ndarray]) -> dict[int | str, int]:
        """The values of the contract's letters: C, h, w, and for a decoder H and W of its image."""
        if self.role is Role.TEXT_ENCODER:
            return {}
        sizes = latent_sizes(self.latent_shape)
        if self.role is Role.DECODER:
            sizes |= dict(zip("HW", outputs[IMAGE].shape[1:3], strict=True))
        if self.role is Role.ENCODER:
            sizes |= dict(zip("HW", self._image_size, strict=True))
        if self.other_shapes:
            sizes |= {letter: -1 for letter in sizes if letter != "C"}
        return sizes

    def random_inputs(self, rows: int, seed: int) -> dict[str, Tensor]:
        """Random inputs by name, in the contract's order.

        Rows are guided pairs; an odd last row has no partner.
        """
        generator = torch.Generator().manual_seed(seed)
        chance = np.random.default_rng(seed)
        if self.role is Role.TEXT_ENCODER:
            texts = self.condition.sample_encoder(rows, chance)
            return {name: torch.from_numpy(value) for name, value in texts.items()}
        if self.role is Role.ENCODER:
            return {IMAGE: torch.from_numpy(_random_images(rows, self._image_size, chance))}
        specs, _ = self.tensors
        sizes = latent_sizes(self.latent_shape)
        made: dict[str, Tensor] = {}
        for spec in specs:
            shape = (rows, *(int(sizes.get(dim, dim)) for dim in spec.dims))
            made[spec.name] = torch.rand(shape, generator=generator)
            if spec.dims[0] == "C":
                made[spec.name] = torch.randn(shape, generator=generator)
        if self.role not in VAE_ROLES:
            conditions = self._conditions(rows, chance)
            made |= {name: torch.from_numpy(value) for name, value in conditions.items()}
            made[PAIR] = _pairs(rows)
        return made

    def _conditions(self, rows: int, chance: np.random.Generator) -> Tensors:
        if self.conditioning is None:
            return self.condition.sample(rows, chance)
        count = len(next(iter(self.conditioning.values())))
        chosen = chance.integers(count, size=rows)
        return {name: value[chosen] for name, value in self.conditioning.items()}

    @property
    def _image_size(self) -> tuple[int, int]:
        _, height, width = self.latent_shape
        return height * self.factor, width * self.factor

    def at(self, latent_shape: tuple[int, int, int]) -> "ExportTarget":
        """The same module for another size."""
        return replace(self, latent_shape=latent_shape)


def _random_images(rows: int, size: tuple[int, int], chance: np.random.Generator) -> np.ndarray:
    """Images [rows, H, W, 3] uint8 of large squares and small differences, as photographs have."""
    height, width = size
    colours = chance.integers(256, size=(rows, 4, 4, 3))
    y, x = (np.arange(side) * 4 // side for side in size)
    noise = chance.normal(0, 8, (rows, height, width, 3))
    return (colours[:, y][:, :, x] + noise).clip(0, 255).astype(np.uint8)


def _pairs(rows: int) -> Tensor:
    pair = torch.zeros((rows, 1), dtype=torch.int32)
    paired = rows - rows % 2
    pair[:paired:2], pair[1:paired:2] = 1, -1
    return pair


def to_precision(module: nn.Module, precision: str) -> None:
    """Casts the parameters of `module` in place, one by one, so memory never holds two copies.

    Buffers keep their type: the time embedder's frequencies need float32.
    """
    kept = {
        parameter
        for each in module.modules()
        if isinstance(each, InFloat32)
        for parameter in each.parameters()
    }
    for parameter in module.parameters():
        if parameter not in kept:
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
            dynamic_shapes=exported.dynamic_shapes(),
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

    assert not dropout and not causal and not enable_gqa
    factor = scale or query.shape[-1] ** -0.5
    scaled = query if factor == 1 else op.Mul(query, factor)
    scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    if mask is not None:  # boolean: which keys are read
        far = op.CastLike(op.Constant(value_float=_MASKED), scores)
        scores = op.Where(mask, scores, far)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def count_attentions(path: Path) -> int:
    """The number of attentions in the ONNX file `path`: each has one softmax."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return sum(node.op_type == "Softmax" for node in graph.node)


def _bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
