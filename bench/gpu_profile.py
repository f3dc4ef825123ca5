"""Profiles SiT-XL/2 on this GPU: `python -m bench.gpu_profile`.

There are five parts. `products` are the matrix products of a layer in each precision. `attention`
compares PyTorch's kernels and head sizes. `step` lists the kernels of one compiled step. `decoder`
compares both memory layouts. `trajectory` runs a whole trajectory as one CUDA graph: it bounds the
gain from removing all work of the host. The report is written after each measurement. Without a GPU
the networks are small and there are no graphs: that tests this program, not the speed.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.baseline import sample_plainly
from bench.gpu_check import TorchForm, matrix_peak, median_seconds
from bench.networks import SIZES, Size, pipeline_modules, random_network, random_vae
from export.onnx_graph import PRECISIONS, to_precision
from flowturbo.nets.sit import refiner_config
from flowturbo.nets.vae import Decoder
from flowturbo.solver.schedule import Schedule

Measured = dict[str, float]

SCHEDULE, SCALE = "H1P5R3", 1.5
PRODUCTS = ("fp32", "fp16", "bf16", "fp8")
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
HEAD_SIZES = (72, 80, 96, 128)  # SiT-XL/2 has 72; kernels may need a multiple of 16 or 32
_TOP = 15  # kernels per step in the report


class Machine:
    """The device, the networks' size and the batch's rows."""

    def __init__(self, size: Size, rows: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.size, self.rows = size, rows

    def median_ms(self, run: Callable[[], object]) -> float:
        """Median milliseconds of `run`, until the GPU has finished the work that it starts."""

        def whole() -> None:
            with torch.inference_mode():
                run()
            if self.device == "cuda":
                torch.cuda.synchronize()

        return median_seconds(whole, self.size.measure_s) * 1e3

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normal random numbers on the device: zeros would draw less power and run faster."""
        return torch.randn(*shape, device=self.device).to(dtype)


def products(machine: Machine) -> Iterator[dict[str, Any]]:
    """A layer's four products at the batch's rows, and all modulations as one product."""
    config = machine.size.config
    width, hidden = config.width, round(config.width * config.mlp_ratio)
    tokens = machine.rows * config.tokens_per_side**2
    shapes = {
        "qkv": (tokens, 3 * width, width),
        "proj": (tokens, width, width),
        "fc1": (tokens, hidden, width),
        "fc2": (tokens, width, hidden),
        "all modulations": (machine.rows, 6 * config.depth * width, width),
    }
    for precision in PRODUCTS:
        for name, (rows, columns, inner) in shapes.items():
            yield from _tried(
                {"product": name, "precision": precision, "shape": [rows, columns, inner]},
                *(_product, machine, rows, columns, inner, precision),
            )


def _product(machine: Machine, rows: int, columns: int, inner: int, precision: str) -> Measured:
    if precision == "fp8":
        kind = torch.float8_e4m3fn
        a = machine.random(rows, inner, dtype=kind)
        b = machine.random(columns, inner, dtype=kind).t()
        one = torch.ones((), device=machine.device)

        def run() -> Tensor:
            out: Tensor = torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16)
            return out
    else:
        layer = nn.Linear(inner, columns, device=machine.device, dtype=PRECISIONS[precision])
        x = machine.random(rows, inner, dtype=PRECISIONS[precision])

        def run() -> Tensor:
            out: Tensor = layer(x)
            return out

    ms = machine.median_ms(run)
    return {"ms": ms, "tflops": 2 * rows * columns * inner / ms / 1e9}


def attention(machine: Machine) -> Iterator[dict[str, Any]]:
    """A layer's attention at the batch's rows, by kernel and head size, in bf16."""
    config = machine.size.config
    for head in HEAD_SIZES:
        shape = (machine.rows, config.num_heads, config.tokens_per_side**2, head)
        inputs = [machine.random(*shape) for _ in range(3)]
        for name, kernel in KERNELS.items():
            yield from _tried({"kernel": name, "head": head}, _attention, machine, kernel, inputs)


def _attention(machine: Machine, kernel: SDPBackend, inputs: list[Tensor]) -> Measured:
    q, k, v = inputs
    with sdpa_kernel(kernel):
        return {"ms": machine.median_ms(lambda: F.scaled_dot_product_attention(q, k, v))}


def step(machine: Machine) -> Iterator[dict[str, Any]]:
    """The longest kernels of one predictor call in bf16, which is compiled on a GPU."""
    exported = pipeline_modules(machine.size)[0]
    on_gpu = machine.device == "cuda"
    form = TorchForm(exported, "bf16", machine.device, compiled=on_gpu)
    inputs = exported.random_inputs(machine.rows, seed=0)
    run = form.hold({name: value.numpy() for name, value in inputs.items()})
    ms = median_seconds(run, machine.size.measure_s) * 1e3
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=kinds) as profile:
        run()
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = profile.key_averages()
    if on_gpu:  # host events include the time of the kernels that they start
        events = [e for e in events if e.device_type.name == "CUDA"]
    ordered = sorted(events, key=lambda event: -getattr(event, spent))
    total = sum(getattr(event, spent) for event in ordered)
    yield {"ms": ms, "kernels_ms": total / 1e3, "kernels": len(ordered)}
    for event in ordered[:_TOP]:
        micros = getattr(event, spent)
        share = micros / total if total else math.nan
        yield {"kernel": event.key, "count": event.count, "ms": micros / 1e3, "share": share}


def decoder(machine: Machine) -> Iterator[dict[str, Any]]:
    """The decoder on a batch of images, in both half precisions and both memory layouts."""
    config, images = machine.size.config, max(1, machine.rows // 2)
    side = config.latent_size
    vae = random_vae(machine.size.vae_channels, config.latent_channels)
    for precision in ("bf16", "fp16"):
        for layout in (torch.contiguous_format, torch.channels_last):
            module = Decoder(deepcopy(vae))
            to_precision(module, precision)
            module = module.to(machine.device)
            for weight in module.parameters():
                if weight.dim() == 4:
                    weight.data = weight.data.contiguous(memory_format=layout)
            run = _fast(module) if machine.device == "cuda" else module
            latent = machine.random(images, config.latent_channels, side, side, dtype=torch.float32)
            told = {"precision": precision, "layout": str(layout).removeprefix("torch.")}
            yield from _tried(
                told | {"images": images}, _per_image, machine, images, partial(run, latent)
            )


def trajectory(machine: Machine) -> Iterator[dict[str, Any]]:
    """Guided images of SCHEDULE, decoder included, in bf16; on a GPU compiled and as one graph."""
    size, on_gpu = machine.size, machine.device == "cuda"
    config = size.config
    networks = [
        random_network(config, 0),
        random_network(refiner_config(config), 1),
        Decoder(random_vae(size.vae_channels, config.latent_channels)),
    ]
    for network in networks:
        to_precision(network, "bf16")
        network.to(machine.device)
    predict, refine, decode = [_fast(network) for network in networks] if on_gpu else networks
    steps = Schedule.parse(SCHEDULE).steps
    for images in sorted({*size.batches, 2 * machine.rows}):
        shape = (images, *config.latent_shape)
        noise = machine.random(*shape, dtype=torch.float32)
        x = torch.cat([noise, noise])
        label = torch.zeros(2 * images, dtype=torch.long, device=machine.device)
        label[images:] = config.num_classes

        def run(x: Tensor = x, label: Tensor = label, images: int = images) -> Tensor:
            latent = sample_plainly(predict, refine, x, label, steps, SCALE)
            out: Tensor = decode(latent[:images])
            return out

        told = {"schedule": SCHEDULE, "images": images}
        yield from _tried(told | {"graph": False}, _per_image, machine, images, run)
        if on_gpu:
            yield from _tried(told | {"graph": True}, _per_graph, machine, images, run)


def _per_image(machine: Machine, images: int, run: Callable[[], object]) -> Measured:
    return {"ms_per_image": machine.median_ms(run) / images}


def _per_graph(machine: Machine, images: int, run: Callable[[], object]) -> Measured:
    return _per_image(machine, images, _captured(run))


def _fast(module: nn.Module) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(module, dynamic=False)
    return compiled


def _captured(run: Callable[[], object]) -> Callable[[], None]:
    """`run` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode():
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    return graph.replay


def _tried(
    told: dict[str, Any], measure: Callable[..., Measured], *arguments: Any
) -> Iterator[dict[str, Any]]:
    """`told` with the measurement, or with the reason for its failure."""
    try:
        yield told | measure(*arguments)
    except Exception as error:  # the other measurements must not be lost
        yield told | {"failed": str(error).partition("\n")[0]}


PARTS = {each.__name__: each for each in (products, attention, step, decoder, trajectory)}


def main() -> None:
    """Measures the parts in turn, prints, and writes the report after each measurement."""
    args = _parser().parse_args()
    until = time.monotonic() + 60 * args.minutes
    on_gpu = torch.cuda.is_available()
    name = args.size or ("xl" if on_gpu else "small")
    machine = Machine(SIZES[name], args.rows)
    report: dict[str, Any] = {
        "size": name,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "rows": args.rows,
        "matrix_peak_tflops": matrix_peak("bf16", machine.device, machine.size.measure_s) / 1e12,
        "left_out": [],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        if time.monotonic() > until:
            report["left_out"].append(f"{part}: time limit of {args.minutes:g} min reached")
            print(f"left out: {report['left_out'][-1]}", flush=True)
            continue
        report[part] = []
        for measured in PARTS[part](machine):
            report[part].append(measured)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
            print(part, *(f"{key}={_short(value)}" for key, value in measured.items()), flush=True)
        if on_gpu:
            torch.cuda.empty_cache()
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {args.out}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_profile", description=__doc__)
    add = parser.add_argument
    add("--size", choices=tuple(SIZES), help="default: xl on a GPU, else small")
    add("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="default: all")
    add("--rows", type=int, default=16, help="per batch: two per guided image")
    add("--minutes", type=float, default=math.inf, help="start no further part after this time")
    add("--out", type=Path, default=Path("docs/benchmarks/gpu_profile.json"))
    return parser


if __name__ == "__main__":
    main()
