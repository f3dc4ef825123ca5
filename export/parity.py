"""What every exported form is held to: PyTorch in float32 on the same inputs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from export.onnx_graph import Exported
from flowturbo import contract
from flowturbo.errors import FlowTurboError
from flowturbo.guidance import Tensors

VERIFIED_ROWS = (1, 2, 7)
Evaluate = Callable[[Tensors], tuple[np.ndarray, ...]]


class VerificationError(FlowTurboError):
    """An exported form computes something else than the checkpoint."""


@dataclass(frozen=True)
class Tolerance:
    """Largest errors allowed.

    `block` after one block call and `trajectory` after a whole schedule, both relative to the
    largest value of the output; `levels` of an image's 255, where one is a rounding at .5.
    """

    block: float
    trajectory: float
    levels: int


# The unit roundoff is 5e-4 in fp16, 4e-3 in bf16, 6e-2 in fp8; errors grow with depth and steps.
TOLERANCES = {
    "fp32": Tolerance(block=1e-4, trajectory=1e-4, levels=1),
    "fp16": Tolerance(block=5e-3, trajectory=1e-2, levels=3),
    "fp8": Tolerance(block=6e-2, trajectory=1.5e-1, levels=3),
    "bf16": Tolerance(block=4e-2, trajectory=5e-2, levels=16),
}


@dataclass(frozen=True)
class Error:
    """Difference of one output: in absolute terms, relative to its largest value, and allowed.

    For images both figures are levels.
    """

    output: str
    largest: float
    relative: float
    allowed: float

    @property
    def exceeded(self) -> bool:
        return not self.relative <= self.allowed  # NaN fails too


def torch_evaluation(exported: Exported) -> Evaluate:
    """The PyTorch module itself, in whatever precision it has now."""
    names = [spec.name for spec in contract.COMPOSED[exported.model][0]]

    def evaluate(tensors: Tensors) -> tuple[np.ndarray, ...]:
        with torch.inference_mode():
            outputs = exported.module(*(torch.from_numpy(tensors[name]) for name in names))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(output.numpy() for output in outputs)

    return evaluate


def block_outputs(exported: Exported, evaluate: Evaluate) -> dict[str, np.ndarray]:
    """Every output of a composed model on random inputs of several row counts, joined."""
    names = [spec.name for spec in contract.COMPOSED[exported.model][1]]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for seed, rows in enumerate(VERIFIED_ROWS):
        inputs = exported.random_inputs(rows, seed=seed + 1)
        outputs = evaluate({name: value.numpy() for name, value in inputs.items()})
        for name, output in zip(names, outputs, strict=True):
            parts[name].append(output)
    return {name: np.concatenate(of_output) for name, of_output in parts.items()}


def errors(
    expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], allowed: Tolerance
) -> Iterator[Error]:
    """The error of each output in `expected`; one named like a trajectory has that tolerance."""
    for name, want in expected.items():
        difference = float(np.abs(want.astype(np.float64) - found[name]).max())
        if want.dtype == np.uint8:
            yield Error(name, difference, difference, allowed.levels)
            continue
        relative = difference / (float(np.abs(want).max()) or 1.0)
        limit = allowed.trajectory if name.startswith("trajectory") else allowed.block
        yield Error(name, difference, relative, limit)


def check(
    model: str,
    expected: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    allowed: Tolerance,
) -> dict[str, float]:
    """Relative error by output; raises VerificationError for one that is above what is allowed."""
    measured = list(errors(expected, found, allowed))
    for error in measured:
        if error.exceeded:
            raise VerificationError(
                f"{model}: output {error.output} is off by {error.relative:.3g} against PyTorch in "
                f"float32, at most {error.allowed:g} is allowed"
            )
    return {error.output: error.relative for error in measured}
