"""Measures time per image against latent size: `python -m bench.latent_size`.

The networks have the glyphs model's width and depth and random weights. They run in this process,
in the runtime and precision of a repository. The decoder is left out: its work is linear in the
pixels.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.load import fitted_line
from bench.networks import GLYPHS, random_network
from export.onnx_graph import ExportTarget
from export.runtime import export_for
from flowturbo.conditions.class_label import LABEL, ClassLabel
from flowturbo.contract import LATENT, SEED, Role
from flowturbo.generate import generate, program_of
from flowturbo.nets.blocks import PredictorBlock, RefinerBlock
from flowturbo.nets.sit import ByLabel, SiTConfig, refiner_config
from flowturbo.pipeline import read_pipeline
from flowturbo.request import parse_request
from flowturbo.rows import Tensors
from flowturbo.runtimes import open_model
from flowturbo.settings import Settings
from flowturbo.solver.calls import Variant

SIDES = (8, 16, 24, 32)
REPETITIONS = 9


def main() -> None:
    """Prints and writes the times and the fitted line."""
    parser = argparse.ArgumentParser(prog="python -m bench.latent_size", description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--side", type=int, nargs="+", default=SIDES)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/latent_size.json"))
    args = parser.parse_args()
    runs = {side: Run(replace(GLYPHS, latent_size=side), args.repository) for side in args.side}
    times: dict[int, list[float]] = {side: [] for side in runs}
    for _ in range(REPETITIONS + 1):
        for side, run in runs.items():  # in turn, because the machine's speed drifts
            times[side].append(run.milliseconds())
    report = fitted({side: statistics.median(ms[1:]) for side, ms in times.items()})
    for point in report["points"]:
        print(f"side {point['side']:3}, {point['tokens']:4} tokens: {point['ms']:8.1f} ms")
    line = report["line"]
    print(
        f"{line['slope_ms']:.3f} ms per token + {line['intercept_ms']:.1f} ms, largest error "
        f"{line['largest_relative_error']:.0%}"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


class Run:
    """Repeats one guided image with the default schedule."""

    def __init__(self, config: SiTConfig, repository: Path) -> None:
        settings, served = Settings.load(repository), read_pipeline(repository, solvers=False)
        shape = config.latent_shape
        blocks = {
            Role.PREDICTOR: PredictorBlock(ByLabel(random_network(config, 0)), 3),
            Role.REFINER: RefinerBlock(ByLabel(random_network(refiner_config(config), 1)), 3),
        }
        with tempfile.TemporaryDirectory() as scratch:
            self._models = {}
            for role, block in blocks.items():
                exported = ExportTarget(role, block, shape, ClassLabel(config.num_classes))
                path = export_for(served.runtime, exported, Path(scratch))
                opened = open_model(path, served.precision, runtime=served.runtime)
                self._models[role] = opened
        networks = {role: served.models[role] for role in blocks}
        self._pipeline = replace(served, latent_shape=shape, models=networks)
        self._settings = settings
        tensors: Tensors = {LABEL: np.array([0]), SEED: np.array([0])}
        self._request = parse_request(tensors, [LATENT], self._pipeline, settings)
        self._program = program_of(self._request, self._pipeline, Variant(settings.variant))

    def milliseconds(self) -> float:
        """Time of one request."""
        started = time.perf_counter()
        generate(
            self._request,
            self._pipeline,
            self._settings,
            self._program,
            lambda role, tensors: self._models[role](tensors),
        )
        return (time.perf_counter() - started) * 1e3


def fitted(medians_ms: dict[int, float]) -> dict[str, Any]:
    """The points (side, tokens, ms) and their least-squares line over tokens."""
    points: list[dict[str, Any]] = [
        {"side": side, "tokens": (side // GLYPHS.patch_size) ** 2, "ms": ms}
        for side, ms in medians_ms.items()
    ]
    return {
        "points": points,
        "line": fitted_line([p["tokens"] for p in points], [p["ms"] for p in points]),
    }


if __name__ == "__main__":
    main()
