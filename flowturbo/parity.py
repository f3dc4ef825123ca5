"""The reference for every form of a composed model: stored inputs and PyTorch's float32 outputs.

The export writes this reference beside each model. Every later form is compared with it too: an
engine for another GPU, or a running server.
"""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowturbo.errors import FlowTurboError, RepositoryError
from flowturbo.rows import Tensors

FIGURES_FILE = "figures.npz"
PAIRED = 14  # rows of the figures in guided pairs; one more row has no partner
VERIFIED_ROWS = (1, 2, 7)  # batch sizes that are checked in every form
# Of large images fewer rows: a decoder needs gigabytes for seven.
_LARGE, _VERIFIED_LARGE = 2**19, (1, 2, 3)
Evaluate = Callable[[Tensors], tuple[np.ndarray, ...]]


class VerificationError(FlowTurboError):
    """An exported form computes other outputs than the checkpoint."""


@dataclass(frozen=True)
class Tolerance:
    """The largest allowed errors.

    `block` is for one block call, `trajectory` for a whole schedule. Both are relative to the
    largest value of the output. `levels` is for images, of 255; one level can be mere rounding.
    """

    block: float
    trajectory: float
    levels: int


# The unit roundoff is 5e-4 in fp16, 4e-3 in bf16, 6e-2 in fp8. Errors grow with depth and steps.
TOLERANCES = {
    "fp32": Tolerance(block=1e-4, trajectory=1e-4, levels=1),
    "fp16": Tolerance(block=5e-3, trajectory=1e-2, levels=3),
    "fp8": Tolerance(block=6e-2, trajectory=1.5e-1, levels=3),
    "bf16": Tolerance(block=4e-2, trajectory=5e-2, levels=16),
}


@dataclass(frozen=True)
class Error:
    """The error of one output: absolute, relative to its largest value, and the allowed error.

    For images all are in levels.
    """

    output: str
    largest: float
    relative: float
    allowed: float

    @property
    def exceeded(self) -> bool:
        return not self.relative <= self.allowed  # NaN fails too


def errors(expected: Tensors, found: Tensors, allowed: Tolerance) -> Iterator[Error]:
    """The error of each output in `expected`. Outputs named "trajectory…" have that tolerance."""
    for name, want in expected.items():
        difference = float(np.abs(want.astype(np.float64) - found[name]).max())
        if want.dtype == np.uint8:
            yield Error(name, difference, difference, allowed.levels)
            continue
        relative = difference / (float(np.abs(want).max()) or 1.0)
        limit = allowed.trajectory if name.startswith("trajectory") else allowed.block
        if want.dtype == np.float16:  # rounded, whatever it was computed in
            limit = max(limit, TOLERANCES["fp16"].block)
        yield Error(name, difference, relative, limit)


def check(model: str, expected: Tensors, found: Tensors, allowed: Tolerance) -> dict[str, float]:
    """The relative error by output. Raises VerificationError for an error above its tolerance."""
    measured = list(errors(expected, found, allowed))
    for error in measured:
        if error.exceeded:
            raise VerificationError(
                f"{model}: output {error.output} is off by {error.relative:.3g} against PyTorch in "
                f"float32, at most {error.allowed:g} is allowed"
            )
    return {error.output: error.relative for error in measured}


def batches_up_to(most: int) -> list[int]:
    """Batch sizes to check on a GPU, up to `most` rows: small ones, a typical one, the largest."""
    return sorted({*(rows for rows in (*VERIFIED_ROWS, 16) if rows < most), most})


@dataclass(frozen=True)
class Figures:
    """Inputs and PyTorch's outputs of one composed model, by name in the contract's order.

    Each array is [15, ...]: seven guided pairs, and one row without a partner. Different pairs are
    independent, so these rows can form batches of any size.
    """

    inputs: Tensors
    outputs: Tensors

    def batch(self, rows: int) -> tuple[Tensors, Tensors]:
        """Inputs and expected outputs of `rows` rows: pairs, and an odd last row alone."""
        chosen = [k % PAIRED for k in range(rows - rows % 2)] + [PAIRED] * (rows % 2)
        inputs = {name: array[chosen] for name, array in self.inputs.items()}
        return inputs, {name: array[chosen] for name, array in self.outputs.items()}

    @property
    def batches(self) -> Sequence[int]:
        """The batch sizes that are checked in every form."""
        largest = max(array[0].size for array in self.outputs.values())
        return _VERIFIED_LARGE if largest > _LARGE else VERIFIED_ROWS

    def joined(self, batches: Sequence[int]) -> Tensors:
        """The expected outputs of batches of these sizes, concatenated."""
        parts = [self.batch(rows)[1] for rows in batches]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}

    def answers(self, evaluate: Evaluate, batches: Sequence[int] | None = None) -> Tensors:
        """The outputs of `evaluate` for batches of these sizes, concatenated."""
        parts = [evaluate(self.batch(rows)[0]) for rows in batches or self.batches]
        return dict(zip(self.outputs, map(np.concatenate, zip(*parts, strict=True)), strict=True))

    def check(
        self,
        model: str,
        evaluate: Evaluate,
        allowed: Tolerance,
        batches: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """The relative error by output over all `batches`. Raises VerificationError."""
        batches = batches or self.batches
        return check(model, self.joined(batches), self.answers(evaluate, batches), allowed)

    def save(self, folder: Path) -> None:
        """Writes the figures into a model's folder."""
        arrays = {f"input {name}": array for name, array in self.inputs.items()}
        arrays |= {f"output {name}": array for name, array in self.outputs.items()}
        np.savez_compressed(folder / FIGURES_FILE, **arrays)

    @classmethod
    def load(cls, folder: Path) -> "Figures":
        """Reads the figures in a model's folder. Raises RepositoryError."""
        path = folder / FIGURES_FILE
        try:
            with np.load(path) as stored:
                parts: Mapping[str, Tensors] = {"input": {}, "output": {}}
                for key in stored.files:
                    kind, _, name = key.partition(" ")
                    parts[kind][name] = stored[key]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise RepositoryError(
                f"{path} has no reference figures for {folder.name}: {error}; export again"
            ) from error
        return cls(parts["input"], parts["output"])
