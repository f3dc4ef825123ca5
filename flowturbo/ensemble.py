"""A program as a fixed graph, for Triton's ensemble scheduler.

The planner makes all rows and coefficients of a request at once. The executions of the blocks
follow without the orchestrator. The finisher keeps the conditional rows. The number of rows is
fixed on the way, so an ensemble has no guidance interval, which would change it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from flowturbo import contract
from flowturbo.contract import (
    GUIDANCE_SCALE,
    LATENT,
    PAIR,
    SCALARS,
    SCHEDULE,
    SEED,
    VELOCITY,
    VELOCITY_NEXT,
    X_NEXT,
    Role,
    X,
)
from flowturbo.errors import RequestError
from flowturbo.pipeline import Pipeline
from flowturbo.request import GenerationRequest, parse_request
from flowturbo.rows import Tensors, interleave, pair_rows, scalar_rows, to_rows
from flowturbo.settings import Settings
from flowturbo.solver.calls import BlockCall
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.program import Program, outline
from flowturbo.solver.sampler import Array, run_sync, sample
from flowturbo.solver.schedule import Schedule

# Largest request in rows for an ensemble on a CPU. On a GPU there is no limit: latents stay there.
_MAX_ROWS = 8
# Limit for the calls of one execution, by the export's times for so many rows. Other requests wait
# meanwhile.
EXECUTION_S = 0.1


@dataclass(frozen=True)
class Step:
    """One execution of `model`: the tensors that its inputs read and its outputs write."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


def ensemble_name(pipeline: str, schedule: Schedule) -> str:
    """The model that serves only `schedule`: `glyphs_h1p5r3`, or `glyphs_a8_shift3`."""
    text = str(schedule).lower().replace("@", "_shift").replace(".", "_")
    return f"{pipeline}_{text}"


def check_schedule(schedule: Schedule) -> None:
    """Raises RequestError if `schedule` cannot be an ensemble.

    Its calls must not use more than one earlier velocity: the graph has blocks and no sums.
    """
    if schedule.learned or outline(schedule).history > 1:
        raise RequestError(
            f"schedule {schedule} cannot be an ensemble: its calls sum several earlier velocities, "
            f"which only the model {contract.ORCHESTRATOR} does"
        )


def runs(program: Program, pipeline: Pipeline) -> list[list[BlockCall]]:
    """The calls of `program`, in order, by the executions that make them.

    The Python backend can make calls of one network in a row in one execution. It does so where the
    export measured that they are short: on a CPU.
    """
    most = {network: _calls_at_once(Role(network), pipeline) for network in program.counts}
    found: list[list[BlockCall]] = []
    for call in program.calls:
        run = found[-1] if found else []
        if run and run[0].network == call.network and len(run) < most[call.network]:
            run.append(call)
        else:
            found.append([call])
    return found


def _calls_at_once(role: Role, pipeline: Pipeline) -> int:
    times = pipeline.block_seconds[pipeline.model(role)]
    slowest = max((seconds for rows, seconds in times.items() if rows <= _MAX_ROWS), default=0.0)
    if pipeline.models[role].engine != "python" or not slowest:
        return 1
    return max(1, int(EXECUTION_S / slowest))


def block_steps(program: Program, pipeline: Pipeline) -> tuple[tuple[Step, ...], str]:
    """The executions of blocks in order, and the name of the latent rows at the end.

    It runs the sampler itself, with names of tensors instead of tensors. Raises RequestError as
    `check_schedule` does.
    """
    check_schedule(program.schedule)
    steps: list[Step] = []
    places = (k for run in runs(program, pipeline) for k in range(len(run)))

    def block(call: BlockCall, x: str, v: str) -> tuple[str, str]:
        if next(places) == 0:
            steps.append(_step(len(steps), call, pipeline, x, v))
        written = steps[-1].outputs  # a call that does not move x gives it back as it was
        return written[X_NEXT], written[VELOCITY_NEXT]

    end = sample(program, contract.PLAN_NOISE, block)
    return _without_unread(steps, end), end


def _step(index: int, call: BlockCall, pipeline: Pipeline, x: str, v: str) -> Step:
    inputs = {
        X: x,
        # An empty name is the sampler's zero velocity at the start. Its coefficients are 0, so any
        # finite tensor will do.
        VELOCITY: v or x,
        SCALARS: contract.plan_scalars(index),
        PAIR: contract.PLAN_PAIR,
    }
    for spec in pipeline.condition.block_inputs:
        inputs[spec.name] = contract.plan_condition(spec.name)
    outputs = {X_NEXT: f"x_{index + 1}", VELOCITY_NEXT: f"velocity_{index + 1}"}
    return Step(pipeline.model(Role(call.network)), inputs, outputs)


def _without_unread(steps: list[Step], end: str) -> tuple[Step, ...]:
    """The steps without outputs that nothing reads, so that Triton does not copy them."""
    read = {end}.union(*(step.inputs.values() for step in steps))
    return tuple(
        Step(s.model, s.inputs, {key: name for key, name in s.outputs.items() if name in read})
        for s in steps
    )


def ensemble_for(request: GenerationRequest, pipeline: Pipeline, variant: str) -> str | None:
    """The ensemble of `pipeline` that should serve `request`, or None.

    None if the request uses a feature that ensembles lack. Also None for many rows on a CPU: there
    the few milliseconds that an ensemble saves do not matter, and it cannot be cancelled.
    """
    guidance = request.guidance
    whole = not guidance.enabled or guidance.interval == Guidance().interval
    if request.initial_noise is not None or request.times is not None or not whole:
        return None
    if request.edit:
        return None
    if pipeline.has(Role.TEXT_ENCODER):
        return None
    most = pipeline.max_rows if pipeline.on_gpu else min(_MAX_ROWS, pipeline.max_rows)
    if request.rows > most or pipeline.ensemble_variant != variant:
        return None
    return pipeline.ensembles.get(str(request.schedule))


def ensemble_inputs(request: GenerationRequest, pipeline: Pipeline) -> Tensors:
    """The input tensors of an ensemble for `request`."""
    return {
        **pipeline.condition.request(request.condition),
        SEED: request.seeds,
        GUIDANCE_SCALE: np.array([request.guidance.scale], dtype=np.float32),
    }


def read_request(tensors: Tensors, pipeline: Pipeline, settings: Settings) -> GenerationRequest:
    """Checks input `tensors` (contract.ensemble_inputs); raises RequestError.

    The `settings` name the ensemble's schedule as the default.
    """
    if SEED not in tensors:
        raise RequestError(
            f"this model needs {SEED} (INT64 [n], one per image), got none: only the model "
            f"{contract.ORCHESTRATOR} draws seeds"
        )
    own = {SCHEDULE: np.array([settings.default_schedule.encode()], dtype=object)}
    return parse_request(tensors | own, [LATENT], pipeline, settings)


def plan(
    request: GenerationRequest, pipeline: Pipeline, program: Program, calls: Sequence[int]
) -> Tensors:
    """The inputs of all executions of one request, by name (contract.plan_outputs).

    `calls` has the number of block calls of each execution, as the ensemble was exported.

    Raises RequestError for more rows than one batch holds, because an ensemble cannot split them.
    """
    guidance, condition = request.guidance, pipeline.condition
    noise = to_rows(request.noise(), guidance)
    if len(noise) > pipeline.max_rows:
        raise RequestError(
            f"a request to this model has at most {pipeline.max_rows} rows (2 per guided image), "
            f"got {len(noise)}: ask for fewer images, or the model {contract.ORCHESTRATOR}"
        )
    tensors = {
        contract.PLAN_NOISE: noise,
        contract.PLAN_PAIR: pair_rows(len(noise), guided=guidance.enabled),
    }
    encoded = condition.encode(request.condition, _no_model, guided=guidance.enabled)
    conditioning, null = run_sync(encoded)
    for name, value in conditioning.items():
        rows = interleave(value, null[name]) if guidance.enabled else value
        tensors[contract.plan_condition(name)] = rows
    scalars = (scalar_rows(call, len(noise), guidance) for call in program.calls)
    for index, count in enumerate(calls):
        run = list(islice(scalars, count))
        tensors[contract.plan_scalars(index)] = np.concatenate(run, axis=1)
    return tensors


async def _no_model(role: Role, tensors: Tensors) -> tuple[Array, ...]:
    raise RequestError(f"an ensemble calls no {role} for its condition")


def conditional_rows(rows: Array, pair: Array) -> Array:
    """The rows of images in `rows` [rows, ...]; `pair` [rows, 1] is -1 in the other rows."""
    return rows[pair[:, 0] >= 0]
