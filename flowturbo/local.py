"""The pipeline in this process: the served program on the served files, without a server."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowturbo import contract
from flowturbo.errors import RequestError
from flowturbo.generate import generate, program_for
from flowturbo.repository import Pipeline, Settings, read_build
from flowturbo.request import GenerationRequest, default_schedule, parse_request
from flowturbo.runtimes import Model, model_file, open_model
from flowturbo.solver.guidance import Tensors
from flowturbo.solver.program import Program, Variant, compile_program
from flowturbo.solver.schedule import Schedule


@dataclass(frozen=True)
class LocalResult:
    """`image` [n, H, W, 3] uint8 (or None), `latent` [n, C, h, w] float32, `seed` [n] int64."""

    image: np.ndarray | None
    latent: np.ndarray
    seed: np.ndarray


class LocalPipeline:
    """Runs the exported ONNX blocks of a model repository, in the runtime that it was made for.

    Raises RepositoryError when the repository lacks something.
    """

    def __init__(self, model_repository: str | Path, *, threads: int | None = None) -> None:
        """Loads every model of `model_repository`; `threads` None is one a core."""
        repository = Path(model_repository)
        self.pipeline = Pipeline.load(repository)
        self.settings = Settings.load(repository)
        self.default_schedule = default_schedule(self.pipeline, self.settings)
        self._models = open_models(repository, self.pipeline, threads)

    @property
    def on_gpu(self) -> bool:
        """Whether every model was loaded on a GPU."""
        return all(model.on_gpu for model in self._models.values())

    def generate(
        self,
        label: int | Sequence[int] | np.ndarray,
        seed: int | Sequence[int] | np.ndarray | None = None,
        schedule: str | None = None,
        guidance_scale: float | None = None,
        *,
        guidance_interval: tuple[float, float] | None = None,
        initial_noise: np.ndarray | None = None,
        variant: str | None = None,
        times: Sequence[float] | None = None,
    ) -> LocalResult:
        """Images of the classes `label` [n]; what is None is the service's default.

        `schedule` may be a preset's name.
        `initial_noise` [n, C, h, w] float32 stands instead of `seed` [n]; `times` is a time grid of
        one time more than the schedule's steps. Raises RequestError as the server does.
        """
        tensors: Tensors = {"label": _integers("label", label)}
        if seed is not None:
            tensors["seed"] = _integers("seed", seed)
        if schedule is not None:
            tensors["schedule"] = np.array([schedule], dtype=object)
        if guidance_scale is not None:
            tensors["guidance_scale"] = np.array([guidance_scale], dtype=np.float32)
        if guidance_interval is not None:
            tensors["guidance_interval"] = np.array(guidance_interval, dtype=np.float32)
        if initial_noise is not None:
            tensors["initial_noise"] = np.asarray(initial_noise, dtype=np.float32)
        wanted = ["latent", "seed"] + ["image"] * self.pipeline.has_decoder
        request = parse_request(tensors, wanted, self.pipeline, self.settings)
        answer = self.run(request, self._program(request.schedule, times, variant))
        return LocalResult(answer.get("image"), answer["latent"], answer["seed"])

    def run(self, request: GenerationRequest, program: Program) -> dict[str, np.ndarray]:
        """The output tensors of a checked request, by name."""
        return generate(request, self.pipeline, program, self._infer)

    def _infer(self, model: str, tensors: Tensors) -> tuple[np.ndarray, ...]:
        return self._models[model](tensors)

    def _program(
        self, schedule: Schedule, times: Sequence[float] | None, variant: str | None
    ) -> Program:
        try:
            chosen = Variant(variant or self.settings.variant)
        except ValueError:
            allowed = ", ".join(Variant)
            raise RequestError(f"variant must be one of {allowed}, got {variant!r}") from None
        if times is None:
            return program_for(schedule, chosen)
        return compile_program(schedule, times, chosen)


def open_models(
    repository: Path, pipeline: Pipeline, threads: int | None = None
) -> dict[str, Model]:
    """The composed models that `repository` has, by name, in the runtime it was made for."""
    return {
        name: open_model(
            repository / name / "1" / model_file(build["runtime"]),
            build["precision"],
            threads,
            build["runtime"],
            on_gpu=build["on_gpu"],
        )
        for name in models_of(pipeline)
        if (build := read_build(repository, name))
    }


def models_of(pipeline: Pipeline) -> list[str]:
    """The names of the composed models that `pipeline` has."""
    present = [contract.PREDICTOR]
    present += [contract.REFINER] * pipeline.has_refiner
    present += [contract.DECODER] * pipeline.has_decoder
    return present


def _integers(name: str, values: int | Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.atleast_1d(np.asarray(values))
    # A number beyond int64 makes an unsigned or an object array; an empty list a float one.
    if array.size and not np.issubdtype(array.dtype, np.signedinteger):
        raise RequestError(f"{name} must be int64 integers, got {values!r}")
    return array.astype(np.int64)
