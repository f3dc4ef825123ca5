"""Where the sums of earlier velocities are formed: `python -m bench.history`.

The service sums them before it calls a block. The block then reads two latents per row, as for all
other schedules. The other way is a block that reads all velocities. It needs no sums. But every
velocity goes through shared memory with each call, which copies it twice. This measures both, and
the linear operator of learned solvers, for latents of several sizes. The ways take turns.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.observe import hardware, in_words, write_json
from flowturbo.command import run_command
from flowturbo.solver.calls import PredictorCall
from flowturbo.solver.operator import SIDES, Operator

SHAPES = ((4, 16, 16), (4, 32, 32), (16, 64, 64), (16, 128, 128))
VELOCITIES = 6  # earlier ones, as in the last call of a solver with 7 evaluations
_COPIES = 2  # into the shared memory, and out of it


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.history", description=__doc__)
    add = parser.add_argument
    add("--images", type=int, nargs="+", default=[1, 8])
    add("--rounds", type=int, default=30)
    add("--json", type=Path, default=Path("docs/benchmarks/history.json"))
    args = parser.parse_args(argv)
    return run_command("history", lambda: _run(args), (OSError, ValueError))


def _run(args: argparse.Namespace) -> None:
    found = [
        {"shape": shape, "images": images, **_measured(shape, images, args.rounds)}
        for shape in SHAPES
        for images in args.images
    ]
    write_json({"hardware": hardware(), "velocities": VELOCITIES, "found": found}, args.json)
    print(markdown({"hardware": hardware(), "found": found}))


def _measured(shape: tuple[int, int, int], images: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each way, and bytes per call."""
    rng = np.random.default_rng(0)
    x, *velocities = rng.standard_normal((VELOCITIES + 2, images, *shape)).astype(np.float32)
    earlier = velocities[:-1]
    call = PredictorCall(0, 0.5, 0.5, 0.6, (), tuple(0.1 for _ in earlier), 0.1)
    ways: dict[str, Callable[[], Any]] = {
        "sums_ms": lambda: call.inputs(x, earlier),
        "copies_ms": lambda: [v.copy() for v in earlier for _ in range(_COPIES)],
    }
    for side in SIDES:
        rows = (len(velocities) + 1) * shape[0] * side**2 + 1
        outputs = shape[0] * (4 if side == 4 else 1)
        matrix = rng.standard_normal((rows, outputs)).astype(np.float32)
        operator = Operator(matrix, side, len(velocities))
        ways[f"operator_{side}_ms"] = lambda op=operator: op(x, velocities)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name].append(1e3 * (time.perf_counter() - began))
    medians = {name: statistics.median(of) for name, of in times.items()}
    return {**medians, "history_bytes": sum(v.nbytes for v in earlier), "bytes": 2 * x.nbytes}


def markdown(found: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"{in_words(found['hardware'])}. {VELOCITIES} earlier velocities, milliseconds per call.",
        "",
        "| latent | images | inputs of the block | with all velocities | sums | copies of them | "
        "operator 1x1 | operator 4x4 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["found"]:
        shape = " x ".join(map(str, row["shape"]))
        lines.append(
            f"| {shape} | {row['images']} | {row['bytes'] / 1024:.0f} KB | "
            f"{(row['bytes'] / 2 + row['history_bytes']) / 1024:.0f} KB | {row['sums_ms']:.3f} | "
            f"{row['copies_ms']:.3f} | {row['operator_1_ms']:.3f} | {row['operator_4_ms']:.3f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
