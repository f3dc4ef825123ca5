"""Programs of fitted solvers, and how one runs in a single execution of the predictor's block.

A single request loses more time between its calls than its sums take. So the block gets the noise
and the name of the solver, makes all calls and sums, and returns the latent.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from flowturbo.contract import SCALARS, SOLVER, VELOCITY, X
from flowturbo.ensemble import EXECUTION_S
from flowturbo.errors import RequestError
from flowturbo.pipeline import Pipeline
from flowturbo.request import GenerationRequest
from flowturbo.rows import Tensors, row_count, scalar_rows
from flowturbo.solver.calls import BlockCall
from flowturbo.solver.guidance import Guidance
from flowturbo.solver.program import Program, compile_program
from flowturbo.solver.sampler import Array, sample
from flowturbo.solver.schedule import Schedule
from flowturbo.solvers import Solvers

_DIGITS = 6  # of a digest: 24 bits are exact in float32


def learned_program(schedule: Schedule, solvers: Solvers, scale: float) -> Program:
    """The program of a learned schedule at this guidance scale; raises RequestError.

    The scale is rounded to float32, as tensors carry it: everywhere it is the same program.
    """
    return _program(schedule, solvers, float(np.float32(scale)))


@lru_cache(maxsize=32)  # a few megabytes each, and callers choose the scale
def _program(schedule: Schedule, solvers: Solvers, scale: float) -> Program:
    return compile_program(schedule, fitted=solvers.table(len(schedule), scale))


def in_one_execution(request: GenerationRequest, pipeline: Pipeline, seconds: float) -> bool:
    """Whether `request` can run in one execution of the block, if it is alone.

    The block is in the Python backend. Its calls take `seconds` together, 0 if that is unknown.
    Learned solvers have no guidance interval, so all calls have the same rows.
    """
    return (
        request.schedule.learned
        and request.edit is None
        and pipeline.predictor.engine == "python"
        and 0 < seconds <= EXECUTION_S
    )


def solver_rows(solvers: Solvers, evaluations: int, scale: float, rows: int) -> Array:
    """The block's tensor `solver`, [rows, 3] float32, with the same values in every row.

    They are the evaluations, the guidance scale, and the start of the solvers' digest: so the block
    notices when it has other solvers.
    """
    return np.tile(np.array([evaluations, scale, _number(solvers)], np.float32), (rows, 1))


def _number(solvers: Solvers) -> int:
    return int(solvers.digest[:_DIGITS], 16)


class OwnSolvers:
    """The solvers that a block runs. `read` reads their file, None if there is none.

    It is read at once: a later fit may replace the file while the orchestrator has the former one.
    """

    def __init__(self, read: Callable[[], Solvers | None]) -> None:
        self._read = read
        self._solvers = read()

    def run(
        self, tensors: Tensors, evaluate: Callable[[Tensors], tuple[Array, ...]]
    ) -> tuple[Array, ...]:
        """The latent rows at the end, and the last velocity, for `tensors` with `solver`.

        `evaluate` makes one call of the block. Raises RequestError.
        """
        stated = np.unique(tensors[SOLVER], axis=0)
        if len(stated) != 1:
            raise RequestError(
                f"{SOLVER} must be finite and the same in all rows, got {stated.tolist()}"
            )
        evaluations, scale, number = map(float, stated[0])
        solvers, guidance = self._with(number), Guidance(scale)
        if evaluations not in solvers.counts:
            raise RequestError(
                f"{SOLVER} must have evaluations of {solvers.counts}, got {evaluations:g}"
            )
        program = learned_program(Schedule.parse(f"L{evaluations:.0f}"), solvers, scale)
        rows = row_count(tensors)
        others = {name: value for name, value in tensors.items() if name != SOLVER}
        last: list[Array] = []

        def block(call: BlockCall, x: Array, v: Array) -> tuple[Array, Array]:
            scalars = scalar_rows(call, rows, guidance)
            moved, velocity = evaluate({**others, X: x, VELOCITY: v, SCALARS: scalars})
            last[:] = [velocity]
            return moved, velocity

        end = sample(program, tensors[X], block, guidance.rows)
        return end, last[0]

    def _with(self, number: float) -> Solvers:
        """The solvers of this number; their file is read anew if it may have changed."""
        if self._solvers is None or _number(self._solvers) != number:
            self._solvers = self._read()
        if self._solvers is None or _number(self._solvers) != number:
            raise RequestError(
                f"{SOLVER} names solvers that this model does not have: start the server again"
            )
        return self._solvers
