"""How near the blocks come to the machine's limit: `python -m bench.peak`.

For each block and batch size it prints the time and the rate of its products. It also prints the
share of what a large matrix product reaches here in the same precision. Blocks and product take
turns in one run. Products are counted from the exported graph: matrix products and convolutions, 2
operations per multiplication. Writes a JSON file.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bench.capacity.block_times import random_inputs
from bench.observe import hardware, in_words, write_json
from flowturbo.command import run_command
from flowturbo.contract import Role
from flowturbo.errors import FlowTurboError
from flowturbo.local import open_role
from flowturbo.pipeline import read_pipeline
from flowturbo.runtimes import model_file, usable_cores

SIDE = 2048  # of the square matrices of the product
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m bench.peak", description=__doc__)
    add = parser.add_argument
    add("--repository", type=Path, default=Path("model_repository"))
    add("--pipeline", help="default: the default pipeline")
    add("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    add("--rounds", type=int, default=15)
    add("--json", type=Path, help="default: docs/benchmarks/peak_NAME.json")
    args = parser.parse_args(argv)
    return run_command("peak", lambda: _run(args), (FlowTurboError, OSError, ValueError))


def _run(args: argparse.Namespace) -> None:
    pipeline = read_pipeline(args.repository, args.pipeline)
    roles = pipeline.generating
    calls: dict[tuple[str, int], Callable[[], Any]] = {}
    counts: dict[tuple[str, int], float] = {}
    for role in roles:
        model = open_role(args.repository, pipeline, role)
        file = model_file(pipeline.models[role].runtime)
        path = args.repository / pipeline.model(role) / "1" / file
        for rows in args.rows:
            if rows > pipeline.max_rows:
                continue
            inputs = random_inputs(role, rows, pipeline)
            calls[role.value, rows] = partial(model, inputs)
            counts[role.value, rows] = operations(path, inputs)
    products = {
        precision: _product(precision, on_gpu=pipeline.on_gpu)
        for precision in {pipeline.models[role].precision for role in roles}
    }
    taken: dict[Any, list[float]] = defaultdict(list)
    for _ in tqdm(range(args.rounds + 1)):
        for key, call in [*products.items(), *calls.items()]:
            call()  # the first call after another model's is slower
            started = time.perf_counter()
            call()
            taken[key].append(time.perf_counter() - started)
    medians = {key: statistics.median(of[1:]) for key, of in taken.items()}
    peaks = {precision: 2 * SIDE**3 / medians[precision] for precision in products}
    rows_of = []
    for (name, rows), count in counts.items():
        precision = pipeline.models[Role(name)].precision
        rate = count / medians[name, rows]
        rows_of.append(
            {
                "model": name,
                "precision": precision,
                "rows": rows,
                "ms": 1e3 * medians[name, rows],
                "tflops": rate / 1e12,
                "share": rate / peaks[precision],
            }
        )
    found = {
        "hardware": hardware(),
        "pipeline": pipeline.name,
        "peak_tflops": {precision: peak / 1e12 for precision, peak in peaks.items()},
        "blocks": rows_of,
    }
    write_json(found, args.json or Path("docs/benchmarks") / f"peak_{pipeline.name}.json")
    print(markdown(found))


def _product(precision: str, *, on_gpu: bool) -> Callable[[], None]:
    """A product of two square matrices that waits for its result."""
    torch.set_num_threads(usable_cores())
    device = "cuda" if on_gpu else "cpu"
    one, other = torch.randn(2, SIDE, SIDE, device=device).to(_TYPES[precision])

    def multiply() -> None:
        torch.mm(one, other)
        if on_gpu:
            torch.cuda.synchronize()

    return multiply


def operations(path: Path, inputs: dict[str, np.ndarray]) -> float:
    """The floating-point operations of the products in the exported model `path` for `inputs`."""
    if path.suffix == ".pt2":
        return _of_program(path, inputs)
    import openvino

    graph = openvino.Core().read_model(path)
    graph.reshape({name: list(value.shape) for name, value in inputs.items()})
    total = 0.0
    for operation in graph.get_ops():
        kind = operation.get_type_name()
        if kind == "MatMul":
            inner = operation.input(0).get_shape()[
                -2 if operation.get_attributes()["transpose_a"] else -1
            ]
        elif kind in ("Convolution", "GroupConvolution"):
            inner = int(np.prod(operation.input(1).get_shape()[-3:]))
        else:
            continue
        total += 2.0 * inner * float(np.prod(operation.output(0).get_shape()))
    return total


def _of_program(path: Path, inputs: dict[str, np.ndarray]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    from flowturbo.nets.torch_runtime import TorchModel

    with FlopCounterMode(display=False) as counter:
        TorchModel(path, "cpu")(inputs)
    return float(counter.get_total_flops())


def markdown(found: dict[str, Any]) -> str:
    """The table."""
    peaks = ", ".join(f"{of:.2f} TFLOP/s in {name}" for name, of in found["peak_tflops"].items())
    lines = [
        f"{in_words(found['hardware'])}. A product of two matrices of {SIDE} x {SIDE}: {peaks}.",
        "",
        "| block | precision | rows | ms | TFLOP/s | share of the product's |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {of['model']} | {of['precision']} | {of['rows']} | {of['ms']:.2f} | "
        f"{of['tflops']:.3f} | {100 * of['share']:.0f}% |"
        for of in found["blocks"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
