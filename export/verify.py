"""An installed repository against its checkpoints, block by block and over a whole schedule."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from export.engine import Builder, EngineError, find_builders
from export.install import read_build
from export.onnx_graph import ExportTarget, to_precision
from export.parity import torch_evaluation, torch_figures
from export.source import Checkpoints, modules, source_digests
from flowturbo import contract
from flowturbo.errors import RepositoryError
from flowturbo.generate import generate, program_for
from flowturbo.parity import TOLERANCES, Evaluate, VerificationError, errors
from flowturbo.repository import Pipeline, Settings
from flowturbo.request import GenerationRequest, parse_request
from flowturbo.runtimes import model_file, open_model
from flowturbo.solver.guidance import Tensors
from flowturbo.solver.program import Variant

IMAGES = 2
GUIDANCE_SCALE = 1.5  # where the predictor has a null class
_TRAJECTORY = "trajectory"
_ROW = "{:<28} {:<32} {:>10} {:>10} {:>10}  {}"
Forms = dict[str, Evaluate]  # by model


def verify_repository(source: Checkpoints, repository: Path, schedule: str | None) -> None:
    """Prints the error of every form of every model, and of a trajectory through each form.

    All are compared with PyTorch in float32. Raises VerificationError if any error is above its
    tolerance. Raises RepositoryError if the repository was made from other checkpoints or otherwise
    read, and RequestError for a schedule that it cannot serve.
    """
    pipeline = Pipeline.load(repository)
    builds = _builds(source, repository)
    chosen = schedule or ("H1P5R3" if pipeline.has_refiner else "H1P5")
    request = _request(pipeline, chosen)
    # A trajectory is as exact as the least exact of its networks.
    tolerances = {model: TOLERANCES[build["precision"]] for model, build in builds.items()}
    networks = (t for model, t in tolerances.items() if model != contract.DECODER)
    tolerances[_TRAJECTORY] = max(networks, key=lambda tolerance: tolerance.trajectory)
    exports = list(modules(source))
    held_to = {exported.model: torch_figures(exported) for exported in exports}

    def outcome(forms: Forms) -> dict[str, np.ndarray]:
        found = {
            f"{model} {name}": value
            for model, figures in held_to.items()
            for name, value in figures.answers(forms[model]).items()
        }
        return found | {f"{_TRAJECTORY} {chosen}": _latent(pipeline, request, forms)}

    expected = outcome({e.model: torch_evaluation(e) for e in exports})
    print(_ROW.format("form", "output", "largest", "relative", "allowed", ""), flush=True)
    failed = []
    for names, forms in _forms(exports, builds, repository):
        found = outcome(forms)
        for name, want in expected.items():
            of = name.partition(" ")[0]
            (error,) = errors({name: want}, found, tolerances[of])
            verdict = "FAILED" if error.exceeded else "ok"
            shown = (f"{x:.2e}" for x in (error.largest, error.relative, error.allowed))
            form = names.get(of) or names[contract.PREDICTOR]
            print(_ROW.format(form, name, *shown, verdict), flush=True)
            failed += [f"{form}: {name}"] * error.exceeded
        forms.clear()
    if failed:
        raise VerificationError(f"{len(failed)} of the errors are too large: {'; '.join(failed)}")


def _builds(source: Checkpoints, repository: Path) -> dict[str, dict[str, Any]]:
    """The record of each model; raises RepositoryError where `source` is not what they are of."""
    digests = source_digests(source)
    for model in contract.COMPOSED:
        if (repository / model).exists() != (model in digests):
            option = {contract.REFINER: "--refiner", contract.DECODER: "--vae"}[model]
            has = f"{repository} has a {model}: give {option}"
            lacks = f"{repository} has no {model}: leave {option} out"
            raise RepositoryError(lacks if model in digests else has)
    builds = {model: read_build(repository / model) for model in digests}
    for model, digest in digests.items():
        made = builds[model]["fingerprint"]
        if made["sha256"].get(model) != digest:
            raise RepositoryError(f"{repository / model} was made from another checkpoint")
        for name, now in source.reading().items():
            was = made["options"].get(name)
            if (was or None) != (now or None):
                said, here = (
                    {None: "not given", False: "not given", True: "given"}.get(v, v)
                    for v in (was, now)
                )
                option = f"--{name.replace('_', '-')}"
                raise RepositoryError(
                    f"{repository / model} was exported with {option} {said}, here it is {here}"
                )
    return builds


def _forms(
    exports: list[ExportTarget], builds: dict[str, dict], repository: Path
) -> Iterator[tuple[dict[str, str], Forms]]:
    """What each model is run by, and how; one such form of all models after the other.

    Whoever clears what he got has but one of them in memory at a time.
    """
    precisions = {model: build["precision"] for model, build in builds.items()}
    if set(precisions.values()) == {"bf16"}:  # PyTorch takes minutes over a convolution in fp16
        for exported in exports:
            to_precision(exported.module, "bf16")
        names = dict.fromkeys(builds, "PyTorch bf16")
        yield names, {e.model: torch_evaluation(e) for e in exports}
    paths = {model: repository / model / "1" for model in builds}
    models: Forms = {
        name: open_model(
            path / model_file(runtime),
            precisions[name],
            runtime=runtime,
            on_gpu=builds[name]["on_gpu"],
        )
        for name, path in paths.items()
        if (runtime := builds[name]["runtime"])
    }
    runtimes = {name: type(model).__name__.removesuffix("Model") for name, model in models.items()}
    yield {name: f"{runtimes[name]} {precisions[name]}" for name in models}, models
    if any(build["engines"] for build in builds.values()):
        try:
            builders = find_builders(None)
        except EngineError as error:
            print(f"TensorRT: not checked: {error}")
            return
        for builder in builders:
            yield _engines(builder, builds, paths)


def _engines(
    builder: Builder, builds: dict[str, dict], paths: dict[str, Path]
) -> tuple[dict[str, str], Forms]:
    for name, build in builds.items():
        if builder.capability not in build["engines"]:
            raise EngineError(f"{name} has no engine for {builder.gpu} ({builder.capability})")
    files = {name: build["engines"][builder.capability]["file"] for name, build in builds.items()}
    form = f"TensorRT sm{builder.capability.replace('.', '')}"
    names = {name: f"{form} {build['precision']}" for name, build in builds.items()}
    return names, {name: builder.load(paths[name] / file) for name, file in files.items()}


def _request(pipeline: Pipeline, schedule: str) -> GenerationRequest:
    scale = GUIDANCE_SCALE if pipeline.null_class else 1.0
    tensors: Tensors = {
        "label": np.arange(IMAGES) % pipeline.num_classes,
        "seed": np.arange(IMAGES),
        "guidance_scale": np.array([scale], dtype=np.float32),
        "schedule": np.array([schedule], dtype=object),
    }
    return parse_request(tensors, ["latent"], pipeline, Settings())


def _latent(pipeline: Pipeline, request: GenerationRequest, forms: Forms) -> np.ndarray:
    program = program_for(request.schedule, Variant.REFERENCE)

    def infer(model: str, inputs: Tensors) -> tuple[np.ndarray, ...]:
        return forms[model](inputs)

    return generate(request, pipeline, program, infer)["latent"]
