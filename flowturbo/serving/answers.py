"""The models that a server runs, held to what PyTorch answered at the export."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from flowturbo import contract
from flowturbo.generate import Infer
from flowturbo.parity import TOLERANCES, Figures, VerificationError
from flowturbo.repository import read_build

ROWS = 3  # of the call that is compared: a guided pair, and a row alone


class StoredAnswers:
    """Compares a call of every model of `repository` with its stored answer, before the first use.

    An engine can be wrong on one kind of GPU alone (TensorRT #4837: fused attention), and files
    can be changed. `instances` calls at a time reach every GPU.
    """

    def __init__(self, repository: Path, call: Infer, instances: int) -> None:
        self._repository = repository
        self._call = call
        self._instances = instances
        self._verdict: VerificationError | bool | None = None
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises VerificationError if an answer is off, then and whenever it is asked again.

        What else ends a call is raised too, and the next check calls again.
        """
        if self._verdict is None:
            with self._lock:  # whoever comes meanwhile waits for the verdict
                self._verdict = self._verdict or self._compare()
        if isinstance(self._verdict, VerificationError):
            raise self._verdict

    def _compare(self) -> VerificationError | bool:
        try:
            for model in contract.COMPOSED:
                if build := read_build(self._repository, model):
                    self._hold(model, build["precision"])
        except VerificationError as error:
            return VerificationError(
                f"{error}. This server must not be used: its models do not compute what was "
                "exported, export again"
            )
        return True

    def _hold(self, model: str, precision: str) -> None:
        figures = Figures.load(self._repository / model)

        def hold(_call: int) -> None:
            evaluate = partial(self._call, model)
            figures.check(model, evaluate, TOLERANCES[precision], [ROWS])

        with ThreadPoolExecutor(self._instances) as pool:
            # Twice as many calls as instances: one that is slow to start gets its call too.
            list(pool.map(hold, range(1 if self._instances == 1 else 2 * self._instances)))
