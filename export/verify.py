"""Compares an installed pipeline with its checkpoints, per block and over a whole schedule."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from export.engine import Builder, EngineError, find_builders
from export.onnx_graph import ExportTarget, to_precision
from export.parity import torch_evaluation, torch_figures
from export.source import Loaded, Source, source_digests
from export.whole import WholeCheck
from flowturbo.contract import GUIDANCE_SCALE, LATENT, SCHEDULE, SEED, VAE_ROLES, Role
from flowturbo.errors import RepositoryError
from flowturbo.generate import generate, program_for
from flowturbo.local import open_models
from flowturbo.parity import TOLERANCES, Evaluate, VerificationError, errors
from flowturbo.pipeline import Pipeline
from flowturbo.request import GenerationRequest, parse_request
from flowturbo.rows import Tensors
from flowturbo.settings import Settings
from flowturbo.solver.calls import Variant

IMAGES = 2
SCALE = 1.5  # guidance scale for predictors with a null class
_TRAJECTORY = "trajectory"
_ROW = "{:<28} {:<32} {:>10} {:>10} {:>10}  {}"
Forms = dict[Role, Evaluate]


def verify_pipeline(
    source: Source, repository: Path, pipeline: Pipeline, schedule: str | None
) -> None:
    """Prints the error of every form of every model, and of a trajectory through each form.

    A form is one way to run the models, such as ONNX Runtime in fp32. The reference is PyTorch in
    float32. Raises VerificationError if an error is above its tolerance. Raises RepositoryError if
    `pipeline` was made from other checkpoints, or if they were read with other options. Raises
    RequestError for a schedule that the pipeline cannot serve. A text-to-image pipeline is also
    compared with diffusers' own.
    """
    _check_source(source, pipeline)
    with tempfile.TemporaryDirectory() as scratch:
        half = any(spec.dtype is np.float16 for spec in pipeline.condition.block_inputs)
        loaded = source.load((), half=half, scratch=Path(scratch))
        whole = WholeCheck.of(loaded) if loaded.family else None
        _verify(loaded, repository, pipeline, schedule)
        if whole:
            whole.hold(pipeline, repository)


def _verify(loaded: Loaded, repository: Path, pipeline: Pipeline, schedule: str | None) -> None:
    chosen = schedule or ("H1P5R3" if pipeline.has(Role.REFINER) else "H1P5")
    request = _request(pipeline, chosen)
    allowed = {role: TOLERANCES[model.precision] for role, model in pipeline.models.items()}
    # The least exact network limits the accuracy of a trajectory.
    networks = (of for role, of in allowed.items() if role not in VAE_ROLES)
    widest = max(networks, key=lambda tolerance: tolerance.trajectory)
    tolerances = {role.value: of for role, of in allowed.items()} | {_TRAJECTORY: widest}
    exports = list(loaded.targets)
    held_to = {exported.role: torch_figures(exported) for exported in exports}

    def outcome(forms: Forms) -> dict[str, np.ndarray]:
        found = {
            f"{role} {name}": value
            for role, figures in held_to.items()
            for name, value in figures.answers(forms[role]).items()
        }
        return found | {f"{_TRAJECTORY} {chosen}": _latent(pipeline, request, forms)}

    expected = outcome({e.role: torch_evaluation(e) for e in exports})
    print(_ROW.format("form", "output", "largest", "relative", "allowed", ""), flush=True)
    failed = []
    for names, forms in _forms(exports, pipeline, repository):
        found = outcome(forms)
        for name, want in expected.items():
            of = name.partition(" ")[0]
            (error,) = errors({name: want}, found, tolerances[of])
            verdict = "FAILED" if error.exceeded else "ok"
            shown = (f"{x:.2e}" for x in (error.largest, error.relative, error.allowed))
            form = names[Role.PREDICTOR if of == _TRAJECTORY else Role(of)]
            print(_ROW.format(form, name, *shown, verdict), flush=True)
            failed += [f"{form}: {name}"] * error.exceeded
        forms.clear()
    if failed:
        raise VerificationError(f"{len(failed)} of the errors are too large: {'; '.join(failed)}")


def _check_source(source: Source, pipeline: Pipeline) -> None:
    """Raises RepositoryError if the pipeline was not made from `source`."""
    digests = source_digests(source)
    options = {Role.REFINER: "--refiner", Role.DECODER: "--vae"}
    if pipeline.has(Role.TEXT_ENCODER) != (Role.TEXT_ENCODER.value in digests):
        what = "a diffusers folder: give --diffusers"
        what = what if pipeline.has(Role.TEXT_ENCODER) else "a checkpoint: give --predictor"
        raise RepositoryError(f"pipeline {pipeline.name} was made from {what}")
    for role in options:
        if pipeline.has(role) != (role.value in digests):
            has = f"pipeline {pipeline.name} has a {role}: give {options[role]}"
            lacks = f"pipeline {pipeline.name} has no {role}: omit {options[role]}"
            raise RepositoryError(lacks if role.value in digests else has)
    made = pipeline.fingerprint
    for key, digest in digests.items():
        if made["sha256"].get(key) != digest:
            raise RepositoryError(f"{pipeline.model(Role(key))} was made from another checkpoint")
    for name, now in source.reading().items():
        was = made["options"].get(name)
        if (was or None) != (now or None):
            said, here = (
                {None: "not given", False: "not given", True: "given"}.get(v, v) for v in (was, now)
            )
            option = f"--{name.replace('_', '-')}"
            raise RepositoryError(
                f"pipeline {pipeline.name} was exported with {option} {said}, here it is {here}"
            )


def _forms(
    exports: list[ExportTarget], pipeline: Pipeline, repository: Path
) -> Iterator[tuple[dict[Role, str], Forms]]:
    """Yields the forms one after the other: a title and an evaluation for each model.

    The caller clears each form after use, so only one is in memory at a time.
    """
    records = pipeline.models
    if {record.precision for record in records.values()} == {"bf16"}:
        # Not for fp16: PyTorch needs minutes for one fp16 convolution.
        for exported in exports:
            to_precision(exported.module, "bf16")
        names = dict.fromkeys(records, "PyTorch bf16")
        yield names, {e.role: torch_evaluation(e) for e in exports}
    paths = {role: repository / pipeline.model(role) / "1" for role in records}
    models: Forms = {**open_models(repository, pipeline)}
    names = {
        role: f"{type(model).__name__.removesuffix('Model')} {records[role].precision}"
        for role, model in models.items()
    }
    yield names, models
    if any(record.engines for record in records.values()):
        try:
            builders = find_builders(None)
        except EngineError as error:
            print(f"TensorRT: not checked: {error}")
            return
        for builder in builders:
            yield _engines(builder, pipeline, paths)


def _engines(
    builder: Builder, pipeline: Pipeline, paths: dict[Role, Path]
) -> tuple[dict[Role, str], Forms]:
    names: dict[Role, str] = {}
    forms: Forms = {}
    for role, record in pipeline.models.items():
        if builder.capability not in record.engines:
            lacking = pipeline.model(role)
            raise EngineError(f"{lacking} has no engine for {builder.gpu} ({builder.capability})")
        names[role] = f"TensorRT sm{builder.capability.replace('.', '')} {record.precision}"
        forms[role] = builder.load(paths[role] / record.engines[builder.capability]["file"])
    return names, forms


def _request(pipeline: Pipeline, schedule: str) -> GenerationRequest:
    scale = SCALE if pipeline.condition.can_guide else 1.0
    tensors: Tensors = {
        **pipeline.condition.example(IMAGES),
        SEED: np.arange(IMAGES),
        GUIDANCE_SCALE: np.array([scale], dtype=np.float32),
        SCHEDULE: np.array([schedule], dtype=object),
    }
    return parse_request(tensors, [LATENT], pipeline, Settings())


def _latent(pipeline: Pipeline, request: GenerationRequest, forms: Forms) -> np.ndarray:
    program = program_for(request.schedule, Variant.REFERENCE, request.times)

    def infer(role: Role, inputs: Tensors) -> tuple[np.ndarray, ...]:
        return forms[role](inputs)

    return generate(request, pipeline, Settings(), program, infer)[LATENT]
