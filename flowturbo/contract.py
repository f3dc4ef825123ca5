"""The one place for names, types and shapes of the tensors that cross process boundaries.

Tensors of a condition (class labels, prompts) are in `flowturbo.conditions`. A dimension of -1 is
any size. A letter is a size of the pipeline (C, h, w of a latent; H, W of an image). Block tensors
also have a leading row dimension, which belongs to Triton's batcher.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from flowturbo.errors import RequestError

ORCHESTRATOR = "flowturbo"
STREAM = "flowturbo_stream"  # the same, with previews; a model of its own: it answers many times

# The header with the name of the caller whose share of the time a request uses. It must come from a
# trusted front end. `flowturbo.serve` lets Triton forward it.
CALLER_HEADER = "flowturbo-caller"


class Role(StrEnum):
    """The role of a composed model in its pipeline."""

    PREDICTOR = "predictor"
    REFINER = "refiner"
    DECODER = "decoder"
    ENCODER = "encoder"
    TEXT_ENCODER = "text_encoder"


# The roles of a pipeline with classes. Prompts also need a text encoder.
LABEL_ROLES = (Role.PREDICTOR, Role.REFINER, Role.DECODER)
# The VAE's models: no step blocks, so they take no condition and have no part in a trajectory.
VAE_ROLES = (Role.DECODER, Role.ENCODER)
_MODELS = {
    Role.PREDICTOR: "velocity_predictor",
    Role.REFINER: "velocity_refiner",
    Role.DECODER: "vae_decoder",
    Role.ENCODER: "vae_encoder",
    Role.TEXT_ENCODER: "text_encoder",
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

# Request inputs that every pipeline takes. The inputs of a condition are added to them.
PIPELINE = "pipeline"
SEED = "seed"
SCHEDULE = "schedule"
TIMES = "times"
GUIDANCE_SCALE = "guidance_scale"
GUIDANCE_INTERVAL = "guidance_interval"
INITIAL_NOISE = "initial_noise"
SIZE = "size"
OUTPUT_FORMAT = "output_format"
OUTPUT_QUALITY = "output_quality"
STRIP_METADATA = "strip_metadata"
IMAGE = "image"
IMAGE_FILE = "image_file"
MASK = "mask"
MASK_FILE = "mask_file"
STRENGTH = "strength"
INVERT = "invert"
FEATHER = "feather"
# Inputs of requests with an image, for pipelines with an encoder. Files are PNG, JPEG or WebP.
EDIT_INPUTS = (
    TensorSpec(IMAGE, np.uint8, (-1, -1, -1, 3), optional=True),
    TensorSpec(IMAGE_FILE, np.object_, (-1,), optional=True),
    TensorSpec(MASK, np.uint8, (-1, -1, -1), optional=True),  # 255: repaint
    TensorSpec(MASK_FILE, np.object_, (-1,), optional=True),
    TensorSpec(STRENGTH, np.float32, (1,), optional=True),
    TensorSpec(INVERT, np.bool_, (1,), optional=True),
    TensorSpec(FEATHER, np.int64, (1,), optional=True),  # pixels
)
COMMON_INPUTS = (
    TensorSpec(SEED, np.int64, (-1,), optional=True),
    TensorSpec(SCHEDULE, np.object_, (1,), optional=True),
    TensorSpec(TIMES, np.float32, (-1,), optional=True),
    TensorSpec(GUIDANCE_SCALE, np.float32, (1,), optional=True),
    TensorSpec(GUIDANCE_INTERVAL, np.float32, (2,), optional=True),
    TensorSpec(INITIAL_NOISE, np.float32, (-1, "C", "h", "w"), optional=True),
    TensorSpec(SIZE, np.int64, (2,), optional=True),  # height, width in pixels
    TensorSpec(OUTPUT_FORMAT, np.object_, (1,), optional=True),
    TensorSpec(OUTPUT_QUALITY, np.int64, (1,), optional=True),  # of JPEG and WebP files
    TensorSpec(STRIP_METADATA, np.bool_, (1,), optional=True),
    *EDIT_INPUTS,
)
PIPELINE_INPUT = TensorSpec(PIPELINE, np.object_, (1,), optional=True)

ENCODED_IMAGE = "encoded_image"
LATENT = "latent"
START_TIME = "start_time"
SETTINGS = "settings"
PIPELINES = "pipelines"
COMMON_OUTPUTS = (
    TensorSpec(IMAGE, np.uint8, (-1, -1, -1, 3)),
    TensorSpec(ENCODED_IMAGE, np.object_, (-1,)),
    TensorSpec(LATENT, np.float32, (-1, -1, -1, -1)),
    TensorSpec(SEED, np.int64, (-1,)),
    TensorSpec(START_TIME, np.float32, (1,)),  # where the time grid starts: 0 is noise, 1 an image
    # JSON: the settings used, with defaults resolved; and the served pipelines (needs no input).
    TensorSpec(SETTINGS, np.object_, (1,)),
    TensorSpec(PIPELINES, np.object_, (1,)),
)

# What the stream takes and answers besides.
PREVIEW_EVERY = "preview_every"
STEP, FINAL = "step", "final"
STREAM_INPUTS = (TensorSpec(PREVIEW_EVERY, np.int64, (1,), optional=True),)
STREAM_OUTPUTS = (TensorSpec(STEP, np.int64, (1,)), TensorSpec(FINAL, np.bool_, (1,)))

# Tensors of the step blocks: each row is a state with its own coefficients. The columns of
# `scalars` are named in flowturbo.solver.calls.
X, VELOCITY, SCALARS, PAIR = "x", "velocity", "scalars", "pair"
X_NEXT, VELOCITY_NEXT = "x_next", "velocity_next"
SOLVER = "solver"
SCALAR_COLUMNS = 5
BLOCK_OUTPUTS = (
    TensorSpec(X_NEXT, np.float32, ("C", "h", "w")),
    TensorSpec(VELOCITY_NEXT, np.float32, ("C", "h", "w")),
)
# Mean magnitude of the pixels before rounding to levels. It is not finite if a pixel is not.
MAGNITUDE = "magnitude"
DECODER_INPUTS = (TensorSpec(LATENT, np.float32, ("C", "h", "w")),)
DECODER_OUTPUTS = (
    TensorSpec(IMAGE, np.uint8, ("H", "W", 3)),
    TensorSpec(MAGNITUDE, np.float32, (1,)),
)
ENCODER_INPUTS = (TensorSpec(IMAGE, np.uint8, ("H", "W", 3)),)
ENCODER_OUTPUTS = (TensorSpec(LATENT, np.float32, ("C", "h", "w")),)

BLOCK_INPUTS = (
    TensorSpec(X, np.float32, ("C", "h", "w")),
    TensorSpec(VELOCITY, np.float32, ("C", "h", "w")),
    TensorSpec(SCALARS, np.float32, (SCALAR_COLUMNS,)),
    # Offset of the row's guidance partner: 1, -1, or 0 for none.
    TensorSpec(PAIR, np.int32, (1,)),
)


def composed_tensors(
    role: Role, conditioning: Specs, encoder_inputs: Specs = ()
) -> tuple[Specs, Specs]:
    """Inputs and outputs of a composed model.

    `conditioning` are the condition's block inputs. A text encoder makes them of `encoder_inputs`.
    """
    if role is Role.DECODER:
        return DECODER_INPUTS, DECODER_OUTPUTS
    if role is Role.ENCODER:
        return ENCODER_INPUTS, ENCODER_OUTPUTS
    if role is Role.TEXT_ENCODER:
        return encoder_inputs, conditioning
    return (*BLOCK_INPUTS, *conditioning), BLOCK_OUTPUTS


def run_inputs(inputs: Specs) -> Specs:
    """The `inputs` of a block in the Python backend, which makes several calls in one execution.

    `scalars` has the columns of all calls, in order. Each call reads the outputs of the one before.
    The exported network itself has the columns of one call. `solver` names a fitted solver, whose
    calls the block makes instead (learned.py).
    """
    if all(spec.name != SCALARS for spec in inputs):
        return inputs
    several = TensorSpec(SCALARS, np.float32, (-1,))
    solver = TensorSpec(SOLVER, np.float32, (3,), optional=True)
    return *(several if spec.name == SCALARS else spec for spec in inputs), solver


# Tensors of an ensemble, which serves one schedule (ensemble.py), and tensors between its steps.
PLAN_NOISE = "noise_rows"
PLAN_PAIR = "pair_rows"
LATENT_ROWS = "latent_rows"
# The finisher outputs the latents twice because of a limit of Triton (24.10). Take an output that
# feeds another step and is also an ensemble output. If the request does not ask for it, Triton does
# not run the step.
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
    """The last step of every ensemble of a pipeline: takes the latents of images from the rows."""
    return f"{pipeline}_finisher"


def checker_name(pipeline: str) -> str:
    """The step that refuses images that are not finite, if the decoder does not do so itself."""
    return f"{pipeline}_checker"


def ensemble_inputs(conditioned: Specs) -> Specs:
    """The inputs of an ensemble. `conditioned` are the request inputs of the condition.

    The request must give `seed`. An ensemble cannot return a seed that it drew itself, because the
    input already has that name. To Triton the input is optional: for a missing required input it
    only says "unexpected deadlock" (24.10).
    """
    common = [spec for spec in COMMON_INPUTS if spec.name in (SEED, GUIDANCE_SCALE)]
    return (*conditioned, *common)


def plan_condition(name: str) -> str:
    """The planner's output with the rows of the conditioning tensor `name`."""
    return f"{name}_rows"


def plan_scalars(index: int) -> str:
    """The planner's output with the scalars of block execution number `index`, from 0."""
    return f"scalars_{index}"


def plan_outputs(calls: Sequence[int], conditioning: Specs) -> Specs:
    """The planner's outputs, one entry per row.

    `calls` has the number of block calls of each execution.
    """
    return (
        TensorSpec(PLAN_NOISE, np.float32, (-1, "C", "h", "w")),
        *(TensorSpec(plan_condition(s.name), s.dtype, (-1, *s.dims)) for s in conditioning),
        TensorSpec(PLAN_PAIR, np.int32, (-1, 1)),
        *(
            TensorSpec(plan_scalars(k), np.float32, (-1, count * SCALAR_COLUMNS))
            for k, count in enumerate(calls)
        ),
    )


def planned_calls(outputs: Iterable[Mapping[str, Any]]) -> list[int]:
    """The `calls` of `plan_outputs`, from the outputs in a planner's configuration."""
    dims = {entry["name"]: entry["dims"] for entry in outputs}
    names = itertools.takewhile(dims.__contains__, map(plan_scalars, itertools.count()))
    return [int(dims[name][-1]) // SCALAR_COLUMNS for name in names]


def latent_sizes(shape: tuple[int, int, int]) -> dict[int | str, int]:
    """The values of the letters C, h and w, from the shape of a latent."""
    return dict(zip("Chw", shape, strict=True))


def shown_dims(dims: Sequence[int | str]) -> str:
    """Dimensions as text for messages: n means any size."""
    return ", ".join("n" if dim == -1 else str(dim) for dim in dims)


def check_entries(name: str, entries: Sized, images: int) -> None:
    """Raises RequestError unless there is one entry for all `images`, or one for each."""
    if len(entries) not in (1, images):
        raise RequestError(
            f"{name} must have one entry, or one per image, {images} here, got {len(entries)}"
        )


def text_of(name: str, entry: Any) -> str:
    """An entry of the BYTES tensor `name` as text. Raises RequestError unless it is UTF-8."""
    try:
        return entry.decode() if isinstance(entry, bytes) else str(entry)
    except UnicodeDecodeError:
        raise RequestError(f"{name} must be UTF-8 text, got {entry[:40]!r}") from None
