"""Triton's load generator perf_analyzer: finds it, runs it, and reads the time of each request.

perf_analyzer comes from PATH, else from tritonclient's wheel of release 2.45.0, which has the
binary. It requests all outputs of a model. The service treats that as a request without outputs: an
answer has the images, their seeds and classes, and the settings that were used.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from flowturbo_client.address import is_local

from bench.downloads import DownloadError, debian_package, made_whole, run_step
from flowturbo import contract
from flowturbo.conditions.class_label import LABEL
from flowturbo.conditions.prompt import PROMPT
from flowturbo.contract import GUIDANCE_SCALE, PIPELINE, SCHEDULE, SEED

VERSION = "2.45.0"
_WHEELS = (f"tritonclient=={VERSION}", "nvidia-cuda-runtime-cu12==12.9.79")
_BINARY = Path(f"tritonclient-{VERSION}.data/data/bin/perf_analyzer")
_LIBRARIES = Path("nvidia/cuda_runtime/lib")
_BASE64 = "libb64.so.0d"
_BASE64_PACKAGE = "libb64-0d"
_STABLE_WINDOWS = 3  # perf_analyzer reports after three windows in a row that agree
_WINDOW_STRETCH = 1.2  # it makes each window 20% longer than requested
_START_AND_END_S = 300.0
_ANY_SPREAD = "99999"
_LONGER = (1, 2, 4)

Entry = dict[str, dict[str, list[Any]]]


class PerfAnalyzerError(Exception):
    """perf_analyzer is not available, did not start, or measured nothing."""


class _NoAnswerError(Exception):
    """No request ended within a window."""


@dataclass(frozen=True)
class PerfAnalyzer:
    """The binary, and the environment variables that it needs."""

    binary: Path
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """Either `concurrency` requests at a time, or `rate` requests/s with Poisson arrivals.

    A run takes `seconds`. If `requests` is given, it ends after at least that many answers.
    """

    concurrency: int | None = None
    rate: float | None = None
    seconds: float = 15.0
    requests: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError unless exactly one of `concurrency` and `rate` is given."""
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError(f"give concurrency or rate, got {self.concurrency} and {self.rate}")

    def options(self, intervals: Path) -> list[str]:
        """Options of perf_analyzer; writes the gaps between arrivals to `intervals`."""
        options = [f"--concurrency-range={self.concurrency}"]
        if self.rate is not None:
            intervals.write_text("".join(f"{gap_us:.0f}\n" for gap_us in self._gaps_us(self.rate)))
            options = [f"--request-intervals={intervals}"]
        if self.requests is not None:
            count = -(-self.requests // _STABLE_WINDOWS)
            counted = "--measurement-mode=count_windows"
            return [*options, counted, f"--measurement-request-count={count}"]
        window_ms = round(1e3 * self.seconds / _STABLE_WINDOWS / _WINDOW_STRETCH)
        return [*options, "--measurement-mode=time_windows", f"--measurement-interval={window_ms}"]

    def _gaps_us(self, rate: float) -> np.ndarray:
        """Gaps of Poisson arrivals in us, scaled to meet `rate` exactly.

        perf_analyzer's own gaps are few and the same in every run. In 12 s they miss the rate by a
        quarter.
        """
        count = max(1, self.requests or round(rate * self.seconds))
        gaps = np.random.default_rng(0).exponential(size=count)
        return gaps * (1e6 * count / rate / gaps.sum())


@dataclass(frozen=True)
class Answer:
    """One answered request: times of sending and answer (s since 1970), and its images."""

    start_s: float
    end_s: float
    images: int
    schedule: str


@dataclass(frozen=True)
class Result:
    """The answers within perf_analyzer's window (s since 1970), or the error that ended the run.

    perf_analyzer stops at the first failed request and then reports no other request.
    """

    answers: tuple[Answer, ...]
    window_s: tuple[float, float]
    error: str | None = None

    @property
    def latencies_ms(self) -> np.ndarray:
        return np.array([1e3 * (a.end_s - a.start_s) for a in self.answers])

    def images_per_s(self) -> float:
        """Throughput over the window without its ends; a request counts by its share inside.

        Counting answers would be off by a batch, because batched requests are answered together.
        At the start the load builds up, at the end answers are missing. So each end loses the time
        of the longest request. A window too short for that is not cut: the result is its images
        divided by its length.
        """
        (begin, end), longest = self.window_s, self.latencies_ms.max() / 1e3
        if end - begin < 4 * longest:
            return sum(a.images for a in self.answers) / (end - begin)
        begin, end = begin + longest, end - longest
        parts = (
            a.images * max(0.0, min(a.end_s, end) - max(a.start_s, begin)) / (a.end_s - a.start_s)
            for a in self.answers
        )
        return float(sum(parts) / (end - begin))


def entry(
    asked: Sequence[int] | Sequence[str],
    schedule: str,
    guidance_scale: float | None = None,
    *,
    pipeline: str | None = None,
    first_seed: int = 0,
) -> Entry:
    """One request's inputs for perf_analyzer; all entries of a run must have the same names.

    `asked` are class ids or prompts, one per image.
    """
    contents: dict[str, list[Any]] = {
        PROMPT if isinstance(asked[0], str) else LABEL: list(asked),
        SEED: list(range(first_seed, first_seed + len(asked))),
        SCHEDULE: [schedule],
    }
    if guidance_scale is not None:
        contents[GUIDANCE_SCALE] = [guidance_scale]
    if pipeline is not None:
        contents[PIPELINE] = [pipeline]
    return {name: {"content": of, "shape": [len(of)]} for name, of in contents.items()}


def run(tool: PerfAnalyzer, url: str, entries: Sequence[Entry], load: Load) -> Result:
    """Puts `load` on the server at `url` (host:port of its gRPC endpoint), entries in turn.

    Repeats with a longer run if a third of the time passes without an answer. A failed request
    becomes the result's `error`. Raises PerfAnalyzerError for other failures.
    """
    for longer in _LONGER:
        stretched = replace(load, seconds=load.seconds * longer)
        with contextlib.suppress(_NoAnswerError):
            return _run_once(tool, url, entries, stretched)
    raise PerfAnalyzerError(
        f"no answer from {url} within {stretched.seconds / _STABLE_WINDOWS:g} s"
    )


def _run_once(tool: PerfAnalyzer, url: str, entries: Sequence[Entry], load: Load) -> Result:
    with tempfile.TemporaryDirectory() as scratch:
        data, export, intervals = (Path(scratch, name) for name in ("data", "export", "intervals"))
        data.write_text(json.dumps({"data": list(entries)}))
        arguments = [
            *("-m", contract.ORCHESTRATOR, "-u", url, "-i", "grpc", "--async"),
            *(f"--input-data={data}", f"--profile-export-file={export}", *load.options(intervals)),
            # By default it repeats until three windows agree: accept any three, report the spread.
            *("--percentile=95", "-s", _ANY_SPREAD, f"--max-trials={_STABLE_WINDOWS}"),
            "--max-threads=1",
        ]
        direct = {"no_grpc_proxy": url.rpartition(":")[0]} if is_local(url) else {}
        tool = replace(tool, environment=tool.environment | direct)
        done = _execute(tool, arguments, load.seconds + _START_AND_END_S)
        if export.exists():
            return _read_export(export.read_bytes())
    return Result((), (0.0, 0.0), _request_error(done))


def _execute(
    tool: PerfAnalyzer, arguments: list[str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    command, environment = [str(tool.binary), *arguments], os.environ | tool.environment
    kept: dict[str, Any] = {"capture_output": True, "text": True}
    try:
        return subprocess.run(command, env=environment, timeout=timeout_s, **kept)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PerfAnalyzerError(f"perf_analyzer: {error}") from error


def _request_error(done: subprocess.CompletedProcess[str]) -> str:
    said = done.stdout + done.stderr
    if found := re.search(r"had error: (.+)", said):
        return found[1].strip()
    if "No valid requests recorded" in said:
        raise _NoAnswerError
    raise PerfAnalyzerError(f"perf_analyzer exited with {done.returncode}:\n{said[-2000:]}")


def _read_export(content: bytes) -> Result:
    # It writes the bytes of every output as text: latin-1 has one character per byte.
    (found,) = json.loads(content.decode("latin-1"), strict=False)["experiments"]
    answers = [
        Answer(
            request["timestamp"] / 1e9,
            request["response_timestamps"][-1] / 1e9,
            len(request["response_outputs"][0][SEED]) // np.dtype(np.int64).itemsize,
            request["request_inputs"][SCHEDULE],
        )
        for request in found["requests"]
    ]
    edges = found["window_boundaries"]
    return Result(tuple(sorted(answers, key=lambda a: a.end_s)), (edges[0] / 1e9, edges[-1] / 1e9))


def find_perf_analyzer() -> PerfAnalyzer:
    """perf_analyzer from PATH, else from the wheel, which is downloaded at first use.

    Raises PerfAnalyzerError, which says what to install, and SetupError without a home folder.
    """
    if found := shutil.which("perf_analyzer"):
        return PerfAnalyzer(Path(found))
    if os.uname().machine != "x86_64":
        raise PerfAnalyzerError(
            f"no perf_analyzer on PATH, and its wheel is for x86_64, not {os.uname().machine}"
        )
    try:
        folder = made_whole(f"perf_analyzer-{VERSION}", _download)
        libraries = [folder / _LIBRARIES, *_base64_folders()]
    except DownloadError as error:
        raise PerfAnalyzerError(str(error)) from error
    paths = [*map(str, libraries), os.environ.get("LD_LIBRARY_PATH", "")]
    tool = PerfAnalyzer(folder / _BINARY, {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))})
    tried = _execute(tool, ["--version"], timeout_s=60)
    if tried.returncode:
        raise PerfAnalyzerError(f"{tool.binary} does not run: {tried.stderr.strip()}")
    return tool


def _download(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        wanted = ["--no-deps", "--only-binary=:all:", "--dest", scratch, *_WHEELS]
        run_step([*pip, *wanted], scratch, "or put a perf_analyzer on PATH")
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
    (folder / _BINARY).chmod(0o755)  # zipfile does not restore the file mode


def _base64_folders() -> list[Path]:
    """Folders of libb64; empty if the loader finds it by itself."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(_BASE64)
        return []
    return [path.parent for path in debian_package(_BASE64_PACKAGE).rglob(_BASE64)]
