"""Image files that are kept for a while, for answers that have addresses in place of images."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """The bytes of an image file, its type, and until when it is kept (monotonic s)."""

    data: bytes
    media_type: str
    until: float


class Kept:
    """At most `most_bytes` of files for at most `seconds`; the oldest go first.

    A name has 256 random bits: who does not have it cannot guess it.
    """

    def __init__(
        self, most_bytes: int, seconds: float, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._seconds, self._clock_s = most_bytes, seconds, clock_s
        self._files: OrderedDict[str, File] = OrderedDict()
        self.bytes = 0

    def add(self, files: Sequence[bytes], form: str) -> list[str]:
        """Keeps the files of one answer and returns their names.

        Raises ValueError for more bytes than all that are kept.
        """
        size = sum(map(len, files))
        if size > self._most:
            raise ValueError(f"images of {size} bytes, at most {self._most} are kept")
        self._drop(size)
        names = []
        for data in files:
            names.append(f"{secrets.token_urlsafe(32)}.{form}")
            kept = File(data, f"image/{form}", self._clock_s() + self._seconds)
            self._files[names[-1]] = kept
        self.bytes += size
        return names

    def get(self, name: str) -> File | None:
        """The file, or None if it is gone or never was."""
        self._drop(0)
        return self._files.get(name)

    def _drop(self, room: int) -> None:
        now = self._clock_s()
        while self._files:
            oldest = next(iter(self._files.values()))
            if oldest.until > now and self.bytes + room <= self._most:
                return
            self._files.popitem(last=False)
            self.bytes -= len(oldest.data)
