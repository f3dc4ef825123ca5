"""Orchestrates one image request over the composed models; the code is the installed package's."""

from flowturbo.serving.orchestrator import TritonPythonModel

__all__ = ["TritonPythonModel"]
