"""The time of each block at each batch size, read from a file or measured here."""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo.contract import Role, latent_sizes
from flowturbo.local import open_role
from flowturbo.pipeline import Pipeline, read_pipeline
from flowturbo.textfile import read_json

ROWS = (1, 2, 4, 8, 16, 32, 64)
REPETITIONS = 7
OVERHEAD_MS = 0.75  # from one batch to the next, through orchestrator and server


@dataclass(frozen=True)
class BlockTimes:
    """Milliseconds per execution by role and rows; `overhead_ms` per call, outside the device.

    Raises ValueError for an unknown or missing model, and for an invalid time.
    """

    times_ms: Mapping[str, Mapping[int, float]]
    overhead_ms: float = OVERHEAD_MS

    def __post_init__(self) -> None:
        if unknown := set(self.times_ms) - {*Role}:
            allowed = ", ".join(Role)
            raise ValueError(f"block times of {min(unknown)!r}: the models are {allowed}")
        if not self.times_ms.get(Role.PREDICTOR):
            raise ValueError(f"no block times of {Role.PREDICTOR}")
        for model, of_rows in self.times_ms.items():
            if not of_rows:
                raise ValueError(f"no block times of {model}")
            for rows, ms in of_rows.items():
                if rows < 1 or not 0 < ms < math.inf:
                    raise ValueError(f"{model}: {ms} ms at {rows} rows, both must be above 0")
        if not 0 <= self.overhead_ms < math.inf:
            raise ValueError(f"overhead_ms must be at least 0, got {self.overhead_ms}")

    @classmethod
    def read(
        cls, path: Path, engine: str | None = None, precision: str | None = None
    ) -> "BlockTimes":
        """Reads a JSON file: {"times_ms": {role: {rows: ms}}}, or a report of bench.gpu_check."""
        document = read_json(path)
        if not {"times_ms", "blocks"} & document.keys():
            raise ValueError(f"{path} has neither 'times_ms' nor the 'blocks' of bench.gpu_check")
        overhead = float(document.get("overhead_ms", OVERHEAD_MS))
        times = document.get("times_ms") or _of_blocks(document["blocks"], engine, precision)
        try:
            numbers = {
                m: {int(rows): float(ms) for rows, ms in t.items()} for m, t in times.items()
            }
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"{path}: times_ms must be {{model: {{rows: ms}}}}: {error}"
            ) from error
        return cls(numbers, overhead)

    @property
    def max_rows(self) -> int:
        """The largest row count up to which all models are measured."""
        return min(max(of_rows) for of_rows in self.times_ms.values())

    def table(self, model: str, max_rows: int) -> tuple[float, ...]:
        """Milliseconds at 0, 1, ... `max_rows` rows, linear between measured row counts.

        Below the smallest measured row count the time is constant.
        """
        measured = sorted(self.times_ms.get(model, {}).items())
        if not measured or measured[-1][0] < max_rows:
            most = f"only up to {measured[-1][0]} rows" if measured else "at no row count"
            raise ValueError(f"{model} is measured {most}, {max_rows} rows are needed")
        rows, ms = zip(*measured, strict=True)
        return tuple(map(float, np.interp(range(max_rows + 1), rows, ms)))


def _of_blocks(
    blocks: list[dict[str, Any]], engine: str | None, precision: str | None
) -> dict[str, dict[int, float]]:
    """The times of one engine and precision; either may be None if one pair matches."""
    forms = sorted({(b["engine"], b["precision"]) for b in blocks})
    chosen = [f for f in forms if engine in (None, f[0]) and precision in (None, f[1])]
    if len(chosen) != 1:
        raise ValueError(
            f"--engine {engine} --precision {precision} matches {len(chosen)} of the report's "
            f"{', '.join(map(' '.join, forms))}: name one"
        )
    times: dict[str, dict[int, float]] = defaultdict(dict)
    for block in (b for b in blocks if (b["engine"], b["precision"]) == chosen[0]):
        times[block["model"]][block["rows"]] = block["ms"]
    return dict(times)


def measure(
    repository: Path,
    repetitions: int = REPETITIONS,
    sizes: tuple[int, ...] = ROWS,
    clock: Callable[[], float] = time.perf_counter,
    name: str | None = None,
) -> dict[str, dict[int, float]]:
    """Median milliseconds of a pipeline's models by rows, measured in turn in this process.

    The encoder of images is left out: generation does not call it.

    `name` None is the default pipeline of `repository`. Row counts are those `sizes` that the
    models allow. `clock` returns seconds.
    """
    pipeline = read_pipeline(repository, name)
    models = {role: open_role(repository, pipeline, role) for role in pipeline.generating}
    taken: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(repetitions + 1):
        for rows in (n for n in sizes if n <= pipeline.max_rows):
            for role, model in models.items():
                inputs = random_inputs(role, rows, pipeline)
                started = clock()
                model(inputs)
                taken[role.value, rows].append((clock() - started) * 1e3)
    medians: dict[str, dict[int, float]] = defaultdict(dict)
    for name, rows in sorted(taken):
        medians[name][rows] = statistics.median(taken[name, rows][1:])  # the first call warms up
    return dict(medians)


def random_inputs(role: Role, rows: int, pipeline: Pipeline) -> dict[str, np.ndarray]:
    """Inputs of a block by name, [rows, ...] each, that mean nothing but have all values finite."""
    sizes = latent_sizes(pipeline.latent_shape)
    numbers = np.random.default_rng(rows)  # in [0, 1): labels and pair offsets become 0
    return {
        spec.name: numbers.random((rows, *(sizes[d] if d in sizes else int(d) for d in spec.dims)))
        .astype(spec.dtype)
        for spec in pipeline.tensors(role)[0]
    }  # fmt: skip
