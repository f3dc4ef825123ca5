"""What this machine makes of the step blocks: `python -m bench.gpu_check`.

Times SiT-XL/2's blocks (random weights) in every engine and precision that is here, then whole
schedules with the decoder, beside the paper's figures. Writes a JSON file and a plot. Without a GPU
it does the same with small networks, which says nothing about speed and that all of it works.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bench.networks import SIZES, Size, matrix_flops, pipeline_modules
from export.deployment import Deployment
from export.engine import build_engine, find_builders
from export.onnx_graph import PRECISIONS, Exported, export_onnx, to_precision
from export.quantize import quantize
from flowturbo import contract
from flowturbo.errors import RepositoryError
from flowturbo.generate import generate, program_for
from flowturbo.guidance import Tensors
from flowturbo.nets.sit import refiner_config
from flowturbo.program import Variant
from flowturbo.repository import Pipeline, Settings
from flowturbo.request import parse_request
from flowturbo.runtimes import open_model
from flowturbo.schedule import Schedule

# ms/img at batch 8, guidance 1.5, one A800: FlowTurbo, tables 1 and 5. H8 compiled is 68.0.
PAPER_MS = {
    "H1P5R3": 38.3,
    "H2P4R2": 41.6,
    "H5P7R3": 72.5,
    "H8P9R5": 100.3,
    "H8": 89.4,
    "H15": 154.8,
    "H24": 240.6,
}
ENGINES = ("PyTorch", "ONNX", "TensorRT")


class Form(Protocol):
    """One model in one engine and precision."""

    def hold(self, inputs: Tensors) -> Callable[[], None]:
        """What evaluates once, with `inputs` already where they are needed, and waits for it."""
        ...

    def __call__(self, inputs: Tensors) -> tuple[np.ndarray, ...]: ...


class TorchForm:
    """A PyTorch module, as it is or compiled."""

    def __init__(self, exported: Exported, precision: str, device: str, compiled: bool) -> None:
        self._names = [spec.name for spec in contract.COMPOSED[exported.model][0]]
        module = deepcopy(exported.module)
        to_precision(module, precision)
        module = module.to(device)
        self._device = device
        # Records CUDA graphs on a GPU.
        self._module: Any = torch.compile(module, mode="reduce-overhead") if compiled else module

    def hold(self, inputs: Tensors) -> Callable[[], None]:
        held = self._moved(inputs)

        def run() -> None:
            with torch.inference_mode():
                self._module(*held)
            if self._device == "cuda":
                torch.cuda.synchronize()

        return run

    def __call__(self, inputs: Tensors) -> tuple[np.ndarray, ...]:
        with torch.inference_mode():
            outputs = self._module(*self._moved(inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(output.cpu().numpy() for output in outputs)

    def _moved(self, inputs: Tensors) -> list[torch.Tensor]:
        return [torch.from_numpy(inputs[name]).to(self._device) for name in self._names]


class ArrayForm:
    """An engine that takes and gives arrays; its time includes their way there and back."""

    def __init__(self, model: Callable[[Tensors], tuple[np.ndarray, ...]]) -> None:
        self._model = model

    def hold(self, inputs: Tensors) -> Callable[[], None]:
        return lambda: (self._model(inputs), None)[1]

    def __call__(self, inputs: Tensors) -> tuple[np.ndarray, ...]:
        return self._model(inputs)


@dataclass(frozen=True)
class BlockTime:
    """`ms` of one evaluation; `peak_fraction` of the matrix peak; error relative to float32."""

    engine: str
    precision: str
    model: str
    rows: int
    ms: float
    peak_fraction: float | None
    error: float
    memory_mb: float | None


@dataclass(frozen=True)
class ScheduleTime:
    """`ms_per_image` of guided images, decoder included, in batches of `batch`."""

    engine: str
    precision: str
    schedule: str
    batch: int
    ms_per_image: float
    paper_ms: float | None


def main() -> None:
    """Measures, prints, and writes the report."""
    args = _parser().parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = args.size or ("xl" if device == "cuda" else "small")
    size = SIZES[name]
    torch.backends.cuda.matmul.allow_tf32 = False
    peaks = {p: _matrix_peak(p, device, size.measure_s) for p in PRECISIONS}
    if device == "cpu":  # whose engines compute halves in whatever is fastest
        peaks = dict.fromkeys(PRECISIONS, max(peaks.values()))
    report: dict[str, Any] = {
        "size": name,
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "matrix_peak_tflops": {p: round(peak / 1e12, 3) for p, peak in peaks.items()},
        "blocks": [],
        "schedules": [],
    }
    print(f"{report['device']}: matrix peak, TFLOP/s: {report['matrix_peak_tflops']}", flush=True)
    exports = pipeline_modules(size)
    reference: dict[tuple[str, int], np.ndarray] = {}
    with tempfile.TemporaryDirectory() as scratch:
        wanted = args.engines, args.precisions
        for engine, precision, forms in _forms(exports, device, Path(scratch), *wanted):
            times = list(_blocks(engine, precision, forms, exports, size, peaks, reference))
            report["blocks"] += map(asdict, times)
            report["schedules"] += map(asdict, _schedules(engine, precision, forms, size))
            forms.clear()  # before the next form is made
            torch.cuda.empty_cache()
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")  # so far: nothing is lost
    plot(report, args.out.with_suffix(".png"))
    print(f"written: {args.out}, {args.out.with_suffix('.png')}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), help="default: xl on a GPU, else small")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="default: all"
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default: all"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/gpu_check.json"))
    return parser


def _forms(
    exports: list[Exported],
    device: str,
    scratch: Path,
    engines: Sequence[str],
    precisions: Sequence[str],
) -> Iterator[tuple[str, str, dict[str, Form]]]:
    """Those of `engines` and `precisions` that are here, one in memory at a time.

    Float32 PyTorch comes first, whatever is wanted: others are compared with it.
    """
    wanted = [p for p in precisions if p != "fp8"] if "PyTorch" in engines else []
    for precision in dict.fromkeys(("fp32", *wanted)):
        for compiled in (False, True) if device == "cuda" else (False,):
            label = "PyTorch compiled" if compiled else "PyTorch"
            yield (
                label,
                precision,
                {e.model: TorchForm(e, precision, device, compiled) for e in exports},
            )
    for precision in precisions if set(engines) & {"ONNX", "TensorRT"} else ():
        paths = {e.model: scratch / precision / e.model / "1" / "model.onnx" for e in exports}
        for exported in exports:
            paths[exported.model].parent.mkdir(parents=True)
            half = replace(exported, module=deepcopy(exported.module))
            to_precision(half.module, precision)
            export_onnx(half, paths[exported.model])
            if precision == "fp8" and exported.model != contract.DECODER:
                quantize(half, paths[exported.model])
        makers = {"ONNX": _onnx_forms, "TensorRT": _tensorrt_forms}
        for engine, make in ((name, makers[name]) for name in makers if name in engines):
            try:
                yield make(precision, paths, device)
            except Exception as error:  # one form that fails must not end the measurement
                print(f"{engine} {precision}: not measured: {error}", flush=True)


def _onnx_forms(
    precision: str, paths: dict[str, Path], device: str
) -> tuple[str, str, dict[str, Form]]:
    models = {name: open_model(path, precision) for name, path in paths.items()}
    if device == "cuda" and not all(model.on_gpu for model in models.values()):
        raise RepositoryError("the ONNX runtime here does not use the GPU: install onnxruntime-gpu")
    runtime = type(next(iter(models.values()))).__name__.removesuffix("Model")
    return runtime, precision, {name: ArrayForm(model) for name, model in models.items()}


def _tensorrt_forms(
    precision: str, paths: dict[str, Path], _device: str
) -> tuple[str, str, dict[str, Form]]:
    builder = find_builders(None)[0]
    engines: dict[str, Form] = {}
    for name, path in paths.items():
        plan, cache = path.with_suffix(".plan"), path.parents[3] / "timing.cache"
        build_engine(builder, path, plan, Deployment().profiles, cache)
        engines[name] = ArrayForm(builder.load(plan))
    return "TensorRT", precision, engines


def _blocks(
    engine: str,
    precision: str,
    forms: dict[str, Form],
    exports: list[Exported],
    size: Size,
    peaks: dict[str, float],
    reference: dict[tuple[str, int], np.ndarray],
) -> Iterator[BlockTime]:
    flops = {
        contract.PREDICTOR: lambda rows: matrix_flops(size.config, rows),
        # Two evaluations a step.
        contract.REFINER: lambda rows: 2 * matrix_flops(refiner_config(size.config), rows),
    }
    for exported in exports:
        for rows in size.rows:
            inputs = {k: v.numpy() for k, v in exported.random_inputs(rows, seed=rows).items()}
            form = forms[exported.model]
            output = form(inputs)[0].astype(np.float64)
            want = reference.setdefault((exported.model, rows), output)
            seconds = _median_seconds(form.hold(inputs), size.measure_s)
            counted = flops.get(exported.model)
            fraction = counted(rows) / seconds / peaks[precision] if counted else None
            error = float(np.abs(output - want).max() / np.abs(want).max())
            time_ms = BlockTime(
                engine, precision, exported.model, rows, seconds * 1e3, fraction, error, _memory()
            )
            share = f"{fraction:6.1%} of peak" if fraction else " " * 14
            print(
                f"{engine:<17} {precision} {exported.model:<18} {rows:3} rows "
                f"{time_ms.ms:9.3f} ms {share}  error {error:.1e}",
                flush=True,
            )
            yield time_ms


def _schedules(
    engine: str, precision: str, forms: dict[str, Form], size: Size
) -> Iterator[ScheduleTime]:
    """Whole requests through the program that the server runs."""
    config = size.config
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    pipeline = Pipeline(shape, config.num_classes, (), max(size.rows), True, True)

    def infer(model: str, tensors: Tensors) -> tuple[np.ndarray, ...]:
        return forms[model](tensors)

    for schedule, paper in PAPER_MS.items():
        program = program_for(Schedule.parse(schedule), Variant.REFERENCE)
        for batch in size.batches:
            tensors: Tensors = {
                "label": np.arange(batch) % config.num_classes,
                "seed": np.arange(batch),
                "guidance_scale": np.array([1.5], dtype=np.float32),
                "schedule": np.array([schedule], dtype=object),
            }
            request = parse_request(tensors, ["image"], pipeline, Settings())

            def run(request: Any = request, program: Any = program) -> None:
                generate(request, pipeline, program, infer)

            ms = _median_seconds(run, size.measure_s) * 1e3 / batch
            at_paper = paper if batch == 8 else None
            beside = f"  (paper, A800: {paper})" if at_paper and size is SIZES["xl"] else ""
            print(f"{engine:<17} {precision} {schedule:<7} batch {batch}: {ms:9.2f} ms/img{beside}")
            yield ScheduleTime(engine, precision, schedule, batch, ms, at_paper)


def _median_seconds(run: Callable[[], None], measure_s: float) -> float:
    run()  # compiles, captures, allocates
    run()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < measure_s and len(times) < 50):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _matrix_peak(precision: str, device: str, measure_s: float) -> float:
    """FLOP/s of a large square matrix product: what this chip gives in practice."""
    side = 8192 if device == "cuda" else 512
    a = torch.randn(side, side, device=device).to(PRECISIONS[precision])

    def run() -> None:
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * side**3 / _median_seconds(run, measure_s)


def _memory() -> float | None:
    """MB in use on the GPU, by every engine and all else."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e6


def plot(report: dict[str, Any], path: Path) -> None:
    """Milliseconds a row of the predictor against rows, and ms/img of every schedule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    forms = list(dict.fromkeys((b["engine"], b["precision"]) for b in report["blocks"]))
    for engine, precision in forms:
        points = [
            (b["rows"], b["ms"] / b["rows"])
            for b in report["blocks"]
            if (b["engine"], b["precision"], b["model"]) == (engine, precision, contract.PREDICTOR)
        ]
        left.plot(*zip(*points, strict=True), marker="o", label=f"{engine} {precision}")
    left.set(
        xscale="log", yscale="log", xlabel="rows", ylabel="ms a row", title="velocity predictor"
    )
    rows = sorted({b["rows"] for b in report["blocks"]})
    left.set_xticks(rows, [str(count) for count in rows])
    left.minorticks_off()
    left.legend(fontsize=8)
    batch = max(s["batch"] for s in report["schedules"])
    width = 0.9 / (len(forms) + 1)
    for k, (engine, precision) in enumerate(forms):
        heights = [
            s["ms_per_image"]
            for s in report["schedules"]
            if (s["engine"], s["precision"], s["batch"]) == (engine, precision, batch)
        ]
        right.bar(np.arange(len(heights)) + k * width, heights, width)
    if report["size"] == "xl":
        x = np.arange(len(PAPER_MS)) + len(forms) * width
        right.bar(x, list(PAPER_MS.values()), width, color="black", label="paper, A800")
        right.legend(fontsize=8)
    right.set_xticks(np.arange(len(PAPER_MS)) + 0.4, list(PAPER_MS), fontsize=8)
    right.set(
        ylabel=f"ms/img, batch {batch}, with decoder", title=f"{report['device']}", yscale="log"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
