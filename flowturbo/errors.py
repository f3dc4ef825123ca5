"""What can go wrong with a request, as the server and the in-process pipeline both say it."""


class FlowTurboError(Exception):
    """Base of everything this package raises on purpose."""


class RequestError(FlowTurboError, ValueError):
    """The request is at fault: the message names the value and what is allowed."""


class BusyError(FlowTurboError):
    """The server is at its limit of requests in flight; trying again later is safe."""


class UnavailableError(FlowTurboError):
    """Something that the server needs is gone or exhausted; the request itself is fine."""


class CancelledError(FlowTurboError):
    """The caller went away before the image was done."""


class DeadlineError(CancelledError):
    """The request's deadline passed before the image was done."""


class NotFiniteError(FlowTurboError):
    """A result has NaN or infinity: an error, never a black picture."""


class RepositoryError(FlowTurboError):
    """The model repository lacks something, or its parts do not fit each other."""
