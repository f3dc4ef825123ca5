"""PyTorch's float32 outputs: the reference for every exported form."""

import numpy as np
import torch

from export.onnx_graph import ExportTarget
from flowturbo.contract import Role
from flowturbo.parity import PAIRED, Evaluate, Figures, VerificationError
from flowturbo.rows import Tensors

_ROWS_PER_SIZE = 3
_AT_ONCE, _SIDE = 6, 32  # rows per evaluation of latents with so long sides


def torch_evaluation(exported: ExportTarget) -> Evaluate:
    """Evaluates the PyTorch module itself, in its current precision."""
    names = [spec.name for spec in exported.tensors[0]]

    def evaluate(tensors: Tensors) -> tuple[np.ndarray, ...]:
        with torch.inference_mode():
            outputs = exported.module(*(torch.from_numpy(tensors[name]) for name in names))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(output.numpy() for output in outputs)

    return evaluate


def _rows_at_once(exported: ExportTarget) -> int:
    """Rows per evaluation: fewer of large latents, whose decoder needs gigabytes; even if many."""
    _, height, width = exported.latent_shape
    fitting = _AT_ONCE * _SIDE**2 // (height * width)
    return min(_AT_ONCE, max(2, fitting - fitting % 2))


def size_figures(exported: ExportTarget) -> list[tuple[Tensors, Tensors]]:
    """Inputs and the module's outputs at each other size, for a guided pair and one row alone."""
    names, evaluate = [spec.name for spec in exported.tensors[1]], torch_evaluation(exported)
    found = []
    for shape in exported.other_shapes if exported.role is not Role.TEXT_ENCODER else ():
        made = exported.at(shape).random_inputs(_ROWS_PER_SIZE, seed=2)
        inputs = {name: value.numpy() for name, value in made.items()}
        found.append((inputs, dict(zip(names, evaluate(inputs), strict=True))))
    return found


def torch_figures(exported: ExportTarget) -> Figures:
    """The module's outputs for random inputs, in its current precision.

    Raises VerificationError if they are not finite.
    """
    made = exported.random_inputs(PAIRED + 1, seed=1)
    inputs = {name: value.numpy() for name, value in made.items()}
    names = [spec.name for spec in exported.tensors[1]]
    evaluate = torch_evaluation(exported)
    at_once = _rows_at_once(exported)
    parts = [
        evaluate({name: array[start : start + at_once] for name, array in inputs.items()})
        for start in range(0, PAIRED + 1, at_once)
    ]
    outputs = dict(zip(names, map(np.concatenate, zip(*parts, strict=True)), strict=True))
    if bad := next((name for name, array in outputs.items() if not np.isfinite(array).all()), None):
        raise VerificationError(
            f"{exported.role}: PyTorch's own output {bad} has values that are not finite"
        )
    return Figures(inputs, outputs)
