"""Observes a server under load: the work of its models, CPU and memory of its processes.

The work is the difference of two readings of Triton's statistics. CPU and memory are read from
/proc. For a server on another machine they are unknown, and the figures are None.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
from flowturbo_client.settings import Settings

from flowturbo import contract
from flowturbo.contract import Role
from flowturbo.pipeline import read_pipeline

SAMPLE_S = 0.5
_LISTENING = "0A"  # proc(5), /proc/net/tcp
_BLOCK_BYTES = 512  # stat(2): independent of the file system's block size


@dataclass(frozen=True)
class Work:
    """The work of one model: calls, executions, rows, and seconds.

    Compute seconds sum over executions, not over requests: an execution that serves ten requests
    counts once. Queue seconds sum over the orchestrator's calls.
    """

    calls: int = 0
    executions: int = 0
    rows: int = 0
    queue_s: float = 0.0
    compute_input_s: float = 0.0
    compute_infer_s: float = 0.0
    compute_output_s: float = 0.0

    def __sub__(self, earlier: Work) -> Work:
        pairs = ((getattr(self, f.name), getattr(earlier, f.name)) for f in fields(Work))
        return Work(*(now - then for now, then in pairs))

    @property
    def rows_per_execution(self) -> float:
        """Mean rows per execution; 0 without executions."""
        return self.rows / self.executions if self.executions else 0.0

    @property
    def compute_s(self) -> float:
        """Seconds of input, inference and output, without the queue."""
        return self.compute_input_s + self.compute_infer_s + self.compute_output_s

    def shares(self) -> dict[str, float]:
        """Shares of queue and of the three compute parts in the time; keys have no _s."""
        seconds = (f.name for f in fields(Work) if f.name.endswith("_s"))
        parts = {name.removesuffix("_s"): getattr(self, name) for name in seconds}
        total = sum(parts.values()) or 1.0
        return {name: part / total for name, part in parts.items()}


def read_work(client: Any, model: str) -> Work:
    """The work of `model` since the server started; `client` is tritonclient.grpc's."""
    (found,) = client.get_inference_statistics(model).model_stats
    # inference_stats counts an execution's time once per request, batch_stats counts it once.
    batches = found.batch_stats
    return Work(
        found.inference_stats.success.count,
        found.execution_count,
        found.inference_count,
        found.inference_stats.queue.ns / 1e9,
        sum(batch.compute_input.ns for batch in batches) / 1e9,
        sum(batch.compute_infer.ns for batch in batches) / 1e9,
        sum(batch.compute_output.ns for batch in batches) / 1e9,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of a server after `at_s` seconds: resident (shared pages once) and in /dev/shm."""

    at_s: float
    resident: int
    shared_files: int


@dataclass(frozen=True)
class Observation:
    """A server's work in `wall_s` seconds. `requests` counts the orchestrator's requests."""

    wall_s: float
    requests: int
    models: dict[str, Work]
    cpu_s: float | None
    memory: tuple[Memory, ...]

    def busy_share(self, model: str) -> float:
        """The share of time in which `model` computed; may exceed 1 with several instances."""
        return self.models[model].compute_infer_s / self.wall_s

    @property
    def compute_s(self) -> float:
        """Compute seconds of all composed models."""
        return sum(work.compute_s for work in self.models.values())

    @property
    def rows_per_execution(self) -> float:
        """Mean batch size of predictor and refiner together: the effect of batching."""
        networks = [work for role, work in self.models.items() if role != Role.DECODER]
        executions = sum(work.executions for work in networks)
        return sum(work.rows for work in networks) / executions if executions else 0.0


class Observer:
    """Provides `observation` once its `observing` block has ended."""

    observation: Observation

    def __init__(self, url: str, pipeline: str | None = None) -> None:
        """Reads the counters of `pipeline`'s models and begins to sample memory.

        None selects the only pipeline of the server. Raises tritonclient's InferenceServerException
        if the server does not answer. Raises ValueError if `pipeline` is None and the server has
        several.
        """
        self._client = connect(url)
        known = {model.name for model in self._client.get_model_repository_index().models}
        self._models = _models(known, pipeline)
        self._pid = listening_process(int(url.rpartition(":")[2]))
        self._stop = threading.Event()
        self._memory: list[Memory] = []
        self._work_before = self._work()
        self._cpu_before = self._cpu_s()
        self._began_s = time.monotonic()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def stop(self) -> None:
        """Stops sampling and reads the counters again."""
        wall_s = time.monotonic() - self._began_s
        self._stop.set()
        self._sampler.join()
        self.observation = self._observation(wall_s)
        self._client.close()

    def _observation(self, wall_s: float) -> Observation:
        now, cpu_s = self._work(), self._cpu_s()
        work = {name: now[name] - before for name, before in self._work_before.items()}
        requests = work.pop(contract.ORCHESTRATOR).executions
        spent = None if cpu_s is None or self._cpu_before is None else cpu_s - self._cpu_before
        return Observation(wall_s, requests, work, spent, tuple(self._memory))

    def _work(self) -> dict[str, Work]:
        names = {contract.ORCHESTRATOR: contract.ORCHESTRATOR, **self._models}
        return {role: read_work(self._client, name) for role, name in names.items()}

    def _cpu_s(self) -> float | None:
        return None if self._pid is None else cpu_s(process_tree(self._pid))

    def _sample(self) -> None:
        while self._pid is not None:
            tree = process_tree(self._pid)
            at_s = time.monotonic() - self._began_s
            self._memory.append(Memory(at_s, resident_bytes(tree), shared_file_bytes(tree)))
            if self._stop.wait(SAMPLE_S):
                return


@contextlib.contextmanager
def observing(url: str, pipeline: str | None = None) -> Iterator[Observer]:
    """Observes the server at `url` (host:port of its gRPC endpoint) while the block runs.

    `pipeline` is as in Observer.
    """
    observer = Observer(url, pipeline)
    try:
        yield observer
    finally:
        observer.stop()


def described(observed: Observation) -> dict[str, Any]:
    """An observation as JSON values: work per model, CPU and memory of the processes."""
    models = {name: asdict(work) for name, work in observed.models.items()}
    for name, work in observed.models.items():
        models[name]["rows_per_execution"] = work.rows_per_execution
        models[name] |= {"busy_share": observed.busy_share(name), "shares": work.shares()}
    found: dict[str, Any] = {"wall_s": observed.wall_s, "requests": observed.requests}
    found |= {"rows_per_execution": observed.rows_per_execution, "models": models}
    if observed.cpu_s is not None and observed.memory:
        resident = np.array([sample.resident for sample in observed.memory]) / 2**20
        quarter = -(-len(resident) // 4)
        found["cpu_cores"] = observed.cpu_s / observed.wall_s
        found["resident_mib"] = {
            "first_quarter": float(resident[:quarter].mean()),
            "last_quarter": float(resident[-quarter:].mean()),
            "peak": float(resident.max()),
        }
        found["shared_memory_mib"] = max(m.shared_files for m in observed.memory) / 2**20
    return found


def orchestration(observed: Observation, latency_ms: float) -> dict[str, float]:
    """The part of a single request's mean latency outside the models, and its queue time."""
    composed_ms = 1e3 * observed.compute_s / observed.requests
    queue_ms = 1e3 * sum(work.queue_s for work in observed.models.values()) / observed.requests
    rest_ms = latency_ms - composed_ms
    return {"share": rest_ms / latency_ms, "ms_per_request": rest_ms, "queue_ms": queue_ms}


def hardware() -> dict[str, Any]:
    """CPU name, cores and memory of this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    return {"cpu": next(names, "unknown"), "cores": cores, "gib": round(memory / 2**30, 1)}


def write_json(document: Any, path: Path) -> None:
    """Writes `document` to `path` atomically; creates missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def connect(url: str) -> Any:
    """Triton's own client. Like flowturbo_client, it uses no proxy for this machine."""
    settings = Settings.of(url, contract.ORCHESTRATOR, timeout_s=60, retries=0, credentials=None)
    return tritonclient.grpc.InferenceServerClient(**settings.channel())


def processor() -> dict[str, Any]:
    """The machine in reports of quality: without its memory, which changes nothing."""
    return {name: value for name, value in hardware().items() if name != "gib"}


def in_words(hardware: Mapping[str, Any]) -> str:
    """A machine as text: cpu AMD EPYC, cores 2."""
    return ", ".join(f"{name} {value}" for name, value in hardware.items())


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum of the ratios of several rounds."""
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def described_server(url: str, repository: Path, name: str | None = None) -> dict[str, Any]:
    """Version and settings from the server; engines and precisions from the repository."""
    with contextlib.closing(connect(url)) as client:
        config = client.get_model_config(contract.ORCHESTRATOR).config
        version = client.get_server_metadata().version
    pipeline = read_pipeline(repository, name)
    return {
        "version": version,
        "settings": {name: value.string_value for name, value in config.parameters.items()},
        "models": {
            role.value: {
                key: getattr(pipeline.models[role], key)
                for key in ("engine", "runtime", "precision", "max_rows")
            }
            for role in pipeline.generating
        },
    }


def _models(known: Iterable[str], pipeline: str | None) -> dict[str, str]:
    """The Triton models of a pipeline among those `known`, by role."""
    if pipeline is None:
        ending = contract.model_name("", Role.PREDICTOR)
        found = [name.removesuffix(ending) for name in known if name.endswith(ending)]
        if len(found) != 1:
            raise ValueError(f"the server serves {', '.join(sorted(found)) or 'nothing'}: name one")
        pipeline = found[0]
    # Generation does not call the encoder of images.
    roles = [role for role in Role if role is not Role.ENCODER]
    named = {role.value: contract.model_name(pipeline, role) for role in roles}
    return {role: name for role, name in named.items() if name in known}


def listening_process(port: int) -> int | None:
    """Id of the local process that listens on TCP `port`; None if it is not found."""
    tables = (_read(Path("/proc/net", name)).splitlines()[1:] for name in ("tcp", "tcp6"))
    lines = [line.split() for table in tables for line in table]
    sockets = {
        f"socket:[{found[9]}]"
        for found in lines
        if found[3] == _LISTENING and int(found[1].rpartition(":")[2], 16) == port
    }
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it has closed, or belongs to another user
            if os.readlink(descriptor) in sockets:
                return int(descriptor.parts[2])
    return None


def process_tree(root: int) -> list[int]:
    """`root` and its living descendants."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if stat := _stat_fields(int(folder.name)):
            parents[int(folder.name)] = int(stat[1])
    tree = [root]
    for pid in tree:  # `tree` grows during the loop
        tree += [child for child, parent in parents.items() if parent == pid]
    return tree


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds that these processes have used, in user and kernel mode."""
    found = [stat for pid in pids if (stat := _stat_fields(pid))]
    ticks = sum(int(stat[11]) + int(stat[12]) for stat in found)
    return ticks / float(os.sysconf("SC_CLK_TCK"))


def resident_bytes(pids: Iterable[int]) -> int:
    """Resident memory of these processes; sharers divide a shared page (PSS)."""
    totals = (_read(Path(f"/proc/{pid}/smaps_rollup")) for pid in pids)
    return 1024 * sum(int(k) for text in totals for k in re.findall(r"^Pss:\s+(\d+)", text, re.M))


def shared_file_bytes(pids: Iterable[int]) -> int:
    """Bytes in /dev/shm of the files that these processes map."""
    maps = (_read(Path(f"/proc/{pid}/maps")) for pid in pids)
    total = 0
    for path in {p for text in maps for p in re.findall(r" (/dev/shm/\S+)$", text, re.M)}:
        with contextlib.suppress(OSError):
            total += os.stat(path).st_blocks * _BLOCK_BYTES
    return total


def _stat_fields(pid: int) -> list[str]:
    """The fields after the name in /proc/PID/stat: state, parent, ...; [] if it has ended."""
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has ended, or belongs to another user
        return ""
