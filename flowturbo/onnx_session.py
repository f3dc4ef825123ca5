"""ONNX Runtime sessions as served and as run in-process: one place for their options."""

import os
from pathlib import Path

import numpy as np

from flowturbo.guidance import Tensors


class OnnxModel:
    """An exported model, evaluated by ONNX Runtime on the CPU."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Loads `path`; `threads` None is one for each usable core."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.log_severity_level = 3
        # Idle threads of one model must not burn the cores that another needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.output_names = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: Tensors) -> tuple[np.ndarray, ...]:
        """Outputs [rows, ...] in the model's order."""
        return tuple(self._session.run(None, inputs))
