"""Names, types and shapes of every tensor that crosses a process: the one place that states them.

-1 is any size; a dimension given as a letter is the model's own (C, h, w latent; H, W image). Block
tensors have a leading row dimension, which Triton's batcher owns.
"""

from dataclasses import dataclass, replace

import numpy as np

ORCHESTRATOR = "flowturbo"
PREDICTOR = "velocity_predictor"
REFINER = "velocity_refiner"
DECODER = "vae_decoder"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its numpy type (object for bytes) and its dimensions."""

    name: str
    dtype: type[np.generic] | type[object]
    dims: tuple[int | str, ...]
    optional: bool = False


REQUEST_INPUTS = (
    TensorSpec("label", np.int64, (-1,), optional=True),
    TensorSpec("class_name", np.object_, (-1,), optional=True),
    TensorSpec("seed", np.int64, (-1,), optional=True),
    TensorSpec("schedule", np.object_, (1,), optional=True),
    TensorSpec("guidance_scale", np.float32, (1,), optional=True),
    TensorSpec("guidance_interval", np.float32, (2,), optional=True),
    TensorSpec("initial_noise", np.float32, (-1, "C", "h", "w"), optional=True),
    TensorSpec("output_format", np.object_, (1,), optional=True),
)
REQUEST_OUTPUTS = (
    TensorSpec("image", np.uint8, (-1, -1, -1, 3)),
    TensorSpec("encoded_image", np.object_, (-1,)),
    TensorSpec("latent", np.float32, (-1, -1, -1, -1)),
    TensorSpec("seed", np.int64, (-1,)),
    TensorSpec("class_name", np.object_, (-1,)),
)

# Columns of `scalars`, of the predictor: t, euler, w_prev, w_next, guidance scale; of the refiner:
# t, end, guidance scale at each, whether it reads the refined velocity (program.BlockCall).
SCALARS = 5
BLOCK_INPUTS = (
    TensorSpec("x", np.float32, ("C", "h", "w")),
    TensorSpec("velocity", np.float32, ("C", "h", "w")),
    TensorSpec("label", np.int64, (1,)),
    TensorSpec("scalars", np.float32, (SCALARS,)),
    # Offset of the row's guidance partner: 1, -1, or 0 for none.
    TensorSpec("pair", np.int32, (1,)),
)
BLOCK_OUTPUTS = (
    TensorSpec("x_next", np.float32, ("C", "h", "w")),
    TensorSpec("velocity_next", np.float32, ("C", "h", "w")),
)
DECODER_INPUTS = (TensorSpec("latent", np.float32, ("C", "h", "w")),)
DECODER_OUTPUTS = (
    TensorSpec("image", np.uint8, ("H", "W", 3)),
    # Mean magnitude of the pixels before they are rounded to levels: not finite where one is not.
    TensorSpec("magnitude", np.float32, (1,)),
)

COMPOSED = {
    PREDICTOR: (BLOCK_INPUTS, BLOCK_OUTPUTS),
    REFINER: (BLOCK_INPUTS, BLOCK_OUTPUTS),
    DECODER: (DECODER_INPUTS, DECODER_OUTPUTS),
}

# An ensemble, a model for one schedule (ensemble.py): its tensors, and those between its steps.
FINISHER = "flowturbo_finisher"
CHECKER = "flowturbo_checker"
PLAN_NOISE = "noise_rows"
PLAN_LABEL = "label_rows"
PLAN_PAIR = "pair_rows"
LATENT_ROWS = "latent_rows"

# Of `seed`, the request's alone: an ensemble cannot answer one that it drew, that name being the
# input's. Optional to Triton, whose word for a missing input is "unexpected deadlock" (24.10).
ENSEMBLE_INPUTS = tuple(
    spec
    for spec in REQUEST_INPUTS
    if spec.name in ("label", "class_name", "seed", "guidance_scale")
)
# Triton (24.10) does not run a step whose output feeds another step and is an output of the
# ensemble that the request leaves out: hence the latents come twice out of the finisher.
ENSEMBLE_IMAGE = TensorSpec("image", np.uint8, (-1, "H", "W", 3))
ENSEMBLE_LATENT = TensorSpec("latent", np.float32, (-1, "C", "h", "w"))
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


def plan_scalars(index: int) -> str:
    """The scalars of a program's block call number `index`, from 0."""
    return f"scalars_{index}"


def plan_outputs(calls: int) -> tuple[TensorSpec, ...]:
    """What the planner of a program of `calls` block calls answers with, a row each."""
    return (
        TensorSpec(PLAN_NOISE, np.float32, (-1, "C", "h", "w")),
        TensorSpec(PLAN_LABEL, np.int64, (-1, 1)),
        TensorSpec(PLAN_PAIR, np.int32, (-1, 1)),
        *(TensorSpec(plan_scalars(k), np.float32, (-1, SCALARS)) for k in range(calls)),
    )
