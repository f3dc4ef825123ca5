"""Trains the refiner of a fitted solver's step: rectified units beside its linear operator.

They read the same windows, and learn what the fitted step leaves. Their outputs start at zero, so
training starts at the fitted step. It is stochastic gradient descent on windows of the solver's own
states. Windows of velocities are almost alike, and what matters is in their differences: so the
training reads them whitened. The units are then written for windows as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from flowturbo.solver.operator import to_squares
from flowturbo.solver.sampler import Array
from research.quality.engine import distances
from tuning.learned import (
    Rollout,
    Step,
    Task,
    counts_of,
    parts,
    rounded,
    square_of,
    terms_of,
    windows_of,
)

_WINDOWS = 2**20  # at most, drawn from all images
_BYTES = 2**30  # at most, of whitened windows in float16
_EPOCHS, _BATCHES = 24, 64  # batches per epoch
_RATE, _DECAY = 8e-3, 0.01
_WHITE = 1e-3  # of the largest variance: smaller ones are not blown up to 1
_HELD_OUT = 8  # the last eighth of the images says when to stop
_CHECKS = 8
_WORTH = 0.04  # of the mean square that is left: units that gain less cost more than they bring
_AVERAGE = 0.01  # of the moving average of the weights, per step


@dataclass(frozen=True)
class _Windows:
    """Whitened windows [rows, features], their `terms` [rows, k], targets and weights [rows]."""

    read: torch.Tensor
    terms: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor

    def __len__(self) -> int:
        return len(self.read)

    def rows(self, which: torch.Tensor | slice) -> "_Windows":
        return _Windows(*(of[which] for of in (self.read, self.terms, self.target, self.weight)))


class _Units(torch.nn.Module):
    """The units: their inputs are linear in the windows, and in the terms of the guidance scale."""

    def __init__(self, features: int, terms: int, outputs: int, units: int) -> None:
        super().__init__()
        drawn = torch.randn(
            features, terms, units, generator=torch.Generator().manual_seed(0)
        )  # as for each fit: a fit can be repeated
        self.enter = torch.nn.Parameter(drawn / features**0.5)
        self.bias = torch.nn.Parameter(torch.zeros(terms, units))
        self.leave = torch.nn.Parameter(torch.zeros(units, outputs))

    def forward(self, windows: _Windows) -> torch.Tensor:
        made = windows.read.float() @ self.enter.flatten(1)
        inputs = ((made.view(-1, *self.bias.shape) + self.bias) * windows.terms[..., None]).sum(1)
        return torch.relu(inputs) @ self.leave

    def loss(self, windows: _Windows) -> torch.Tensor:
        off = (self(windows) - windows.target).square().mean(1)
        return (off * windows.weight).mean()


def refined(
    rollouts: Sequence[Rollout], step: Step, task: Task, end: float, name: str = "refiner"
) -> Step:
    """`step` to the time `end` with `task.units` units; `name` is for the progress bar.

    There are none where they hardly help on images that they were not trained on.
    """
    assert step.matrix is not None
    center, whiten = _whitening(rollouts, task.side)
    size, fitted, held = _drawn(rollouts, step, task, end, center, whiten)
    shape = len(whiten), len(step.matrix), step.matrix.shape[-1]
    network = _Units(*shape, task.units)
    average = _Units(*shape, task.units)
    batch, steps = -(-len(fitted) // _BATCHES), _EPOCHS * _BATCHES
    optimizer = torch.optim.AdamW(network.parameters(), _RATE, weight_decay=_DECAY)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, _RATE / 100)
    chance = torch.Generator().manual_seed(0)
    kept: list[Array] | None = None
    with torch.no_grad():
        # Its outputs are zero: this is the loss without units, which costs less.
        best = (1 - _WORTH) * float(average.loss(held))
    for done in tqdm(range(1, steps + 1), name, leave=False):
        loss = network.loss(fitted.rows(torch.randint(len(fitted), (batch,), generator=chance)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        with torch.no_grad():
            for mean, now in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(now, max(_AVERAGE, 1 / done))
            if done % (steps // _CHECKS) == 0 and (found := float(average.loss(held))) < best:
                best, kept = found, _arrays(average)
    if kept is None:
        return replace(step, refiner=np.zeros((0, step.matrix.shape[-1]), np.float32))
    enter, bias, leave = kept
    inputs = np.tensordot(whiten, enter, 1)  # of windows as they are
    constant = bias - np.tensordot(center, inputs, 1)
    columns = np.concatenate([inputs, constant[None]]).transpose(1, 0, 2)
    matrix = np.concatenate([step.matrix, rounded(columns)], 2)
    return replace(step, matrix=matrix, refiner=rounded(size * leave))


def _arrays(network: _Units) -> list[Array]:
    return [of.detach().numpy().copy() for of in network.parameters()]


def _whitening(rollouts: Sequence[Rollout], side: int) -> tuple[Array, Array]:
    """Mean [features] of windows without the 1, and what whitens them, [features, features]."""
    count: int = 0
    total: Array | float = 0.0
    square: Array | float = 0.0
    for rollout in rollouts[:: max(1, len(rollouts) // 32)]:
        read = windows_of(rollout, side, parts(len(rollout.x))[0])[:, :-1].astype(np.float64)
        count += len(read)
        total = total + read.sum(0)
        square = square + read.T @ read
    center = np.asarray(total) / count
    values, vectors = np.linalg.eigh(np.asarray(square) / count - np.outer(center, center))
    return center, vectors / np.sqrt(np.maximum(values, 0) + _WHITE * values[-1])


def _drawn(
    rollouts: Sequence[Rollout], step: Step, task: Task, end: float, center: Array, whiten: Array
) -> tuple[float, _Windows, _Windows]:
    """The size of what the step leaves, in which targets count, and windows to train and check."""
    left = [rollout.exact.state(end) - task.moved(rollout, step).x for rollout in rollouts]
    apart = [distances(each, np.zeros_like(each)) for each in left]
    off, weights = np.concatenate(apart), np.concatenate(counts_of(apart))
    size = float(np.sqrt(np.square(off).mean()))
    squares = left[0][0].size // step.matrix.shape[-1]  # type: ignore[union-attr]
    most = min(_WINDOWS, _BYTES // (2 * len(whiten)))
    share = min(1.0, most / (len(off) * squares))
    chance = np.random.default_rng(0)
    found: list[list[Array]] = []
    start = 0
    for rollout, each in zip(rollouts, left, strict=True):
        terms = terms_of(rollout, task)
        for part in parts(len(each)):
            target = to_squares(each[part], square_of(task.side))
            rows = np.flatnonzero(chance.random(len(target)) < share)
            read = (windows_of(rollout, task.side, part)[rows, :-1] - center) @ whiten
            image = start + rows // squares
            found.append(
                [read.astype(np.float16), np.tile(terms, (len(rows), 1)), target[rows] / size,
                 weights[image] / weights.mean(), image]
            )  # fmt: skip
            start += len(each[part])
    *columns, image = (np.concatenate(of) for of in zip(*found, strict=True))
    both = _Windows(*(torch.from_numpy(of if of.dtype == np.float16 else of.astype(np.float32))
                      for of in columns))  # fmt: skip
    border = int(np.searchsorted(image, len(off) - max(1, len(off) // _HELD_OUT)))
    return size, both.rows(slice(border)), both.rows(slice(border, None))
