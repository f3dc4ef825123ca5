"""PyTorch modules to verified ONNX files."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flowturbo import contract
from flowturbo.errors import FlowTurboError
from flowturbo.nets.sit import SiTConfig
from flowturbo.onnx_session import OnnxModel

OPSET = 20  # has Gelu and LayerNormalization whole, and the serving runtimes read it
TOLERANCE = 1e-4  # largest error, relative to the largest value of the output, float32
PIXEL_TOLERANCE = 1  # levels of 255: a value at .5 may round either way
VERIFIED_ROWS = (1, 2, 7)


class VerificationError(FlowTurboError):
    """The exported file computes something else than the checkpoint."""


@dataclass(frozen=True)
class Exported:
    """A module to export: its composed model's name and the size of its latents, (C, h, w).

    `config` is the predictor's, which the whole pipeline shares.
    """

    model: str
    module: nn.Module
    latent_shape: tuple[int, int, int]
    config: SiTConfig

    def sizes(self) -> dict[int | str, int]:
        """What the contract's letters stand for: C, h, w, and a decoder's H and W."""
        sizes: dict[int | str, int] = dict(zip("Chw", self.latent_shape, strict=True))
        if self.model == contract.DECODER:
            with torch.no_grad():
                image = self.module(torch.zeros(1, *self.latent_shape))
            sizes |= {"H": image.shape[1], "W": image.shape[2]}
        return sizes

    def random_inputs(self, rows: int, seed: int) -> dict[str, Tensor]:
        """Inputs by name as the contract has them: guided pairs first, an odd last row alone."""
        generator = torch.Generator().manual_seed(seed)
        specs, _ = contract.COMPOSED[self.model]
        sizes: dict[int | str, int] = dict(zip("Chw", self.latent_shape, strict=True))
        made: dict[str, Tensor] = {}
        for spec in specs:
            shape = (rows, *(int(sizes.get(dim, dim)) for dim in spec.dims))
            made[spec.name] = torch.rand(shape, generator=generator)
            if spec.dims[0] == "C":
                made[spec.name] = torch.randn(shape, generator=generator)
        if "label" in made:
            ids = torch.randint(self.config.num_classes + 1, (rows, 1), generator=generator)
            made |= {"label": ids, "pair": _pairs(rows)}
        return made


def _pairs(rows: int) -> Tensor:
    pair = torch.zeros((rows, 1), dtype=torch.int32)
    paired = rows - rows % 2
    pair[:paired:2], pair[1:paired:2] = 1, -1
    return pair


def export_onnx(exported: Exported, path: Path) -> None:
    """Writes the module as ONNX with any number of rows; large weights lie beside it."""
    example = exported.random_inputs(4, seed=0)
    _, outputs = contract.COMPOSED[exported.model]
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
            verbose=False,
        )
    assert program is not None
    program.save(str(path), external_data=_bytes_of(exported.module) > 1 << 30)


def _bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def verify_onnx(exported: Exported, path: Path) -> dict[str, float]:
    """Largest error of each output against PyTorch over several row counts.

    Relative to the output's largest value for floats, in levels for images. Raises
    VerificationError above TOLERANCE or PIXEL_TOLERANCE.
    """
    session = OnnxModel(path)
    worst: dict[str, float] = {}
    for seed, rows in enumerate(VERIFIED_ROWS):
        inputs = exported.random_inputs(rows, seed=seed + 1)
        with torch.no_grad():
            expected = exported.module(*inputs.values())
        expected = expected if isinstance(expected, tuple) else (expected,)
        got = session({name: value.numpy() for name, value in inputs.items()})
        for name, want, have in zip(session.output_names, expected, got, strict=True):
            worst[name] = max(worst.get(name, 0.0), _error(want.numpy(), have))
    _check(exported.model, worst)
    return worst


def _error(want: np.ndarray, have: np.ndarray) -> float:
    difference = float(np.abs(want.astype(np.float64) - have).max())
    scale = 1.0 if want.dtype == np.uint8 else float(np.abs(want).max())
    return difference / scale if scale else difference


def _check(model: str, worst: Mapping[str, float]) -> None:
    for name, error in worst.items():
        allowed = PIXEL_TOLERANCE if model == contract.DECODER else TOLERANCE
        if not error <= allowed:  # NaN fails too
            raise VerificationError(
                f"{model}: output {name} is off by {error:.3g} against PyTorch, "
                f"at most {allowed:g} is allowed"
            )
