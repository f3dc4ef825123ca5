"""Compares an exported text-to-image pipeline, all of it, with diffusers' own pipeline."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.source import Loaded
from flowturbo.conditions.prompt import PROMPT, Prompt
from flowturbo.contract import (
    GUIDANCE_SCALE,
    IMAGE,
    INITIAL_NOISE,
    LATENT,
    SCHEDULE,
    SIZE,
    TIMES,
    Role,
)
from flowturbo.generate import generate, program_for
from flowturbo.latents import noise
from flowturbo.local import open_role
from flowturbo.nets.families.family import Wanted
from flowturbo.parity import TOLERANCES, VerificationError, errors
from flowturbo.pipeline import Pipeline
from flowturbo.request import parse_request
from flowturbo.rows import Tensors
from flowturbo.runtimes import Model
from flowturbo.settings import Settings
from flowturbo.solver.calls import Variant

STEPS, IMAGES = 2, 2
SCALE = 2.0  # of guidance: larger ones multiply the rounding of bf16
_OUTPUT = "trajectory"


@dataclass(frozen=True)
class WholeCheck:
    """Latents that diffusers' pipeline made in float32, and how to ask ours for the same."""

    wanted: Wanted
    latents: np.ndarray
    times: tuple[float, ...]

    @classmethod
    def of(cls, loaded: Loaded) -> "WholeCheck":
        """Runs diffusers' pipeline at the smallest size, and drops it."""
        family, target = loaded.family, loaded.targets[0]
        condition = target.condition
        assert isinstance(condition, Prompt)
        sizes = loaded.fields["image_sizes"] or (
            tuple(side * family.factor for side in target.latent_shape[1:]),
        )
        size = min(sizes, key=lambda each: each[0] * each[1])
        texts = condition.example(IMAGES)[PROMPT].tolist()
        wanted = Wanted(
            prompts=texts,
            noise=noise(np.arange(IMAGES), family.latent_shape(size)),
            steps=STEPS,
            guidance_scale=1.0 if family.distilled else SCALE,
            size=size,
            text_length=family.text_length,
        )
        print("diffusers' own pipeline in float32 ... ", end="", flush=True)
        latents, times = family.reference(wanted)
        family.parts.clear()
        print("done", flush=True)
        return cls(wanted, latents, times)

    def hold(self, pipeline: Pipeline, staged: Path) -> None:
        """Compares the exported models with it. Raises VerificationError."""
        tensors = {
            PROMPT: np.array(self.wanted.prompts, dtype=object),
            INITIAL_NOISE: self.wanted.noise,
            SCHEDULE: np.array([f"E{self.wanted.steps}"], dtype=object),
            TIMES: np.array(self.times, dtype=np.float32),
            GUIDANCE_SCALE: np.array([self.wanted.guidance_scale], dtype=np.float32),
            SIZE: np.array(self.wanted.size),
        }
        request = parse_request(tensors, [LATENT, IMAGE], pipeline, Settings())
        program = program_for(request.schedule, Variant.REFERENCE, request.times)
        made = generate(request, pipeline, Settings(), program, _OneAtATime(staged, pipeline))
        found = made[LATENT]
        if made[IMAGE].shape[1:3] != self.wanted.size:
            raise VerificationError(
                f"{pipeline.name}: images are {made[IMAGE].shape[1:3]}, not {self.wanted.size}"
            )
        allowed = max(
            (
                TOLERANCES[pipeline.models[role].precision]
                for role in (Role.PREDICTOR, Role.TEXT_ENCODER)
            ),
            key=lambda each: each.trajectory,
        )
        (error,) = errors({_OUTPUT: self.latents}, {_OUTPUT: found}, allowed)
        if error.exceeded:
            raise VerificationError(
                f"{pipeline.name}: the latents of {self.wanted.steps} Euler steps are off by "
                f"{error.relative:.3g} against diffusers' own pipeline in float32, at most "
                f"{error.allowed:g} is allowed"
            )
        print(f"{pipeline.name}: off by {error.relative:.1e} against diffusers' own pipeline")


class _OneAtATime:
    """The models here, each opened when it is called and closed for the next: they may be large.

    As `try_runtimes` verified them: files for other engines are not rounded.
    """

    def __init__(self, staged: Path, pipeline: Pipeline) -> None:
        self._staged = staged
        self._pipeline = pipeline
        self._role: Role | None = None
        self._model: Model | None = None

    def __call__(self, role: Role, inputs: Tensors) -> tuple[np.ndarray, ...]:
        """The outputs of the model with this role."""
        if role is not self._role or self._model is None:
            self._model = None
            self._role, self._model = role, self._open(role)
        return self._model(inputs)

    def _open(self, role: Role) -> Model:
        made = self._pipeline.models[role]
        rounds = made.engine == "python" or made.runtime != "openvino"
        precision = made.precision if rounds else "fp32"
        return open_role(self._staged, self._pipeline, role, precision=precision)
