"""What a stream shows before its answer.

Triton keeps whatever a slow caller has not read, and does not tell. So previews are few: one is
made at a time, and there is a limit of bytes. Others are dropped, the answer never.
"""

import logging
from collections.abc import Awaitable, Callable

import numpy as np

from flowturbo.contract import FINAL, IMAGE, STEP
from flowturbo.errors import NotFiniteError
from flowturbo.rows import Tensors

MOST_BYTES = 16 << 20  # of all previews of a request
_logger = logging.getLogger(__name__)


def place(step: int, *, final: bool) -> Tensors:
    """Where an answer of a stream stands: after `step` steps, and whether it is the last one."""
    return {STEP: np.array([step]), FINAL: np.array([final])}


class Previews:
    """The previews of one request, after every `every` steps.

    `decode` makes images of latents, `finish` the outputs of images. `later` runs a function on
    another thread. `send` sends a preview, unless the request has been answered.
    """

    def __init__(
        self,
        every: int,
        decode: Callable[[np.ndarray], Awaitable[np.ndarray]],
        finish: Callable[[Tensors], Tensors],
        later: Callable[..., object],
        send: Callable[[Tensors], None],
    ) -> None:
        self._every = every
        self._decode = decode
        self._finish = finish
        self._later = later
        self._send = send
        self._shown = 0
        self._bytes = 0
        self._busy = False

    async def show(self, step: int, latent: np.ndarray) -> None:
        """Shows `latent` [n, C, h, w] if it is time for a preview and there is room for one."""
        if step // self._every == self._shown or self._busy or self._bytes > MOST_BYTES:
            return
        self._shown = step // self._every
        self._busy = True
        try:
            image = await self._decode(latent)
        except NotFiniteError:  # of a state that may become finite yet
            self._busy = False
            return
        self._later(self._finished, step, {IMAGE: image})

    def _finished(self, step: int, made: Tensors) -> None:
        try:
            outputs = self._finish(made)
            self._bytes += sum(map(_size, outputs.values()))
            if self._bytes <= MOST_BYTES:
                self._send(outputs | place(step, final=False))
        except Exception:
            _logger.exception("a preview could not be sent")  # the answer does not depend on it
        finally:
            self._busy = False


def _size(tensor: np.ndarray) -> int:
    return sum(map(len, tensor.flat)) if tensor.dtype == object else tensor.nbytes
