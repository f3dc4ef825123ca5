"""The command of a model that is made from nothing, in stages."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from flowturbo.command import run_command
from flowturbo.errors import FlowTurboError
from training.loop import processes
from training.plan import PlanError


def run_stages(
    model: str, doc: str | None, stages: Callable[[argparse.Namespace], None], argv: Sequence[str]
) -> int:
    """`python -m training.<model>`: calls `stages` with the folders `out` and `runs`, and `seed`.

    Returns the exit status: 2, with one line on stderr, for errors that the user can fix.
    """
    name = f"training.{model}"
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=doc)
    parser.add_argument("--out", type=Path, default=Path("weights") / model)
    parser.add_argument("--runs", type=Path, default=Path("runs") / model, help="data and states")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data")
    args = parser.parse_args(argv)

    def run() -> None:
        if processes().num_processes > 1:
            raise PlanError(f"one process is needed, got {processes().num_processes}")
        args.out.mkdir(parents=True, exist_ok=True)
        stages(args)

    return run_command(name, run, (FlowTurboError, FloatingPointError, OSError))
