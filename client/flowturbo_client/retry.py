"""One generation's deadline and its attempts, without any waiting or I/O."""

import random
import time
from collections.abc import Callable

from .errors import ConnectionFailedError, FlowTurboError, ModelNotReadyError, ServerBusyError

# With fixed seeds, images are a pure function of the request: a second attempt only costs work. The
# client fixes them before the first. Work is not repeated if the first attempt surely ran: after a
# deadline, a cancellation or a failure of the server. An invalid request stays invalid. So only
# these errors are retried.
_RETRIED = (ServerBusyError, ConnectionFailedError)

_FIRST_DELAY_S = 0.1
_MAX_DELAY_S = 2.0
FIRST_CONTACT_S = 3.0  # a server that was never reached may have another address


class RetryPlan:
    """The attempts of one generation: until its deadline, or at most `retries` more than one.

    `server` is the place, of so many `servers`, that the next attempt is for; `first` is the first
    attempt's. `reached` says whether the client has had an answer before. If not, it gives up on
    connections after FIRST_CONTACT_S.
    """

    def __init__(
        self,
        retries: int | None,
        timeout_s: float,
        *,
        servers: int = 1,
        first: int = 0,
        reached: bool = True,
        clock_s: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.server = first
        self._servers = servers
        self._failed = 0  # servers in a row, since the last wait
        self._hint_s: float | None = None  # of these, the least
        self._reached = reached
        self._retries_left = retries
        self._longest_delay_s = _FIRST_DELAY_S
        self._clock_s = clock_s
        self._uniform = uniform
        self._started_s = clock_s()
        self._deadline_s = self._started_s + timeout_s

    def remaining_s(self) -> float:
        """Seconds left for the next attempt, never below a microsecond."""
        return max(self._deadline_s - self._clock_s(), 1e-6)

    def delay_s(self, error: FlowTurboError) -> float:
        """Return the seconds to wait before the next attempt, which is for the next server.

        Raises `error` itself if it must not be retried, or if no attempts or time are left. Once
        every server has failed, the delay is exponential with full jitter, so that refused clients
        do not return together. A server's own hint is waited for first.
        """
        if not self._may_retry(error):
            raise error
        if self._retries_left is not None:
            self._retries_left -= 1
        self._failed += 1
        if isinstance(error, ServerBusyError) and error.retry_after_s is not None:
            known = self._hint_s
            self._hint_s = error.retry_after_s if known is None else min(known, error.retry_after_s)
        self.server = (self.server + 1) % self._servers
        if self._failed < self._servers:
            return 0.0
        delay_s = (self._hint_s or 0.0) + self._uniform(0, self._longest_delay_s)
        if delay_s >= self.remaining_s():
            raise error
        self._longest_delay_s = min(2 * self._longest_delay_s, _MAX_DELAY_S)
        self._failed, self._hint_s = 0, None
        return delay_s

    def _may_retry(self, error: FlowTurboError) -> bool:
        if self._retries_left == 0:
            return False
        if isinstance(error, ModelNotReadyError):
            return self._reached  # it had the model: it is starting again
        if isinstance(error, ConnectionFailedError) and not self._reached:
            return self._clock_s() - self._started_s < FIRST_CONTACT_S
        return isinstance(error, _RETRIED)
