"""The errors of a request, for the server and the in-process pipeline."""


class FlowTurboError(Exception):
    """Base class of all errors that this package raises on purpose."""


class RequestError(FlowTurboError, ValueError):
    """The request is at fault: the message names the value and what is allowed."""


class BusyError(FlowTurboError):
    """The server is at its limit of in-flight requests; a later retry is safe."""


class UnavailableError(FlowTurboError):
    """A resource that the server needs is gone or exhausted; the request itself is fine."""


class CancelledError(FlowTurboError):
    """The caller went away before the image was done."""


class DeadlineError(CancelledError):
    """The request's deadline passed before the image was done."""


class NotFiniteError(FlowTurboError):
    """A result has NaN or infinity: an error, never a black picture."""


class RepositoryError(FlowTurboError):
    """The model repository is incomplete, or its parts do not fit each other."""
