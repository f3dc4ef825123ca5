"""The way of streams to the model `flowturbo`; the code is the installed package's."""

from flowturbo.serving.orchestrator import StreamPythonModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
