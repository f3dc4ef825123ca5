"""FlowTurbo (Zhao et al., NeurIPS 2024, arXiv 2409.18128): schedules, sampler and service."""

from typing import TYPE_CHECKING, Any

from flowturbo.solver.calls import Variant
from flowturbo.solver.program import Program, compile_program
from flowturbo.solver.sampler import sample
from flowturbo.solver.schedule import Schedule

if TYPE_CHECKING:
    from flowturbo.local import LocalPipeline

__all__ = ["LocalPipeline", "Program", "Schedule", "Variant", "compile_program", "sample"]


def __getattr__(name: str) -> Any:
    if name == "LocalPipeline":
        from flowturbo.local import LocalPipeline

        return LocalPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
