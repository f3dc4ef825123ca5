"""Ensembles: a model a schedule, whose steps Triton runs by itself."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from export import install
from export.deployment import add_tensors
from flowturbo import contract
from flowturbo.ensemble import Step, block_steps, ensemble_name
from flowturbo.repository import (
    BUILD_FILE,
    ENSEMBLE_SCHEDULE,
    Pipeline,
    Settings,
    read_record,
)
from flowturbo.solver.program import Program, Variant, compile_program
from flowturbo.solver.schedule import Schedule

_PART = "part_of_ensemble"
_FILES = ("config.pbtxt", "1/model.py", BUILD_FILE)
_MODEL_PY = '''"""A step of an ensemble; the code is the installed package's."""

from flowturbo.serving.{} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def installed_ensembles(repository: Path) -> tuple[Schedule, ...]:
    """The schedules that have an ensemble in `repository`."""
    builds = (read_record(folder / BUILD_FILE) for folder in _folders(repository))
    return tuple(Schedule.parse(b[ENSEMBLE_SCHEDULE]) for b in builds if ENSEMBLE_SCHEDULE in b)


def ensemble_models(repository: Path) -> list[str]:
    """The models in `repository` that belong to an ensemble."""
    return [folder.name for folder in _folders(repository)]


def _folders(repository: Path) -> list[Path]:
    # flowturbo_stream, say, has no build record.
    records = sorted(repository.glob(f"{contract.ORCHESTRATOR}_*/{BUILD_FILE}"))
    return [
        path.parent for path in records if read_record(path).keys() & {ENSEMBLE_SCHEDULE, _PART}
    ]


def write_ensembles(staged: Path, settings: Settings, schedules: Sequence[Schedule]) -> None:
    """Writes an ensemble for each of `schedules` beside the finished models in `staged`."""
    for model in _models(staged, settings, schedules) if schedules else ():
        model.write(staged / model.config.name)


def ensembles_are_installed(
    repository: Path, settings: Settings, schedules: Sequence[Schedule]
) -> bool:
    """Whether `repository` has exactly the ensembles of `schedules`, as they would be written."""
    wanted = _models(repository, settings, schedules) if schedules else ()
    present = [repository / name for name in ensemble_models(repository)]
    return {each.config.name: each.files() for each in wanted} == {
        folder.name: {file: _text(folder / file) for file in _FILES} for folder in present
    }


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


@dataclass(frozen=True)
class _Model:
    """A model of an ensemble: its code's module in `flowturbo.serving`, of which Triton has none
    for the ensemble itself, and its build record.
    """

    config: ModelConfig
    code: str | None
    build: dict[str, str]

    def files(self) -> dict[str, str | None]:
        """The content of each file of its folder; None for one that it does not have."""
        code = _MODEL_PY.format(self.code) if self.code else None
        contents = text_format.MessageToString(self.config), code, install.record(self.build)
        return dict(zip(_FILES, contents, strict=True))

    def write(self, folder: Path) -> None:
        (folder / "1").mkdir(parents=True)
        for name, text in self.files().items():
            if text is not None:
                (folder / name).write_text(text)


def _models(
    repository: Path, settings: Settings, schedules: Iterable[Schedule]
) -> Iterable[_Model]:
    pipeline = Pipeline.load(repository)
    sizes = _sizes(repository)
    finisher = _python_model(contract.FINISHER, sizes, *_FINISHER_TENSORS)
    yield _Model(finisher, "finisher", {_PART: "all"})
    checks = pipeline.has_decoder and not _checks_itself(repository)
    if checks:
        checker = _python_model(contract.CHECKER, sizes, *_CHECKER_TENSORS)
        yield _Model(checker, "checker", {_PART: "all"})
    for schedule in schedules:
        program = compile_program(schedule, variant=Variant(settings.variant))
        planner = _planner(program, pipeline, settings, sizes)
        yield _Model(planner, "planner", {_PART: str(schedule)})
        record = {ENSEMBLE_SCHEDULE: str(schedule), "variant": settings.variant}
        yield _Model(_ensemble(program, pipeline, sizes, checks=checks), None, record)


_FINISHER_TENSORS = contract.FINISHER_INPUTS, contract.FINISHER_OUTPUTS
_CHECKER_TENSORS = contract.CHECKER_INPUTS, contract.CHECKER_OUTPUTS


def _sizes(repository: Path) -> dict[int | str, int]:
    models = (contract.PREDICTOR, contract.DECODER)
    present = [model for model in models if (repository / model).is_dir()]
    return {k: v for m in present for k, v in install.read_build(repository / m)["sizes"].items()}


def _python_model(
    name: str,
    sizes: dict[int | str, int],
    inputs: Iterable[contract.TensorSpec],
    outputs: Iterable[contract.TensorSpec],
) -> ModelConfig:
    config = ModelConfig(name=name, backend="python")
    add_tensors(config, inputs, outputs, sizes)
    config.instance_group.add(count=1, kind=ModelInstanceGroup.KIND_CPU)
    return config


def _planner_name(schedule: Schedule) -> str:
    return f"{ensemble_name(schedule)}_planner"


def _planner(
    program: Program, pipeline: Pipeline, settings: Settings, sizes: dict[int | str, int]
) -> ModelConfig:
    outputs = contract.plan_outputs(len(program.calls))
    name = _planner_name(program.schedule)
    config = _python_model(name, sizes, contract.ENSEMBLE_INPUTS, outputs)
    config.parameters["default_schedule"].string_value = str(program.schedule)
    for setting in ("default_guidance_scale", "variant"):
        config.parameters[setting].string_value = str(getattr(settings, setting))
    # As many as fit in one batch: how many a request may ask for is the orchestrator's affair.
    config.parameters["max_images"].string_value = str(pipeline.max_rows)
    return config


def _checks_itself(repository: Path) -> bool:
    """Whether the decoder refuses images that are not finite: the Python backend's does."""
    engine: str = install.read_build(repository / contract.DECODER)["engine"]
    return engine == "python"


def _ensemble(
    program: Program, pipeline: Pipeline, sizes: dict[int | str, int], *, checks: bool
) -> ModelConfig:
    config = ModelConfig(name=ensemble_name(program.schedule), platform="ensemble")
    images = [contract.ENSEMBLE_IMAGE] if pipeline.has_decoder else []
    add_tensors(config, contract.ENSEMBLE_INPUTS, [*images, contract.ENSEMBLE_LATENT], sizes)
    for step in _steps(program, pipeline, checks=checks):
        entry = config.ensemble_scheduling.step.add(model_name=step.model, model_version=-1)
        entry.input_map.update(step.inputs)
        entry.output_map.update(step.outputs)
    return config


def _steps(program: Program, pipeline: Pipeline, *, checks: bool) -> Iterable[Step]:
    planned = contract.plan_outputs(len(program.calls))
    yield Step(
        _planner_name(program.schedule),
        {spec.name: spec.name for spec in contract.ENSEMBLE_INPUTS},
        {spec.name: spec.name for spec in planned},
    )
    blocks, latent_rows = block_steps(program)
    decoded = contract.DECODER_LATENT
    yield from blocks
    yield Step(
        contract.FINISHER,
        {contract.LATENT_ROWS: latent_rows, contract.PLAN_PAIR: contract.PLAN_PAIR},
        {"latent": "latent"} | ({decoded: decoded} if pipeline.has_decoder else {}),
    )
    if pipeline.has_decoder and not checks:
        yield Step(contract.DECODER, {"latent": decoded}, {"image": "image"})
    if checks:
        outputs = {"image": contract.DECODED_IMAGE, "magnitude": contract.DECODED_MAGNITUDE}
        yield Step(contract.DECODER, {"latent": decoded}, outputs)
        checked = {name: name for name in outputs.values()}
        yield Step(contract.CHECKER, checked, {"image": "image"})
