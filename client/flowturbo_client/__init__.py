"""A thin gRPC client of the FlowTurbo image generation service on Triton."""

from .aio import AsyncFlowTurboClient
from .client import FlowTurboClient
from .errors import (
    ConnectionFailedError,
    DeadlineExceededError,
    FlowTurboError,
    InvalidRequestError,
    ModelNotReadyError,
    RequestCancelledError,
    ServerBusyError,
    ServerError,
)
from .protocol import Generation
from .settings import Health
from .stream import Update

__all__ = [
    "AsyncFlowTurboClient",
    "ConnectionFailedError",
    "DeadlineExceededError",
    "FlowTurboClient",
    "FlowTurboError",
    "Generation",
    "Health",
    "InvalidRequestError",
    "ModelNotReadyError",
    "RequestCancelledError",
    "ServerBusyError",
    "ServerError",
    "Update",
]
