"""Exports PyTorch modules as programs with weights. Only PyTorch can run them."""

from pathlib import Path

import torch

from export.onnx_graph import ExportTarget


def export_program(exported: ExportTarget, path: Path) -> None:
    """Writes the module to `path`; the program accepts any number of rows."""
    example = exported.random_inputs(4, seed=0)
    program = torch.export.export(
        exported.module.eval(),
        tuple(example.values()),
        dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in example),
    )
    torch.export.save(program, path)
