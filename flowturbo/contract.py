"""Names, types and shapes of the tensors that cross a process: the one place that states them.

What belongs to a condition (class labels, prompts) is stated with it, in `flowturbo.conditions`.
-1 is any size. A dimension given as a letter is the pipeline's own (C, h, w latent; H, W image).
Block tensors have a leading row dimension, which Triton's batcher owns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from flowturbo.errors import RequestError

ORCHESTRATOR = "flowturbo"


class Role(StrEnum):
    """What a composed model is to its pipeline."""

    PREDICTOR = "predictor"
    REFINER = "refiner"
    DECODER = "decoder"


_MODELS = {
    Role.PREDICTOR: "velocity_predictor",
    Role.REFINER: "velocity_refiner",
    Role.DECODER: "vae_decoder",
}


def model_name(pipeline: str, role: Role) -> str:
    """The Triton model with this role: `glyphs_velocity_predictor`."""
    return f"{pipeline}_{_MODELS[role]}"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its numpy type (object for bytes) and its dimensions."""

    name: str
    dtype: type[np.generic] | type[object]
    dims: tuple[int | str, ...]
    optional: bool = False


Specs = tuple[TensorSpec, ...]

# The request: inputs that every pipeline takes. Those of conditions come beside them.
PIPELINE = "pipeline"
SEED = "seed"
SCHEDULE = "schedule"
TIMES = "times"
GUIDANCE_SCALE = "guidance_scale"
GUIDANCE_INTERVAL = "guidance_interval"
INITIAL_NOISE = "initial_noise"
OUTPUT_FORMAT = "output_format"
COMMON_INPUTS = (
    TensorSpec(SEED, np.int64, (-1,), optional=True),
    TensorSpec(SCHEDULE, np.object_, (1,), optional=True),
    TensorSpec(TIMES, np.float32, (-1,), optional=True),
    TensorSpec(GUIDANCE_SCALE, np.float32, (1,), optional=True),
    TensorSpec(GUIDANCE_INTERVAL, np.float32, (2,), optional=True),
    TensorSpec(INITIAL_NOISE, np.float32, (-1, "C", "h", "w"), optional=True),
    TensorSpec(OUTPUT_FORMAT, np.object_, (1,), optional=True),
)
PIPELINE_INPUT = TensorSpec(PIPELINE, np.object_, (1,), optional=True)

IMAGE = "image"
ENCODED_IMAGE = "encoded_image"
LATENT = "latent"
SETTINGS = "settings"
PIPELINES = "pipelines"
COMMON_OUTPUTS = (
    TensorSpec(IMAGE, np.uint8, (-1, -1, -1, 3)),
    TensorSpec(ENCODED_IMAGE, np.object_, (-1,)),
    TensorSpec(LATENT, np.float32, (-1, -1, -1, -1)),
    TensorSpec(SEED, np.int64, (-1,)),
    # JSON: what was used, defaults resolved; and what is served, which needs no input.
    TensorSpec(SETTINGS, np.object_, (1,)),
    TensorSpec(PIPELINES, np.object_, (1,)),
)

# The step blocks: each row is a state with its own coefficients. The columns of `scalars` are
# named in flowturbo.solver.program.
X, VELOCITY, SCALARS, PAIR = "x", "velocity", "scalars", "pair"
X_NEXT, VELOCITY_NEXT = "x_next", "velocity_next"
SCALAR_COLUMNS = 5
BLOCK_OUTPUTS = (
    TensorSpec(X_NEXT, np.float32, ("C", "h", "w")),
    TensorSpec(VELOCITY_NEXT, np.float32, ("C", "h", "w")),
)
# Mean magnitude of the pixels before they are rounded to levels: not finite where one is not.
MAGNITUDE = "magnitude"
DECODER_INPUTS = (TensorSpec(LATENT, np.float32, ("C", "h", "w")),)
DECODER_OUTPUTS = (
    TensorSpec(IMAGE, np.uint8, ("H", "W", 3)),
    TensorSpec(MAGNITUDE, np.float32, (1,)),
)


def composed_tensors(role: Role, conditioning: Specs) -> tuple[Specs, Specs]:
    """Inputs and outputs of a composed model, of a pipeline whose blocks take `conditioning`."""
    if role is Role.DECODER:
        return DECODER_INPUTS, DECODER_OUTPUTS
    inputs = (
        TensorSpec(X, np.float32, ("C", "h", "w")),
        TensorSpec(VELOCITY, np.float32, ("C", "h", "w")),
        *conditioning,
        TensorSpec(SCALARS, np.float32, (SCALAR_COLUMNS,)),
        # Offset of the row's guidance partner: 1, -1, or 0 for none.
        TensorSpec(PAIR, np.int32, (1,)),
    )
    return inputs, BLOCK_OUTPUTS


# An ensemble, a model for one schedule (ensemble.py): its tensors, and those between its steps.
PLAN_NOISE = "noise_rows"
PLAN_PAIR = "pair_rows"
LATENT_ROWS = "latent_rows"
# Triton (24.10) does not run a step whose output feeds another step and is an output of the
# ensemble that the request leaves out: hence the latents come twice out of the finisher.
ENSEMBLE_IMAGE = TensorSpec(IMAGE, np.uint8, (-1, "H", "W", 3))
ENSEMBLE_LATENT = TensorSpec(LATENT, np.float32, (-1, "C", "h", "w"))
FINISHER_INPUTS = (
    TensorSpec(LATENT_ROWS, np.float32, (-1, "C", "h", "w")),
    TensorSpec(PLAN_PAIR, np.int32, (-1, 1)),
)
DECODER_LATENT = "decoder_latent"
FINISHER_OUTPUTS = (ENSEMBLE_LATENT, replace(ENSEMBLE_LATENT, name=DECODER_LATENT))
DECODED_IMAGE = "decoded_image"
DECODED_MAGNITUDE = "decoded_magnitude"
CHECKER_INPUTS = (
    replace(ENSEMBLE_IMAGE, name=DECODED_IMAGE),
    TensorSpec(DECODED_MAGNITUDE, np.float32, (-1, 1)),
)
CHECKER_OUTPUTS = (ENSEMBLE_IMAGE,)


def finisher_name(pipeline: str) -> str:
    """The model that ends every ensemble of a pipeline: rows to the latents of images."""
    return f"{pipeline}_finisher"


def checker_name(pipeline: str) -> str:
    """The model that lets finite images through, where the decoder does not see to it."""
    return f"{pipeline}_checker"


def ensemble_inputs(conditioned: Specs) -> Specs:
    """An ensemble's inputs, of a pipeline whose condition takes the request inputs `conditioned`.

    Its `seed` is the request's alone: an ensemble cannot answer one that it drew, that name being
    the input's. It is optional to Triton, whose word for a missing input is "unexpected deadlock"
    (24.10).
    """
    common = [spec for spec in COMMON_INPUTS if spec.name in (SEED, GUIDANCE_SCALE)]
    return (*conditioned, *common)


def plan_condition(name: str) -> str:
    """The rows of the conditioning tensor `name`, as a planner answers them."""
    return f"{name}_rows"


def plan_scalars(index: int) -> str:
    """The scalars of a program's block call number `index`, from 0."""
    return f"scalars_{index}"


def plan_outputs(calls: int, conditioning: Specs) -> Specs:
    """What the planner of a program of `calls` block calls answers with, a row each."""
    return (
        TensorSpec(PLAN_NOISE, np.float32, (-1, "C", "h", "w")),
        *(TensorSpec(plan_condition(s.name), s.dtype, (-1, *s.dims)) for s in conditioning),
        TensorSpec(PLAN_PAIR, np.int32, (-1, 1)),
        *(TensorSpec(plan_scalars(k), np.float32, (-1, SCALAR_COLUMNS)) for k in range(calls)),
    )


def shown_dims(dims: Sequence[int | str]) -> str:
    """Dimensions as messages show them: n for any size."""
    return ", ".join("n" if dim == -1 else str(dim) for dim in dims)


def text_of(name: str, entry: Any) -> str:
    """An entry of the BYTES tensor `name` as text; raises RequestError unless it is UTF-8."""
    try:
        return entry.decode() if isinstance(entry, bytes) else str(entry)
    except UnicodeDecodeError:
        raise RequestError(f"{name} must be UTF-8 text, got {entry[:40]!r}") from None
