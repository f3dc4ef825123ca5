"""Measures the step blocks on this machine: `python -m bench.gpu_check`.

Times SiT-XL/2's blocks (random weights) in every available engine and precision, then whole
schedules with the decoder. Compares them with the paper's figures and an estimate
(bench/estimate.py). bf16 comes first. The JSON report is written after each form; `--minutes`
limits the time. If all models are measured, a plot follows. Without a GPU the networks are small:
that tests this program, not the speed.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bench.estimate import Chip, predictor_ms, request_ms
from bench.networks import SIZES, Size, matrix_flops, pipeline_modules
from export.deployment import Deployment
from export.engine import Builder, build_engine, find_builders
from export.onnx_graph import PRECISIONS, ExportTarget, export_onnx, to_precision
from export.quantize import quantize
from flowturbo.conditions.class_label import LABEL, ClassLabel
from flowturbo.contract import GUIDANCE_SCALE, IMAGE, LABEL_ROLES, SCHEDULE, SEED, Role
from flowturbo.errors import RepositoryError
from flowturbo.generate import generate, program_for
from flowturbo.gpu import gpu_count
from flowturbo.nets.sit import refiner_config
from flowturbo.pipeline import ModelRecord, Pipeline
from flowturbo.request import parse_request
from flowturbo.rows import Tensors
from flowturbo.runtimes import open_model, runtime_for
from flowturbo.settings import Settings
from flowturbo.solver.calls import Variant
from flowturbo.solver.schedule import Schedule

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
ENGINES = ("PyTorch", "TensorRT", "ONNX")
ORDER = ("bf16", "fp16", "fp8", "fp32")  # the most important first


class Form(Protocol):
    """One model in one engine and precision."""

    def hold(self, inputs: Tensors) -> Callable[[], None]:
        """A function that evaluates once and waits; `inputs` are already on the device."""
        ...

    def __call__(self, inputs: Tensors) -> tuple[np.ndarray, ...]: ...


class TorchForm:
    """A PyTorch module, eager or compiled."""

    def __init__(self, exported: ExportTarget, precision: str, device: str, compiled: bool) -> None:
        self._names = [spec.name for spec in exported.tensors[0]]
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
    """An engine with array inputs and outputs; its time includes their transfers."""

    def __init__(self, model: Callable[[Tensors], tuple[np.ndarray, ...]]) -> None:
        self._model = model

    def hold(self, inputs: Tensors) -> Callable[[], None]:
        return lambda: (self._model(inputs), None)[1]

    def __call__(self, inputs: Tensors) -> tuple[np.ndarray, ...]:
        return self._model(inputs)


@dataclass(frozen=True)
class BlockTime:
    """One block: `ms` per evaluation, share of the matrix peak, error relative to float32."""

    engine: str
    precision: str
    model: str
    rows: int
    ms: float
    peak_fraction: float | None
    error: float
    memory_mb: float | None
    estimate_ms: float | None


@dataclass(frozen=True)
class ScheduleTime:
    """One schedule: `ms_per_image` of guided images, decoder included, in batches of `batch`."""

    engine: str
    precision: str
    schedule: str
    batch: int
    ms_per_image: float
    paper_ms: float | None
    estimate_ms: float | None


def main() -> None:
    """Measures, prints, and writes the report."""
    args = _parser().parse_args()
    until = time.monotonic() + 60 * args.minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and gpu_count():
        raise SystemExit("this machine has a GPU, but PyTorch is a CPU build: install a GPU build")
    name = args.size or ("xl" if device == "cuda" else "small")
    size = SIZES[name]
    torch.backends.cuda.matmul.allow_tf32 = False
    peaks = {p: matrix_peak(p, device, size.measure_s) for p in args.precisions}
    if device == "cpu":  # CPU engines may compute halves in another precision: use one peak
        peaks = dict.fromkeys(args.precisions, max(peaks.values()))
    chip = find_chip(max(peaks.values())) if device == "cuda" else None
    report: dict[str, Any] = {
        "size": name,
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "matrix_peak_tflops": {p: round(peak / 1e12, 3) for p, peak in peaks.items()},
        "chip": asdict(chip) if chip else None,
        "blocks": [],
        "schedules": [],
        "left_out": [],
    }
    print(f"{report['device']}: matrix peak, TFLOP/s: {report['matrix_peak_tflops']}", flush=True)
    exports = [each for each in pipeline_modules(size) if each.role in args.models]
    reference = _reference(exports, size, device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for engine, precision in ((e, p) for p in args.precisions for e in args.engines):
            form = f"{engine} {precision}"
            if time.monotonic() > until:
                report["left_out"].append(f"{form}: time limit of {args.minutes:g} min reached")
                continue
            try:
                for label, forms in _forms(engine, precision, exports, device, Path(scratch)):
                    parts = label, precision, forms, size, chip
                    report["blocks"] += map(asdict, _blocks(*parts, exports, peaks, reference))
                    if len(forms) == len(LABEL_ROLES):
                        report["schedules"] += map(asdict, _schedules(*parts))
                    forms.clear()  # free memory before the next form
                    torch.cuda.empty_cache()
                    # Write after each form, so that an interruption loses nothing.
                    args.out.write_text(json.dumps(report, indent=1) + "\n")
            except Exception as error:  # a failure of one form must not end the measurement
                report["left_out"].append(f"{form}: {error}")
                print(f"{form}: not measured: {error}", flush=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for line in report["left_out"]:
        print(f"left out: {line}")
    print(f"written: {args.out}")
    if report["schedules"]:
        picture = args.out.with_suffix(".png")
        plot(report, picture)
        print(f"written: {picture}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), help="default: xl on a GPU, else small")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="default: all"
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=ORDER, default=list(ORDER), help="default: all"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=tuple(LABEL_ROLES),
        default=list(LABEL_ROLES),
        help="default: all (schedules need all)",
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="start no further form after this time"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/gpu_check.json"))
    return parser


def find_chip(peak: float) -> Chip:
    """Describes the first GPU; `peak` is its highest rate of matrix products in FLOP/s."""
    tensor = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    other = torch.empty_like(tensor)

    def copy() -> None:
        other.copy_(tensor)
        torch.cuda.synchronize()

    rate = 2 * tensor.nbytes / median_seconds(copy, 0.2)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return Chip(round(peak / 1e12, 1), round(rate / 1e12, 2), processors)


def _reference(
    exports: list[ExportTarget], size: Size, device: str
) -> dict[tuple[str, int], np.ndarray]:
    """PyTorch's float32 outputs by model and rows: the reference for errors."""
    found: dict[tuple[str, int], np.ndarray] = {}
    for exported in exports:
        form = TorchForm(exported, "fp32", device, compiled=False)
        for rows in size.rows:
            found[exported.role, rows] = form(_inputs(exported, rows))[0].astype(np.float64)
    return found


def _inputs(exported: ExportTarget, rows: int) -> Tensors:
    made = exported.random_inputs(rows, seed=rows)
    return {name: value.numpy() for name, value in made.items()}


def _forms(
    engine: str, precision: str, exports: list[ExportTarget], device: str, scratch: Path
) -> Iterator[tuple[str, dict[str, Form]]]:
    """The models in one engine and precision, with its name; PyTorch eager, then compiled.

    Raises the error of a model that cannot be made.
    """
    if engine == "PyTorch":
        if precision == "fp8":
            raise RepositoryError("PyTorch is not measured in fp8")
        for compiled in (False, True) if device == "cuda" else (False,):
            forms: dict[str, Form] = {
                e.role: TorchForm(e, precision, device, compiled) for e in exports
            }
            yield ("PyTorch compiled" if compiled else "PyTorch"), forms
        return
    # Fail fast, before minutes of export.
    builder = find_builders(None)[0] if engine == "TensorRT" else None
    if engine == "ONNX" and device == "cuda":
        _check_onnx(precision)
    paths = {e.role: scratch / precision / e.role / "1" / "model.onnx" for e in exports}
    for exported in exports:
        if not paths[exported.role].exists():
            _export(exported, precision, paths[exported.role])
    if builder:
        yield "TensorRT", {name: _engine(builder, path) for name, path in paths.items()}
        return
    models = {name: open_model(path, precision) for name, path in paths.items()}
    runtime = type(next(iter(models.values()))).__name__.removesuffix("Model")
    yield runtime, {name: ArrayForm(model) for name, model in models.items()}


def _check_onnx(precision: str) -> None:
    import onnxruntime

    if runtime_for(precision) != "onnxruntime":
        raise RepositoryError(f"ONNX Runtime has no kernels for {precision} on a GPU")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RepositoryError("this ONNX Runtime does not use the GPU: install onnxruntime-gpu")


def _export(exported: ExportTarget, precision: str, path: Path) -> None:
    path.parent.mkdir(parents=True)
    half = replace(exported, module=deepcopy(exported.module))
    to_precision(half.module, precision)
    export_onnx(half, path)
    if precision == "fp8" and exported.role != Role.DECODER:
        quantize(half, path)


def _engine(builder: Builder, onnx: Path) -> Form:
    plan, cache = onnx.with_suffix(".plan"), onnx.parents[3] / "timing.cache"
    build_engine(builder, onnx, plan, Deployment().profiles, cache)
    return ArrayForm(builder.load(plan))


def _blocks(
    engine: str,
    precision: str,
    forms: dict[str, Form],
    size: Size,
    chip: Chip | None,
    exports: list[ExportTarget],
    peaks: dict[str, float],
    reference: dict[tuple[str, int], np.ndarray],
) -> Iterator[BlockTime]:
    flops = {
        Role.PREDICTOR: lambda rows: matrix_flops(size.config, rows),
        # Two evaluations per step.
        Role.REFINER: lambda rows: 2 * matrix_flops(refiner_config(size.config), rows),
    }
    for exported in exports:
        for rows in size.rows:
            inputs, form = _inputs(exported, rows), forms[exported.role]
            output, want = form(inputs)[0].astype(np.float64), reference[exported.role, rows]
            seconds = median_seconds(form.hold(inputs), size.measure_s)
            counted = flops.get(exported.role)
            fraction = counted(rows) / seconds / peaks[precision] if counted else None
            error = float(np.abs(output - want).max() / np.abs(want).max())
            ms, model = seconds * 1e3, exported.role
            estimate = None
            if chip and model == Role.PREDICTOR:
                estimate = predictor_ms(chip, size.config, rows)
            share = f"{fraction:6.1%} of peak" if fraction else " " * 14
            print(
                f"{engine:<17} {precision} {model:<18} {rows:3} rows {ms:9.3f} ms {share}  "
                f"error {error:.1e}{_beside('estimate', estimate)}",
                flush=True,
            )
            yield BlockTime(
                engine, precision, model, rows, ms, fraction, error, _memory(), estimate
            )


def _beside(what: str, ms: float | None) -> str:
    return f"  ({what} {ms:.1f} ms)" if ms else ""


def _schedules(
    engine: str, precision: str, forms: dict[str, Form], size: Size, chip: Chip | None
) -> Iterator[ScheduleTime]:
    """Times whole requests through the program that the server runs."""
    config = size.config
    shape = config.latent_shape
    models = dict.fromkeys(LABEL_ROLES, ModelRecord(max_rows=max(size.rows)))
    pipeline = Pipeline("check", ClassLabel(config.num_classes), shape, models)

    def infer(role: Role, tensors: Tensors) -> tuple[np.ndarray, ...]:
        return forms[role](tensors)

    for schedule, paper in PAPER_MS.items():
        program = program_for(Schedule.parse(schedule), Variant.REFERENCE)
        for batch in size.batches:
            tensors: Tensors = {
                LABEL: np.arange(batch) % config.num_classes,
                SEED: np.arange(batch),
                GUIDANCE_SCALE: np.array([1.5], dtype=np.float32),
                SCHEDULE: np.array([schedule], dtype=object),
            }
            request = parse_request(tensors, [IMAGE], pipeline, Settings())

            def run(request: Any = request, program: Any = program) -> None:
                generate(request, pipeline, Settings(), program, infer)

            ms = median_seconds(run, size.measure_s) * 1e3 / batch
            at_paper = paper if batch == 8 else None
            estimate = None
            if chip:
                estimate = request_ms(chip, config, program, batch, calls=False) / batch
            on_paper = at_paper if size is SIZES["xl"] else None
            print(
                f"{engine:<17} {precision} {schedule:<7} batch {batch}: {ms:9.2f} ms/img"
                f"{_beside('paper, A800:', on_paper)}{_beside('estimate', estimate)}",
                flush=True,
            )
            yield ScheduleTime(engine, precision, schedule, batch, ms, at_paper, estimate)


def median_seconds(run: Callable[[], None], measure_s: float) -> float:
    """Median seconds of `run`, repeated for `measure_s`: at least 3 times, at most 50."""
    run()  # compiles, captures, allocates
    run()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < measure_s and len(times) < 50):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def matrix_peak(precision: str, device: str, measure_s: float) -> float:
    """FLOP/s of a large square matrix product: the peak of this device in practice."""
    side = 8192 if device == "cuda" else 512
    a = torch.randn(side, side, device=device).to(PRECISIONS[precision])

    def run() -> None:
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * side**3 / median_seconds(run, measure_s)


def _memory() -> float | None:
    """MB in use on the GPU by all processes; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e6


def plot(report: dict[str, Any], path: Path) -> None:
    """The predictor's milliseconds per row against rows, and ms/img of every schedule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    forms = list(dict.fromkeys((b["engine"], b["precision"]) for b in report["blocks"]))
    for engine, precision in forms:
        points = [
            (b["rows"], b["ms"] / b["rows"])
            for b in report["blocks"]
            if (b["engine"], b["precision"], b["model"]) == (engine, precision, Role.PREDICTOR)
        ]
        left.plot(*zip(*points, strict=True), marker="o", label=f"{engine} {precision}")
    left.set(
        xscale="log", yscale="log", xlabel="rows", ylabel="ms per row", title="velocity predictor"
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
