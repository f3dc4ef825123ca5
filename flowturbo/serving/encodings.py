"""Keeps what text encoders made: equal texts are encoded once, also if they come together."""

import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import numpy as np

from flowturbo.rows import Tensors, row_count
from flowturbo.serving.batcher import Shared

Key = tuple[str, bytes]
Rows = tuple[np.ndarray, ...]  # the outputs of a text encoder for one text
Outputs = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Count:
    """How many texts of one call were there already, and how many were encoded for it."""

    hits: int
    misses: int


class Encodings:
    """The outputs of text encoders by model and token ids, least recently used dropped first.

    At most `limit_bytes` are kept, besides those of `pin`. `share` makes a `Shared` for requests
    that wait for a text which another request encodes.
    """

    def __init__(self, limit_bytes: int, share: Callable[[], Shared]) -> None:
        self._limit = limit_bytes
        self._share = share
        self._bytes = 0
        self._kept: OrderedDict[Key, Rows] = OrderedDict()
        self._pinned: dict[Key, Rows | None] = {}
        self._coming: dict[Key, Shared] = {}
        self._lock = threading.Lock()

    def pin(self, model: str, tensors: Tensors) -> None:
        """From its first use on, the output for each row of `tensors` is kept for good."""
        self._pinned |= dict.fromkeys(_keys(model, tensors))

    def new(self, model: str, tensors: Tensors) -> int:
        """How many of the different rows of `tensors` [k, ...] are not kept and not coming."""
        with self._lock:
            return sum(
                not (self._pinned.get(key) or key in self._kept or key in self._coming)
                for key in set(_keys(model, tensors))
            )

    async def infer(
        self, model: str, tensors: Tensors, evaluate: Callable[[Tensors], Awaitable[Outputs]]
    ) -> tuple[Outputs, Count]:
        """The outputs for `tensors` [k, ...]; `evaluate` is called for new rows only.

        Raises what `evaluate` raises. A request that waited for another's failed call makes its
        own.
        """
        keys = _keys(model, tensors)
        found: dict[Key, Rows] = {}
        misses = 0
        while any(key not in found for key in keys):
            mine, others = self._claim(keys, found)
            if mine:
                try:
                    outputs = await evaluate({name: of[mine] for name, of in tensors.items()})
                    misses += len(mine)
                    for index, key in enumerate(keys[k] for k in mine):
                        found[key] = tuple(output[index].copy() for output in outputs)
                finally:
                    self._deliver([keys[k] for k in mine], found)
            for shared in others:
                await shared
        rows = [found[key] for key in keys]
        return tuple(map(np.stack, zip(*rows, strict=True))), Count(len(keys) - misses, misses)

    def _claim(self, keys: list[Key], found: dict[Key, Rows]) -> tuple[list[int], list[Shared]]:
        """Takes what is kept into `found`; returns the rows to encode, and the others' to await."""
        mine, others = [], []
        with self._lock:
            for index, key in enumerate(keys):
                if key in found or index != keys.index(key):
                    continue
                if rows := self._pinned.get(key) or self._kept.get(key):
                    found[key] = rows
                    if key in self._kept:
                        self._kept.move_to_end(key)
                elif shared := self._coming.get(key):
                    others.append(shared)
                else:
                    self._coming[key] = self._share()
                    mine.append(index)
        return mine, others

    def _deliver(self, keys: Iterable[Key], made: dict[Key, Rows]) -> None:
        """Keeps what was made for `keys`, and wakes those who wait for it."""
        with self._lock:
            ended = [self._coming.pop(key) for key in keys]
            for key in keys:
                if key in self._pinned:
                    self._pinned[key] = made.get(key)
                elif key in made:
                    self._kept[key] = made[key]
                    self._bytes += _size(made[key])
            while self._bytes > self._limit:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= _size(dropped)
        for shared in ended:
            shared.finish()


def _keys(model: str, tensors: Tensors) -> list[Key]:
    """A key per row: token ids determine the outputs of a model."""
    count = row_count(tensors) if tensors else 0
    return [(model, b"".join(of[k].tobytes() for of in tensors.values())) for k in range(count)]


def _size(rows: Rows) -> int:
    return sum(row.nbytes for row in rows)
