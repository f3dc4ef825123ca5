"""Exports PyTorch modules as programs with weights. Only PyTorch can run them."""

import json
from pathlib import Path

import torch

from export.onnx_graph import ExportTarget
from flowturbo.nets.torch_runtime import INPUTS


def export_program(exported: ExportTarget, path: Path) -> None:
    """Writes the module to `path`; the program accepts any number of rows."""
    example = exported.random_inputs(4, seed=0)
    program = torch.export.export(
        exported.module.eval(),
        tuple(example.values()),
        dynamic_shapes=exported.dynamic_shapes(),
    )
    torch.export.save(program, path, extra_files={INPUTS: json.dumps(list(example))})
