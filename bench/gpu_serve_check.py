"""Measures the service on this machine without TensorRT: `python -m bench.gpu_serve_check`.

Exports SiT-XL/2 with random weights for the torch runtime and serves it with Triton. Measures
requests of 1 and 8 images, and 1, 8 and 32 clients. Compares them with an estimate
(bench/estimate.py). Later runs reuse weights and models. Without a GPU the networks are small.
"""

import argparse
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from flowturbo_client import FlowTurboClient

from bench.closed_loop import Work, closed_loop
from bench.estimate import Chip, request_ms
from bench.gpu_check import find_chip, matrix_peak
from bench.networks import SIZES
from bench.xl_check import checkpoints
from export.__main__ import main as export
from flowturbo.gpu import gpu_count
from flowturbo.serving.tritonserver import running_server
from flowturbo.solver.program import compile_program
from flowturbo.solver.schedule import Schedule

SCHEDULE, SCALE = "H1P5R3", 1.5
LOADS = ((1, 1), (8, 1), (1, 8), (1, 32))  # images per request, clients
_READY_S = 1800  # for compilation and CUDA graph capture


@dataclass(frozen=True)
class Served:
    """A load and its result: images/s, median and 95th percentile of latency in ms."""

    images: int
    clients: int
    images_per_s: float
    p50_ms: float
    p95_ms: float
    estimate_ms_per_image: float | None


def main() -> None:
    """Exports, serves, measures, and writes the report after each load."""
    args = _parser().parse_args()
    until = time.monotonic() + 60 * args.minutes
    on_gpu = torch.cuda.is_available()
    name = args.size or ("xl" if on_gpu else "small")
    # In a separate process, which frees its memory at the end.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        source = pool.submit(checkpoints, args.folder, name).result()
    repository = args.folder / f"served-{name}"
    precision = args.precision or ("bf16" if on_gpu else "fp32")
    words = [word for option in source.items() for word in option]
    words += ["--runtime", "torch", "--precision", precision, "--ensemble", SCHEDULE]
    if status := export([*words, "--repository", str(repository)]):
        raise SystemExit(status)
    chip = find_chip(matrix_peak(precision, "cuda", 0.5)) if on_gpu else None
    report: dict[str, Any] = {
        "size": name,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores",
        "gpus": gpu_count(),
        "precision": precision,
        "schedule": SCHEDULE,
        "chip": asdict(chip) if chip else None,
        "loads": [],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    log = args.out.with_suffix(".log")
    with (
        running_server(repository, log_path=log, timeout_s=_READY_S) as address,
        FlowTurboClient(address.grpc) as client,
    ):
        for images, clients in LOADS:
            if time.monotonic() > until:
                print(f"left out: {clients} clients, {images} images per request", flush=True)
                continue
            served = _measure(client, images, clients, args.seconds, chip, name)
            report["loads"].append(asdict(served))
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {args.out}; the server's log: {log}")


def _measure(
    client: FlowTurboClient, images: int, clients: int, seconds: float, chip: Chip | None, size: str
) -> Served:
    work = Work(SCHEDULE, images, SCALE)
    labels, seeds, schedule, scale = work.arguments()
    found = closed_loop(
        lambda: client.generate(labels, seeds, schedule, guidance_scale=scale),
        clients,
        seconds,
        images,
    )
    estimate = None
    if chip:  # a single request runs on the ensemble, others share batches with all clients
        program, together = compile_program(Schedule.parse(SCHEDULE)), images * clients
        config = SIZES[size].config
        estimate = request_ms(chip, config, program, together, calls=clients > 1) / together
    served = Served(
        images, clients, found.images_per_s, found.percentile(50), found.percentile(95), estimate
    )
    beside = f" (estimate {estimate:.2f})" if estimate else ""
    print(
        f"{clients:2} clients, {images} images per request: {served.images_per_s:8.2f} images/s, "
        f"{1e3 / served.images_per_s:.2f} ms/img{beside}, p50 {served.p50_ms:.1f} ms, "
        f"p95 {served.p95_ms:.1f} ms",
        flush=True,
    )
    return served


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_serve_check", description=__doc__)
    add = parser.add_argument
    add("--size", choices=tuple(SIZES), help="default: xl on a GPU, else small")
    add("--precision", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, else fp32")
    add("--seconds", type=float, default=10.0, help="per load")
    add("--minutes", type=float, default=math.inf, help="start no further load after this time")
    add("--folder", type=Path, default=Path("runs/xl"), help="for weights and models (5 GB)")
    add("--out", type=Path, default=Path("docs/benchmarks/gpu_serve_check.json"))
    return parser


if __name__ == "__main__":
    main()
