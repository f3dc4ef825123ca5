"""Ensembles: one Triton model per schedule. Triton runs all its steps without the orchestrator."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from export.deployment import add_tensors
from flowturbo import contract
from flowturbo.contract import IMAGE, LATENT, MAGNITUDE, Role
from flowturbo.ensemble import Step, block_steps, ensemble_name, runs
from flowturbo.pipeline import Pipeline
from flowturbo.settings import Settings
from flowturbo.solver.calls import Variant
from flowturbo.solver.program import Program, compile_program
from flowturbo.solver.schedule import Schedule

_FILES = ("config.pbtxt", "1/model.py")
_MODEL_PY = '''"""A step of an ensemble; the code is the installed package's."""

from flowturbo.serving.{} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def with_ensembles(
    pipeline: Pipeline, settings: Settings, schedules: Sequence[Schedule]
) -> Pipeline:
    """`pipeline` with exactly the ensembles of `schedules` in its record."""
    models = _models(pipeline, settings, schedules)
    named = {str(s): ensemble_name(pipeline.name, s) for s in schedules}
    parts = tuple(m.config.name for m in models if m.config.name not in named.values())
    variant = settings.variant if named else ""
    return replace(pipeline, ensembles=named, ensemble_variant=variant, parts=parts)


def write_ensembles(
    staged: Path, pipeline: Pipeline, settings: Settings, schedules: Sequence[Schedule]
) -> None:
    """Writes one ensemble per schedule into `staged`, beside the finished models."""
    for model in _models(pipeline, settings, schedules):
        model.write(staged / model.config.name)


def ensembles_are_installed(
    repository: Path, pipeline: Pipeline, settings: Settings, schedules: Sequence[Schedule]
) -> bool:
    """Whether exactly the ensembles of `schedules` are installed, with up-to-date files."""
    wanted = _models(pipeline, settings, schedules)
    present = [repository / name for name in (*pipeline.ensembles.values(), *pipeline.parts)]
    return {each.config.name: each.files() for each in wanted} == {
        folder.name: {file: _text(folder / file) for file in _FILES} for folder in present
    }


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


@dataclass(frozen=True)
class _Model:
    """One Triton model: the ensemble itself, or a Python step of it.

    `code` names the step's module in `flowturbo.serving`. It is None for the ensemble itself.
    """

    config: ModelConfig
    code: str | None

    def files(self) -> dict[str, str | None]:
        """The content of each file in its folder; None for a file that it does not have."""
        code = _MODEL_PY.format(self.code) if self.code else None
        return dict(zip(_FILES, (text_format.MessageToString(self.config), code), strict=True))

    def write(self, folder: Path) -> None:
        (folder / "1").mkdir(parents=True)
        for name, text in self.files().items():
            if text is not None:
                (folder / name).write_text(text)


def _models(pipeline: Pipeline, settings: Settings, schedules: Sequence[Schedule]) -> list[_Model]:
    if not schedules:
        return []
    finisher = contract.finisher_name(pipeline.name)
    made = [_Model(_python_model(finisher, pipeline, *_FINISHER_TENSORS), "finisher")]
    checks = pipeline.has(Role.DECODER) and not _checks_itself(pipeline)
    if checks:
        checker = contract.checker_name(pipeline.name)
        made.append(_Model(_python_model(checker, pipeline, *_CHECKER_TENSORS), "checker"))
    for schedule in schedules:
        program = compile_program(schedule, variant=Variant(settings.variant))
        made.append(_Model(_planner(program, pipeline, settings), "planner"))
        made.append(_Model(_ensemble(program, pipeline, checks=checks), None))
    return made


_FINISHER_TENSORS = contract.FINISHER_INPUTS, contract.FINISHER_OUTPUTS
_CHECKER_TENSORS = contract.CHECKER_INPUTS, contract.CHECKER_OUTPUTS


def _python_model(
    name: str,
    pipeline: Pipeline,
    inputs: Iterable[contract.TensorSpec],
    outputs: Iterable[contract.TensorSpec],
) -> ModelConfig:
    config = ModelConfig(name=name, backend="python")
    add_tensors(config, inputs, outputs, pipeline.sizes)
    config.instance_group.add(count=1, kind=ModelInstanceGroup.KIND_CPU)
    return config


def _planner_name(pipeline: Pipeline, schedule: Schedule) -> str:
    return f"{ensemble_name(pipeline.name, schedule)}_planner"


def _inputs(pipeline: Pipeline) -> contract.Specs:
    return contract.ensemble_inputs(pipeline.condition.request_inputs)


def _outputs(program: Program, pipeline: Pipeline) -> contract.Specs:
    calls = [len(run) for run in runs(program, pipeline)]
    return contract.plan_outputs(calls, pipeline.condition.block_inputs)


def _planner(program: Program, pipeline: Pipeline, settings: Settings) -> ModelConfig:
    name = _planner_name(pipeline, program.schedule)
    config = _python_model(name, pipeline, _inputs(pipeline), _outputs(program, pipeline))
    stated = {
        "default_pipeline": pipeline.name,
        "default_schedule": str(program.schedule),
        "default_guidance_scale": str(settings.default_guidance_scale),
        "variant": settings.variant,
        # As many as fit in one batch. The orchestrator applies the limit per request.
        "max_images": str(pipeline.max_rows),
    }
    for setting, value in stated.items():
        config.parameters[setting].string_value = value
    return config


def _checks_itself(pipeline: Pipeline) -> bool:
    """Whether the decoder itself refuses images that are not finite (in the Python backend)."""
    return pipeline.models[Role.DECODER].engine == "python"


def _ensemble(program: Program, pipeline: Pipeline, *, checks: bool) -> ModelConfig:
    name = ensemble_name(pipeline.name, program.schedule)
    config = ModelConfig(name=name, platform="ensemble")
    images = [contract.ENSEMBLE_IMAGE] if pipeline.has(Role.DECODER) else []
    outputs = [*images, contract.ENSEMBLE_LATENT]
    add_tensors(config, _inputs(pipeline), outputs, pipeline.sizes)
    for step in _steps(program, pipeline, checks=checks):
        entry = config.ensemble_scheduling.step.add(model_name=step.model, model_version=-1)
        entry.input_map.update(step.inputs)
        entry.output_map.update(step.outputs)
    return config


def _steps(program: Program, pipeline: Pipeline, *, checks: bool) -> Iterable[Step]:
    yield Step(
        _planner_name(pipeline, program.schedule),
        {spec.name: spec.name for spec in _inputs(pipeline)},
        {spec.name: spec.name for spec in _outputs(program, pipeline)},
    )
    blocks, latent_rows = block_steps(program, pipeline)
    decoded = contract.DECODER_LATENT
    yield from blocks
    yield Step(
        contract.finisher_name(pipeline.name),
        {contract.LATENT_ROWS: latent_rows, contract.PLAN_PAIR: contract.PLAN_PAIR},
        {LATENT: LATENT} | ({decoded: decoded} if pipeline.has(Role.DECODER) else {}),
    )
    if not pipeline.has(Role.DECODER):
        return
    decoder = pipeline.model(Role.DECODER)
    if not checks:
        yield Step(decoder, {LATENT: decoded}, {IMAGE: IMAGE})
        return
    outputs = {IMAGE: contract.DECODED_IMAGE, MAGNITUDE: contract.DECODED_MAGNITUDE}
    yield Step(decoder, {LATENT: decoded}, outputs)
    checked = {name: name for name in outputs.values()}
    yield Step(contract.checker_name(pipeline.name), checked, {IMAGE: IMAGE})
