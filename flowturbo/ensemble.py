"""A program as a fixed graph, for Triton's ensemble scheduler.

A planner turns a request into all rows and coefficients at once, block calls follow without any
code in between, and a finisher leaves the conditional rows. No tensor changes its rows on the way,
so a guidance interval, which would, is not offered.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flowturbo import contract
from flowturbo.errors import RequestError
from flowturbo.generate import BLOCK_MODELS
from flowturbo.repository import Pipeline, Settings
from flowturbo.request import GenerationRequest, parse_request
from flowturbo.solver.guidance import Guidance, Tensors, interleave, pair_rows, scalar_rows, to_rows
from flowturbo.solver.program import BlockCall, Program, RefinerCall
from flowturbo.solver.sampler import Array, sample
from flowturbo.solver.schedule import Schedule

# Rows that the orchestrator gives to an ensemble on a CPU. On a GPU any number: latents stay there.
_MAX_ROWS = 8


@dataclass(frozen=True)
class Step:
    """One execution of `model`: the tensor that each of its inputs reads and its outputs write."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


def ensemble_name(schedule: Schedule) -> str:
    """The model that serves `schedule` alone: `flowturbo_h1p5r3`, or `flowturbo_a8_shift3`."""
    text = str(schedule).lower().replace("@", "_shift").replace(".", "_")
    return f"{contract.ORCHESTRATOR}_{text}"


def block_steps(program: Program) -> tuple[tuple[Step, ...], str]:
    """The block calls in order, and the name of the latent rows at the end.

    The sampler itself runs, over names of tensors in place of tensors.
    """
    steps: list[Step] = []

    def block(call: BlockCall, x: Array, v: Array) -> tuple[Array, Array]:
        steps.append(_step(len(steps), call, x.item(), v.item()))
        written = steps[-1].outputs
        moves = isinstance(call, RefinerCall) or call.w_prev or call.w_next
        return _named(written["x_next"] if moves else x.item()), _named(written["velocity_next"])

    end: str = sample(program, _named(contract.PLAN_NOISE), block).item()
    return _without_unread(steps, end), end


def _named(name: str) -> Array:
    return np.array(name, dtype=object)


def _step(index: int, call: BlockCall, x: str, v: str) -> Step:
    inputs = {
        "x": x,
        # The sampler's zero velocity before the first evaluation: any finite tensor does as well.
        "velocity": v or x,
        "label": contract.PLAN_LABEL,
        "scalars": contract.plan_scalars(index),
        "pair": contract.PLAN_PAIR,
    }
    outputs = {"x_next": f"x_{index + 1}", "velocity_next": f"velocity_{index + 1}"}
    return Step(BLOCK_MODELS[call.network], inputs, outputs)


def _without_unread(steps: list[Step], end: str) -> tuple[Step, ...]:
    """The steps without the outputs that nothing reads: these are not even copied."""
    read = {end}.union(*(step.inputs.values() for step in steps))
    return tuple(
        Step(s.model, s.inputs, {key: name for key, name in s.outputs.items() if name in read})
        for s in steps
    )


def ensemble_for(
    request: GenerationRequest, ensembles: Mapping[str, str], pipeline: Pipeline
) -> str | None:
    """The model among `ensembles` (schedule to model) that is to serve `request`, if any.

    None for what an ensemble lacks, nor on a CPU for many rows: it saves a few milliseconds of a
    request, which does not show there, and cannot be stopped.
    """
    guidance = request.guidance
    whole = not guidance.enabled or guidance.interval == Guidance().interval
    if request.initial_noise is not None or not whole:
        return None
    most = pipeline.max_rows if pipeline.on_gpu else min(_MAX_ROWS, pipeline.max_rows)
    if request.rows > most:
        return None
    return ensembles.get(str(request.schedule))


def ensemble_inputs(request: GenerationRequest) -> Tensors:
    """The tensors that ask an ensemble for what `request` asks for (contract.ENSEMBLE_INPUTS)."""
    return {
        "label": request.labels,
        "seed": request.seeds,
        "guidance_scale": np.array([request.guidance.scale], dtype=np.float32),
    }


def read_request(tensors: Tensors, pipeline: Pipeline, settings: Settings) -> GenerationRequest:
    """Checks input `tensors` (contract.ENSEMBLE_INPUTS); raises RequestError."""
    if "seed" not in tensors:
        raise RequestError(
            "this model needs seed (INT64 [n], one an image), got none: only the model "
            f"{contract.ORCHESTRATOR} draws seeds"
        )
    return parse_request(tensors, ["latent"], pipeline, settings)


def plan(request: GenerationRequest, pipeline: Pipeline, program: Program) -> Tensors:
    """What the blocks of one request read, by name (contract.plan_outputs).

    Raises RequestError for more rows than one batch holds: nothing here can split them.
    """
    guidance = request.guidance
    noise = to_rows(request.start(pipeline), guidance)
    if len(noise) > pipeline.max_rows:
        raise RequestError(
            f"a request to this model has at most {pipeline.max_rows} rows (2 a guided image), got "
            f"{len(noise)}: ask for fewer images, or the model {contract.ORCHESTRATOR}"
        )
    labels = request.labels[:, None]
    if guidance.enabled:
        labels = interleave(labels, np.array([[pipeline.null_label]], dtype=np.int64))
    tensors = {
        contract.PLAN_NOISE: noise,
        contract.PLAN_LABEL: labels,
        contract.PLAN_PAIR: pair_rows(len(noise), guided=guidance.enabled),
    }
    for index, call in enumerate(program.calls):
        scalars = scalar_rows(call, len(noise), guidance)
        tensors[contract.plan_scalars(index)] = scalars
    return tensors


def conditional_rows(rows: Array, pair: Array) -> Array:
    """Of `rows` [rows, ...], those that are images: `pair` [rows, 1] is -1 for the others."""
    return rows[pair[:, 0] >= 0]
