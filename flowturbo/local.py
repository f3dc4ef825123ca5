"""Runs a pipeline in this process, without a server: same programs, same model files."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo.conditions.class_label import LABEL
from flowturbo.conditions.prompt import NEGATIVE_PROMPT, PROMPT, TRUNCATED
from flowturbo.contract import (
    FEATHER,
    GUIDANCE_INTERVAL,
    GUIDANCE_SCALE,
    IMAGE,
    INITIAL_NOISE,
    INVERT,
    LATENT,
    MASK,
    SCHEDULE,
    SEED,
    SIZE,
    STRENGTH,
    TIMES,
    Role,
)
from flowturbo.errors import RequestError
from flowturbo.generate import generate, program_of
from flowturbo.pipeline import Pipeline, read_pipeline
from flowturbo.request import GenerationRequest, parse_request
from flowturbo.rows import Tensors
from flowturbo.runtimes import ONE_NUMPY_THREAD, Model, model_file, open_model
from flowturbo.settings import Settings
from flowturbo.solver.calls import Variant
from flowturbo.solver.program import Program


@dataclass(frozen=True)
class LocalResult:
    """`image` [n, H, W, 3] uint8 (or None), `latent` [n, C, h, w] float32, `seed` [n] int64.

    `truncated` [n] bool says which texts were cut; it is None for classes.
    """

    image: np.ndarray | None
    latent: np.ndarray
    seed: np.ndarray
    truncated: np.ndarray | None = None


class LocalPipeline:
    """Runs the exported models of an installed pipeline, in the runtime of the export.

    Raises RepositoryError if the repository is incomplete.
    """

    def __init__(
        self,
        model_repository: str | Path,
        pipeline: str | None = None,
        *,
        threads: int | None = None,
        solvers: bool = True,
    ) -> None:
        """Loads the models of `pipeline` from `model_repository`; None is the default pipeline.

        `threads` None means one thread per core. Without `solvers` the fitted ones are not read.
        """
        repository = Path(model_repository)
        self.pipeline = read_pipeline(repository, pipeline, solvers=solvers)
        self.settings = Settings.load(repository)
        self.default_schedule = self.pipeline.default_schedule(self.settings)
        self._models = open_models(repository, self.pipeline, threads)

    @property
    def on_gpu(self) -> bool:
        """Whether all models are on a GPU."""
        return all(model.on_gpu for model in self._models.values())

    def generate(
        self,
        label: int | Sequence[int] | np.ndarray | None = None,
        seed: int | Sequence[int] | np.ndarray | None = None,
        schedule: str | None = None,
        guidance_scale: float | None = None,
        *,
        guidance_interval: tuple[float, float] | None = None,
        initial_noise: np.ndarray | None = None,
        variant: str | None = None,
        times: Sequence[float] | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        strength: float | None = None,
        feather: int | None = None,
        invert: bool = False,
    ) -> LocalResult:
        """Images of the classes `label` [n] or of `prompt`; None means the service's default.

        One prompt serves all seeds. `size` is (width, height) in pixels. `schedule` may be the name
        of a preset. `initial_noise` [n, C, h, w] float32 replaces `seed` [n]. `times` is a time
        grid with one time more than the schedule has steps. `image` [1 or n, H, W, 3] and `mask`
        [1 or n, H, W] are uint8. With `invert` the latent is the noise of `image`, and there is no
        image. Raises RequestError as the server does.
        """
        tensors: Tensors = {}
        if label is not None:
            tensors[LABEL] = _integers(LABEL, label)
        for name, texts in ((PROMPT, prompt), (NEGATIVE_PROMPT, negative_prompt)):
            if texts is not None:
                listed = [texts] if isinstance(texts, str | bytes) else list(texts)
                tensors[name] = np.array(listed, dtype=object)
        if size is not None:
            tensors[SIZE] = _integers(SIZE, size[::-1])
        if seed is not None:
            tensors[SEED] = _integers(SEED, seed)
        if schedule is not None:
            tensors[SCHEDULE] = np.array([schedule], dtype=object)
        given: dict[str, Any] = {
            GUIDANCE_SCALE: None if guidance_scale is None else [guidance_scale],
            GUIDANCE_INTERVAL: guidance_interval,
            INITIAL_NOISE: initial_noise,
            TIMES: times,
            STRENGTH: None if strength is None else [strength],
        }
        for name, value in given.items():
            if value is not None:
                tensors[name] = np.asarray(value, dtype=np.float32)
        for name, array in ((IMAGE, image), (MASK, mask)):
            if array is not None:
                tensors[name] = np.asarray(array)
        if feather is not None:
            tensors[FEATHER] = _integers(FEATHER, feather)
        if invert:
            tensors[INVERT] = np.array([True])
        wanted = [LATENT, SEED] + [IMAGE] * (self.pipeline.has(Role.DECODER) and not invert)
        wanted += [TRUNCATED] * self.pipeline.has(Role.TEXT_ENCODER)
        request = parse_request(tensors, wanted, self.pipeline, self.settings)
        answer = self.run(request, self._program(request, variant))
        return LocalResult(answer.get(IMAGE), answer[LATENT], answer[SEED], answer.get(TRUNCATED))

    def run(self, request: GenerationRequest, program: Program) -> Tensors:
        """The output tensors of a checked request, by name."""
        with nullcontext() if self.on_gpu else ONE_NUMPY_THREAD:
            return generate(request, self.pipeline, self.settings, program, self._infer)

    def _infer(self, role: Role, tensors: Tensors) -> tuple[np.ndarray, ...]:
        return self._models[role](tensors)

    def _program(self, request: GenerationRequest, variant: str | None) -> Program:
        try:
            chosen = Variant(variant or self.settings.variant)
        except ValueError:
            allowed = ", ".join(Variant)
            raise RequestError(f"variant must be one of {allowed}, got {variant!r}") from None
        return program_of(request, self.pipeline, chosen)


def open_models(
    repository: Path, pipeline: Pipeline, threads: int | None = None
) -> dict[Role, Model]:
    """Opens the composed models of `pipeline`, by role, in the runtime of the export."""
    return {
        role: open_role(repository, pipeline, role, threads=threads) for role in pipeline.models
    }


def open_role(
    repository: Path,
    pipeline: Pipeline,
    role: Role,
    *,
    precision: str | None = None,
    threads: int | None = None,
) -> Model:
    """Opens one composed model in the runtime of the export, and its precision if none is given."""
    made = pipeline.models[role]
    return open_model(
        repository / pipeline.model(role) / "1" / model_file(made.runtime),
        precision or made.precision,
        threads,
        made.runtime,
        on_gpu=made.on_gpu,
        fixed_rows=made.fixed_rows,
    )


def _integers(name: str, values: int | Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.atleast_1d(np.asarray(values))
    # Numbers beyond int64 give an unsigned or object array. An empty list gives a float array.
    if array.size and not np.issubdtype(array.dtype, np.signedinteger):
        raise RequestError(f"{name} must be int64 integers, got {values!r}")
    return array.astype(np.int64)
