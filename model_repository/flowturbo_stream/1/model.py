"""As the model `flowturbo`, with previews; the code is the installed package's."""

from flowturbo.serving.orchestrator import StreamPythonModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
