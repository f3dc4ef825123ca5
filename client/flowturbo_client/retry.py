"""One generation's deadline and retry budget, without any waiting or I/O."""

import random
import time
from collections.abc import Callable

from .errors import ConnectionFailedError, FlowTurboError, ServerBusyError

# With fixed seeds, images are a pure function of the request: a second attempt only costs work.
# Without seeds, nobody has seen the images of a lost answer, and other seeds are as good. Work is
# not repeated if the first attempt surely ran: after a deadline, a cancellation or a failure of
# the server. An invalid request stays invalid. So only these two errors are retried.
_RETRIED = (ServerBusyError, ConnectionFailedError)

_FIRST_DELAY_S = 0.1
_MAX_DELAY_S = 2.0


class RetryPlan:
    """Counts attempts against `retries` and the clock against `timeout_s`."""

    def __init__(
        self,
        retries: int,
        timeout_s: float,
        *,
        clock_s: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._retries_left = retries
        self._longest_delay_s = _FIRST_DELAY_S
        self._clock_s = clock_s
        self._uniform = uniform
        self._deadline_s = clock_s() + timeout_s

    def remaining_s(self) -> float:
        """Seconds left for the next attempt, never below a microsecond."""
        return max(self._deadline_s - self._clock_s(), 1e-6)

    def delay_s(self, error: FlowTurboError) -> float:
        """Return the seconds to wait before the next attempt.

        Raises `error` itself if it must not be retried, or if no attempts or time are left.
        The delay is exponential with full jitter, so that refused clients do not return together.
        """
        if not isinstance(error, _RETRIED) or self._retries_left == 0:
            raise error
        delay_s = self._uniform(0, self._longest_delay_s)
        if delay_s >= self.remaining_s():
            raise error
        self._retries_left -= 1
        self._longest_delay_s = min(2 * self._longest_delay_s, _MAX_DELAY_S)
        return delay_s
