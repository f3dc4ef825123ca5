"""Compares the models that a server runs with PyTorch's answers from the export."""

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from flowturbo.contract import Role
from flowturbo.parity import TOLERANCES, Figures, VerificationError
from flowturbo.pipeline import Pipeline
from flowturbo.rows import Tensors
from flowturbo.serving.service import Call

ROWS = 3  # in the compared call: a guided pair, and one row alone


class StoredAnswers:
    """Compares a call of every model of `pipelines` with its stored answer, before the first use.

    An engine can be wrong on one kind of GPU only (TensorRT #4837: fused attention), and files can
    change. `instances` concurrent calls reach every GPU.
    """

    def __init__(
        self, repository: Path, pipelines: Iterable[Pipeline], call: Call, instances: int
    ) -> None:
        self._repository = repository
        self._pipelines = list(pipelines)
        self._call = call
        self._instances = instances
        self._verdict: VerificationError | bool | None = None
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises VerificationError if an answer is off, now and at every later check.

        Other errors of a call are raised too; the next check then calls again.
        """
        if self._verdict is None:
            with self._lock:  # other requests wait for the verdict
                self._verdict = self._verdict or self._compare()
        if isinstance(self._verdict, VerificationError):
            raise self._verdict

    def _compare(self) -> VerificationError | bool:
        try:
            for pipeline in self._pipelines:
                for role in pipeline.models:
                    self._hold(pipeline, role)
        except VerificationError as error:
            return VerificationError(
                f"{error}. This server must not be used: its models do not compute what was "
                "exported, export again"
            )
        return True

    def _hold(self, pipeline: Pipeline, role: Role) -> None:
        model = pipeline.model(role)
        figures = Figures.load(self._repository / model)
        allowed = TOLERANCES[pipeline.models[role].precision]
        outputs = [spec.name for spec in pipeline.tensors(role)[1]]

        def evaluate(tensors: Tensors) -> tuple[np.ndarray, ...]:
            return self._call(model, tensors, outputs)

        def hold(_call: int) -> None:
            figures.check(model, evaluate, allowed, [ROWS])

        instances = self._instances if pipeline.on_gpu else 1
        with ThreadPoolExecutor(instances) as pool:
            # Twice as many calls as instances: a slow instance gets a call too.
            list(pool.map(hold, range(1 if instances == 1 else 2 * instances)))
