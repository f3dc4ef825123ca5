"""Closed-loop load: each caller sends its next request as soon as it has its answer."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bench.baseline import TorchPipeline
from flowturbo.errors import FlowTurboError

Span = tuple[float, float]  # start and end of a request, in seconds
LEAD = 0.1  # time before the window, as a share of it: callers reach a steady state


@dataclass(frozen=True)
class Measured:
    """Images/s, and the latency of each request in ms, both over one time window."""

    images_per_s: float
    latencies_ms: tuple[float, ...]

    def percentile(self, q: float) -> float:
        """Latency in ms, `q` in 0..100."""
        return float(np.percentile(self.latencies_ms, q))


@dataclass(frozen=True)
class Work:
    """A caller's repeated request: `images` images with one schedule and guidance scale."""

    schedule: str
    images: int
    guidance_scale: float

    def arguments(self) -> tuple[list[int], list[int], str, float]:
        """Labels, seeds, schedule and guidance scale, as every `generate` here takes them."""
        numbers = list(range(self.images))
        return numbers, numbers, self.schedule, self.guidance_scale


def closed_loop(
    call: Callable[[], object], clients: int, seconds: float, images: int = 1
) -> Measured:
    """Drives `call`, which makes `images` images, from `clients` threads for `seconds`.

    Each thread calls once before the window, which opens when all of them run. A request that
    crosses an end of the window counts by its share inside. So the figure depends neither on where
    the ends fall nor on idle time around them. Raises what `call` raises.
    """
    with ThreadPoolExecutor(clients) as pool:
        for warm in [pool.submit(call) for _ in range(clients)]:
            warm.result()
        start_s = time.perf_counter() + LEAD * seconds
        end_s = start_s + seconds
        loops = [pool.submit(_spans, call, end_s) for _ in range(clients)]
        return measured([span for loop in loops for span in loop.result()], start_s, end_s, images)


def measured(spans: Sequence[Span], start_s: float, end_s: float, images: int) -> Measured:
    """Throughput and latencies in a window, of requests for `images` images at `spans`."""
    within = [(begin, end) for begin, end in spans if end > start_s and begin < end_s]
    shares = ((min(end, end_s) - max(begin, start_s)) / (end - begin) for begin, end in within)
    latencies_ms = tuple((end - begin) * 1e3 for begin, end in within)
    return Measured(images * sum(shares) / (end_s - start_s), latencies_ms)


def _spans(call: Callable[[], object], end_s: float) -> list[Span]:
    """Start and end of each call, in seconds of `perf_counter`; the last ends after `end_s`."""
    spans: list[Span] = []
    while not spans or spans[-1][1] < end_s:
        begin_s = time.perf_counter()
        call()
        spans.append((begin_s, time.perf_counter()))
    return spans


class TorchProcess:
    """PyTorch in its own process, which idles between measurements."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def measure(self, work: Work, clients: int, seconds: float) -> Measured:
        """`closed_loop` over `work` in that process. Raises FlowTurboError with the reason."""
        try:
            self._connection.send((work, clients, seconds))
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise FlowTurboError("the PyTorch process ended before it answered") from None
        if isinstance(answer, str):
            raise FlowTurboError(f"PyTorch: {answer}")
        measured: Measured = answer
        return measured


@contextlib.contextmanager
def torch_process(*pipeline: Any) -> Iterator[TorchProcess]:
    """A process with `TorchPipeline(*pipeline)`; it ends with the block."""
    context = multiprocessing.get_context("spawn")  # a fork would share this process's thread pools
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, pipeline), daemon=True)
    process.start()
    theirs.close()  # so that `recv` fails here when the process ends
    try:
        yield TorchProcess(ours)
    finally:
        ours.close()  # the process ends once it reads this
        process.join(timeout=15)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(connection: Connection, arguments: tuple[Path, int, bool, str]) -> None:
    pipeline = TorchPipeline(*arguments)
    while True:
        try:
            work, clients, seconds = connection.recv()
        except EOFError:
            return
        wanted = work.arguments()
        try:
            connection.send(
                closed_loop(lambda: pipeline.generate(*wanted), clients, seconds, work.images)  # noqa: B023
            )
        except Exception as error:  # noqa: BLE001  the other process must not wait for ever
            connection.send(f"{type(error).__name__}: {error}")
