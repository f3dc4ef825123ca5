"""An installed repository against its checkpoints, block by block and over a whole schedule."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from export.engine import EngineError, TensorRtModel, find_builder
from export.install import read_build
from export.onnx_graph import Exported, to_precision
from export.parity import (
    TOLERANCES,
    Evaluate,
    VerificationError,
    block_outputs,
    errors,
    torch_evaluation,
)
from export.source import Source, modules, source_digests
from flowturbo import contract
from flowturbo.errors import RepositoryError
from flowturbo.generate import generate, program_for
from flowturbo.guidance import Tensors
from flowturbo.onnx_session import open_model
from flowturbo.program import Variant
from flowturbo.repository import Pipeline, Settings
from flowturbo.request import parse_request
from flowturbo.schedule import Schedule

IMAGES = 2
GUIDANCE_SCALE = 1.5  # where the predictor has a null class
_ROW = "{:<28} {:<32} {:>10} {:>10} {:>10}  {}"
Forms = dict[str, Evaluate]  # by model


def verify_repository(source: Source, repository: Path, schedule: str | None) -> None:
    """Prints the error of every form of every model, and of a trajectory through each form.

    All are compared with PyTorch in float32. Raises VerificationError if any error is above its
    tolerance, RepositoryError if the repository was made from other checkpoints.
    """
    pipeline = Pipeline.load(repository)
    builds = {model: read_build(repository / model) for model in source.files()}
    for model, digest in source_digests(source).items():
        if builds[model]["fingerprint"]["sha256"][model] != digest:
            raise RepositoryError(f"{repository / model} was made from another checkpoint")
    precisions = {model: build["precision"] for model, build in builds.items()}
    chosen = schedule or ("H1P5R3" if pipeline.has_refiner else "H1P5")
    exports = list(modules(source))

    def outcome(forms: Forms) -> dict[str, np.ndarray]:
        found = {
            f"{exported.model} {name}": value
            for exported in exports
            for name, value in block_outputs(exported, forms[exported.model]).items()
        }
        return found | {f"trajectory {chosen}": _latent(pipeline, chosen, forms)}

    expected = outcome({e.model: torch_evaluation(e) for e in exports})
    print(_ROW.format("form", "output", "largest", "relative", "allowed", ""), flush=True)
    failed = []
    for form, forms in _forms(exports, builds, repository):
        found = outcome(forms)
        for name, want in expected.items():
            # A trajectory is as exact as the predictor.
            precision = precisions.get(name.partition(" ")[0], precisions[contract.PREDICTOR])
            (error,) = errors({name: want}, found, TOLERANCES[precision])
            verdict = "FAILED" if error.exceeded else "ok"
            figures = (f"{x:.2e}" for x in (error.largest, error.relative, error.allowed))
            print(_ROW.format(f"{form} {precision}", name, *figures, verdict), flush=True)
            failed += [f"{form} {precision}: {name}"] * error.exceeded
        forms.clear()
    if failed:
        raise VerificationError(f"{len(failed)} of the errors are too large: {'; '.join(failed)}")


def _forms(
    exports: list[Exported], builds: dict[str, dict], repository: Path
) -> Iterator[tuple[str, Forms]]:
    """One after the other; whoever clears what he got has but one of them in memory at a time."""
    precisions = {model: build["precision"] for model, build in builds.items()}
    if set(precisions.values()) == {"bf16"}:  # PyTorch takes minutes over a convolution in fp16
        for exported in exports:
            to_precision(exported.module, "bf16")
        yield "PyTorch", {e.model: torch_evaluation(e) for e in exports}
    paths = {model: repository / model / "1" for model in builds}
    models: Forms = {
        name: open_model(path / "model.onnx", precisions[name], runtime=builds[name]["runtime"])
        for name, path in paths.items()
    }
    runtime = type(next(iter(models.values()))).__name__.removesuffix("Model")
    yield runtime, models
    if any(build["engines"] for build in builds.values()):
        try:
            builder = find_builder(None)
        except EngineError as error:
            print(f"TensorRT: not checked: {error}")
            return
        for name, build in builds.items():
            if builder.capability not in build["engines"]:
                raise EngineError(f"{name} has no engine for this GPU ({builder.capability})")
        plans = {
            name: path / builds[name]["engines"][builder.capability]["file"]
            for name, path in paths.items()
        }
        yield "TensorRT", {name: TensorRtModel(builder.trt, plan) for name, plan in plans.items()}


def _latent(pipeline: Pipeline, schedule: str, forms: Forms) -> np.ndarray:
    scale = GUIDANCE_SCALE if pipeline.null_class else 1.0
    tensors: Tensors = {
        "label": np.arange(IMAGES) % pipeline.num_classes,
        "seed": np.arange(IMAGES),
        "guidance_scale": np.array([scale], dtype=np.float32),
        "schedule": np.array([schedule], dtype=object),
    }
    request = parse_request(tensors, ["latent"], pipeline, Settings())
    program = program_for(Schedule.parse(schedule), Variant.REFERENCE)

    def infer(model: str, inputs: Tensors) -> tuple[np.ndarray, ...]:
        return forms[model](inputs)

    return generate(request, pipeline, program, infer)["latent"]
