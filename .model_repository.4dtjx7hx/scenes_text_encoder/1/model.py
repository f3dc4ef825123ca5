"""Evaluates the exported network beside this file."""

from flowturbo.serving.block import TritonPythonModel

__all__ = ["TritonPythonModel"]
