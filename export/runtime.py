"""Finds the fastest runtime and precision for the models on this CPU, by measurement."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.deployment import AUTO, Deployment
from export.onnx_graph import ExportTarget, export_onnx
from export.torch_program import export_program
from flowturbo.contract import Role
from flowturbo.generate import roles_called
from flowturbo.parity import PAIRED, TOLERANCES, Figures, VerificationError, check
from flowturbo.presets import DEFAULT, built_in
from flowturbo.rows import Tensors
from flowturbo.runtimes import Model, model_file, open_model, runtime_for
from flowturbo.serving.scheduling import stated_rows
from flowturbo.solver.program import compile_program

_OPENVINO_HINT = (
    ". OpenVINO in bf16 also rounds what the network computes in float32: try --precision fp32, or "
    "--runtime torch"
)
MEASURE_S = 0.5  # per batch size
_BLOCK_ROUNDS = 5  # over all batch sizes, for the times that the service plans with
_SLOW_MS = 1000.0  # above it, larger batches are not measured: they take longer in proportion
# Batches for which OpenVINO has programs of their own, where these are faster than one for all.
# Each takes memory. Other batches are cut into these. One image, a few, and eight are common.
_FIXED_ROWS = {
    Role.PREDICTOR: (1, 2, 4, 8, 16),
    Role.REFINER: (2, 8, 16),
    Role.DECODER: (1,),
}
_SMALL = 64 << 20  # bytes of a model; each program holds more than its weights
# How often a request with the default schedule calls each model. Edits call the encoder too.
_DEFAULT = compile_program(built_in()[DEFAULT])
_CALLS = Counter([*roles_called(_DEFAULT), Role.DECODER, Role.ENCODER])


@dataclass(frozen=True)
class Runtime:
    """A runtime (flowturbo.runtimes.RUNTIMES) and the precision of the networks."""

    name: str
    precision: str

    def __str__(self) -> str:
        return f"{self.name} {self.precision}"


_ON_CPU = (
    Runtime("onnxruntime", "fp32"),
    Runtime("openvino", "fp32"),
    Runtime("openvino", "bf16"),
)


@dataclass(frozen=True)
class TrialResult:
    """One model in one runtime: its error per output, its milliseconds per batch size, and the
    batches with programs of their own.
    """

    parity: dict[str, float]
    times_ms: dict[int, float]
    fixed_rows: tuple[int, ...] = ()


def candidates(deployment: Deployment) -> list[Runtime]:
    """The runtimes that `deployment` allows; empty if no runtime fits it."""
    runtime, precision = deployment.runtime, deployment.precision
    if runtime == "torch":
        fits = deployment.engine == "python" and precision != "fp8"
        return [Runtime("torch", "fp32" if precision == AUTO else precision)] if fits else []
    if deployment.engine == "python" and precision in (AUTO, "fp32", "bf16"):
        return [
            e for e in _ON_CPU if runtime in (AUTO, e.name) and precision in (AUTO, e.precision)
        ]
    if precision == AUTO:
        return []
    only = Runtime(runtime_for(precision), precision)
    return [only] if runtime in (AUTO, only.name) else []


def export_for(runtime: str, exported: ExportTarget, version: Path) -> Path:
    """Writes the module into the folder `version`, in the format that `runtime` loads."""
    path = version / model_file(runtime)
    if runtime == "torch":
        export_program(exported, path)
    else:
        export_onnx(exported, path)
    return path


def fixed_rows(exported: ExportTarget, path: Path, max_rows: int) -> tuple[int, ...]:
    """The batches for which OpenVINO has programs of their own; none for large files.

    There is none either for images of several sizes: each size would need its own.
    """
    dims = [dim for spec in exported.tensors[0] for dim in spec.dims]
    size = sum(file.stat().st_size for file in path.parent.iterdir())  # weights may lie beside it
    if exported.other_shapes or -1 in dims or size > _SMALL:
        return ()
    # Without guidance an image has one row instead of two: eight images need half of the rows.
    most = min(max_rows, 16 if exported.condition.can_guide else 8)
    return tuple(rows for rows in _FIXED_ROWS.get(exported.role, ()) if rows <= most)


def try_runtimes(
    exported: ExportTarget,
    path: Path,
    figures: Figures,
    open_to: list[Runtime],
    deployment: Deployment,
    *,
    other_sizes: Sequence[tuple[Tensors, Tensors]] = (),
) -> dict[Runtime, TrialResult]:
    """Verifies the file `path` in each of `open_to`; also measures times if there are several.

    The models are opened as `deployment` serves them, if one of these runtimes serves them. A
    runtime with too large an error against `figures`, or against the inputs and outputs of
    `other_sizes`, drops out. Raises VerificationError if no runtime is left.
    """
    trials: dict[Runtime, TrialResult] = {}
    served, on_gpu = deployment.engine == "python", deployment.on_gpu
    fixed = fixed_rows(exported, path, deployment.max_rows) if served and not on_gpu else ()
    for runtime in open_to:
        # OpenVINO in bfloat16 rounds what the file has in float32 too, such as embeddings of times.
        # That counts if it serves the model, and not for a file that is for another engine.
        precision = runtime.precision if served or runtime.name != "openvino" else "fp32"
        model = open_model(path, precision, runtime=runtime.name, on_gpu=on_gpu)
        programs: tuple[int, ...] = ()
        if fixed and runtime.name == "openvino":
            other = open_model(path, precision, runtime=runtime.name, fixed_rows=fixed)
            often = [figures.batch(rows)[0] for rows in (2, deployment.profile[1])]
            if independent(other, figures, fixed) and is_faster(other, model, often):
                model, programs = other, fixed
            del other
        try:
            batches = sorted({*figures.batches, *programs})
            parity = figures.check(exported.role, model, TOLERANCES[runtime.precision], batches)
            for inputs, outputs in other_sizes:
                found = dict(zip(outputs, model(inputs), strict=True))
                check(exported.role, outputs, found, TOLERANCES[runtime.precision])
        except VerificationError as error:
            if len(open_to) == 1:
                hint = _OPENVINO_HINT if served and str(runtime) == "openvino bf16" else ""
                raise VerificationError(f"{error}{hint}") from error
            print(f"{runtime} left out: {error} ... ", end="", flush=True)
            continue
        times = {}
        for rows in (2, deployment.profile[1]) if len(open_to) > 1 else ():
            inputs = {k: v.numpy() for k, v in exported.random_inputs(rows, seed=rows).items()}
            times[rows] = round(_milliseconds(model, inputs), 3)
        trials[runtime] = TrialResult(parity, times, programs)
    if not trials:
        raise VerificationError(f"{exported.role}: no runtime here agrees with PyTorch")
    return trials


def independent(model: Model, figures: Figures, fixed_rows: Sequence[int]) -> bool:
    """Whether the outputs of a row are the same, to the last bit, in each of these batches."""
    inputs, _ = figures.batch(PAIRED)
    pairs = [{k: v[n : n + 2] for k, v in inputs.items()} for n in range(0, PAIRED, 2)]
    alone = [np.concatenate(parts) for parts in zip(*map(model, pairs), strict=True)]
    for rows in fixed_rows:
        found = model(figures.batch(rows)[0])
        paired = np.arange(rows - rows % 2) % PAIRED  # an odd last row is another one
        for one, other in zip(alone, found, strict=True):
            if not np.array_equal(one[paired], other[: len(paired)]):
                return False
    lone, beside = model(figures.batch(1)[0]), model(figures.batch(3)[0])
    return all(np.array_equal(one, other[2:]) for one, other in zip(lone, beside, strict=True))


def is_faster(
    one: Model,
    other: Model,
    batches: Sequence[Tensors],
    clock: Callable[[], float] = time.perf_counter,
) -> bool:
    """Whether `one` takes less time: the geometric mean of the shortest times of `batches`."""
    ratio = 1.0
    for inputs in batches:
        best = {one: math.inf, other: math.inf}
        for _ in range(_BLOCK_ROUNDS + 1):  # in turns; the first call of each prepares something
            for model in best:
                started = clock()
                model(inputs)
                best[model] = min(best[model], clock() - started)
        ratio *= best[one] / best[other]
    return ratio < 1


def block_times(model: Model, figures: Figures, max_rows: int) -> dict[str, float]:
    """Milliseconds per call of `model` by rows, from a pair to `max_rows` rows."""
    best: dict[int, float] = {}
    for _ in range(_BLOCK_ROUNDS):  # in turns: a pause of the machine does not hit one size alone
        for rows in stated_rows(max_rows):
            inputs = figures.batch(rows)[0]
            started = time.perf_counter()
            model(inputs)
            ms = (time.perf_counter() - started) * 1e3
            best[rows] = min(ms, best.get(rows, math.inf))
            if ms > _SLOW_MS:
                break
    return {str(rows): round(ms, 3) for rows, ms in best.items()}


def _milliseconds(model: Callable[[Tensors], object], inputs: Tensors) -> float:
    """The shortest of several evaluations: other load on the machine can only add time."""
    model(inputs)
    best, until = math.inf, time.perf_counter() + MEASURE_S
    while True:
        started = time.perf_counter()
        model(inputs)
        ended = time.perf_counter()
        best = min(best, ended - started)
        if ended > until:
            return best * 1e3


def choose(trials: Mapping[Role, Mapping[Runtime, TrialResult]]) -> Runtime:
    """The fastest runtime that works for every model of the pipeline.

    Compares the total time of a request's calls: the geometric mean over batch sizes.
    """
    common = [e for e in next(iter(trials.values())) if all(e in of for of in trials.values())]
    if not common:
        raise VerificationError("no runtime here agrees with PyTorch for every model")
    return min(common, key=lambda runtime: _cost(trials, runtime))


def _cost(trials: Mapping[Role, Mapping[Runtime, TrialResult]], runtime: Runtime) -> float:
    totals: dict[int, float] = {}
    for role, of_model in trials.items():
        for rows, ms in of_model[runtime].times_ms.items():
            totals[rows] = totals.get(rows, 0.0) + _CALLS[role] * ms
    return math.prod(totals.values())
