"""PyTorch modules to exported programs, with their weights, which PyTorch alone can run."""

from pathlib import Path

import torch

from export.onnx_graph import ExportTarget


def export_program(exported: ExportTarget, path: Path) -> None:
    """Writes the module with any number of rows."""
    example = exported.random_inputs(4, seed=0)
    program = torch.export.export(
        exported.module.eval(),
        tuple(example.values()),
        dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in example),
    )
    torch.export.save(program, path)
