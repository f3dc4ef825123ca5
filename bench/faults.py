"""Kills and stops every process of a server under load: `python -m bench.faults`.

Eight clients ask for single images, each with a deadline of 20 s. Every answer is compared with the
image that its seed gave before. Writes a JSON file and docs/reliability.md.
"""

import argparse
import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flowturbo_client import FlowTurboClient, FlowTurboError
from tqdm import tqdm

from bench.observe import hardware, in_words, process_tree, write_json
from flowturbo.command import run_command
from flowturbo.errors import FlowTurboError as ServiceError
from flowturbo.serving.tritonserver import model_of

CLIENTS, SEEDS, DEADLINE_S = 8, 16, 20.0
FAULTS = ("kill -9", "SIGSTOP 2 s", "SIGSTOP 30 s")
FULL_SPEED = 0.9  # of the images per second before the fault
_BEFORE_S, _AFTER_S, _WINDOW_S = 4.0, 26.0, 2.0
SAME_LEVELS = 3.0  # mean difference of 255: in other batches bf16 rounds otherwise
_READY_S = 300.0


@dataclass(frozen=True)
class Answered:
    """One request: when it began and ended (s after the fault), and how."""

    began: float
    ended: float
    outcome: str


@dataclass(frozen=True)
class Outcome:
    """What a fault of one process did to the requests around it.

    `overdue` are those that were not answered by their deadline. `silent_s` is the longest time
    without an answer. `full_speed_s` after the fault the clients have FULL_SPEED of their images
    per second again. It is None if they have not within the time measured.
    """

    process: str
    fault: str
    right: int
    wrong: int
    failed: dict[str, int]
    overdue: int
    silent_s: float
    full_speed_s: float | None


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__)
    add = parser.add_argument
    add("--repository", type=Path, default=Path("model_repository"))
    add("--process", nargs="+", help="names of models, or tritonserver (default: all)")
    add("--fault", nargs="+", choices=FAULTS, default=list(FAULTS))
    add("--json", type=Path, default=Path("docs/benchmarks/faults.json"))
    add("--report", type=Path, default=Path("docs/reliability.md"))
    args = parser.parse_args(argv)
    errors = (FlowTurboError, ServiceError, OSError, ValueError)
    return run_command("faults", lambda: _run(args), errors)


def _run(args: argparse.Namespace) -> None:
    args.json.parent.mkdir(parents=True, exist_ok=True)
    log = args.json.with_suffix(".log")
    found: dict[str, Any] = {"hardware": hardware(), "outcomes": []}
    with served(args.repository, log) as server:
        known = known_images(server.grpc)
        names = args.process or sorted(server.processes())
        for fault in args.fault:
            for name in tqdm(names, desc=fault):
                found["outcomes"].append(asdict(_suffer(server, name, fault, known)))
                write_json(found, args.json)
    args.report.write_text(markdown(found))
    log.unlink()
    print(markdown(found))


class Served:
    """A running `flowturbo.serve` on free ports; its log goes to the file `log`.

    Its code is that of the checkout `root`, or else this one's.
    """

    def __init__(self, repository: Path, log: Path, root: Path | None = None) -> None:
        where = str(repository.resolve())
        serve = [sys.executable, "-m", "flowturbo.serve", "--repository", where]
        self._command, self._log, self._root = [*serve, "--restarts=1000"], log, root
        self._env = dict(os.environ)
        if root:
            self._env["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'client'}"
        self.grpc = self.http = self.metrics = "127.0.0.1:0"
        self._start()

    def _start(self) -> None:
        names = ("http", "grpc", "metrics")
        ports = [f"--{name}-port={getattr(self, name).rpartition(':')[2]}" for name in names]
        with self._log.open("a") as stderr:
            self._process = subprocess.Popen(
                [*self._command, *ports],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=self._root,
                env=self._env,
            )
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line.startswith("ready: gRPC "):
            self.stop()
            raise FlowTurboError(f"the server did not start: see {self._log}")
        # Nobody reads what it prints later: it is one line per start.
        words = line.replace(",", "").split()
        self.grpc, self.http, self.metrics = words[2], words[4], words[6]

    def restart(self) -> None:
        """Stops it, which lets its requests finish, and starts it on the same ports."""
        self.stop()
        self._start()

    def stop(self) -> None:
        """Asks it to stop, and waits."""
        self._process.terminate()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def processes(self) -> dict[str, int]:
        """The processes below the supervisor, by the name of their model."""
        found = {}
        for pid in process_tree(self._process.pid)[1:]:
            comm = Path(f"/proc/{pid}/comm").read_text().strip()
            if comm.startswith("triton_python_b"):
                found[model_of(pid)] = pid
            elif comm == "tritonserver":
                found[comm] = pid
        return found

    def wait_ready(self) -> None:
        """Until the server answers, at most some minutes. Raises FlowTurboError."""
        wait_ready(self.grpc, self._process, _READY_S, lambda: "the server does not come back")


def wait_ready(
    url: str, process: subprocess.Popen[Any], most_s: float, said: Callable[[], str]
) -> None:
    """Until `process` answers at `url`, at most `most_s`; else raises FlowTurboError of `said`."""
    until = time.monotonic() + most_s
    with FlowTurboClient(url, retries=0) as client:
        while not client.is_ready():
            if time.monotonic() > until or process.poll() is not None:
                raise FlowTurboError(said())
            time.sleep(0.1)


@contextlib.contextmanager
def served(repository: Path, log: Path, root: Path | None = None) -> Iterator[Served]:
    """A `flowturbo.serve` that is stopped afterwards."""
    server = Served(repository, log, root)
    try:
        yield server
    finally:
        server.stop()


def known_images(url: str) -> np.ndarray:
    """The images of the seeds that clients ask for, as levels."""
    with FlowTurboClient(url) as client:
        seeds = list(range(SEEDS))
        images = client.generate(seeds, seeds).images
    assert images is not None
    return images.astype(int)


def load(url: str, known: np.ndarray, until: Sequence[float], asked: list[Answered]) -> None:
    """One client in a loop until the time `until[0]` (monotonic s); it notes times as they are."""
    seed = 0
    with FlowTurboClient(url, timeout_s=DEADLINE_S) as client:
        while (began := time.monotonic()) < until[0]:
            seed = (seed + 1) % SEEDS
            try:
                images = client.generate([seed], [seed]).images
                assert images is not None
                off = np.abs(images[0].astype(int) - known[seed]).mean()
                outcome = "right" if off <= SAME_LEVELS else "wrong"
            except FlowTurboError as error:
                outcome = type(error).__name__
            asked.append(Answered(began, time.monotonic(), outcome))


def _suffer(server: Served, name: str, fault: str, known: np.ndarray) -> Outcome:
    """Puts a load on the server, and the fault on one process."""
    server.wait_ready()
    asked: list[Answered] = []
    stopped_s = 0.0 if fault == FAULTS[0] else float(fault.split()[1])
    began = time.monotonic()
    at, until = began + _BEFORE_S, [began + _BEFORE_S + stopped_s + _AFTER_S]
    clients = [
        threading.Thread(target=load, args=(server.grpc, known, until, asked))
        for _ in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    time.sleep(at - time.monotonic())
    pid = server.processes()[name]
    os.kill(pid, signal.SIGKILL if not stopped_s else signal.SIGSTOP)
    if stopped_s:
        time.sleep(stopped_s)
        with contextlib.suppress(ProcessLookupError):  # it was replaced meanwhile
            os.kill(pid, signal.SIGCONT)
    for client in clients:
        client.join()
    return judged(name, fault, asked, began, at, until[0])


def judged(
    name: str, fault: str, asked: Sequence[Answered], began: float, at: float, until: float
) -> Outcome:
    """The outcome of a fault at the time `at`, of a load from `began` to `until`."""
    after = [each for each in asked if each.ended >= at]
    kinds = Counter(each.outcome for each in after)
    right = sorted(each.ended for each in asked if each.outcome == "right")
    ends = [at, *(ended for ended in right if ended >= at), until]
    silent_s, resumed = max((b - a, b) for a, b in itertools.pairwise(ends))
    speed = sum(began + 1 <= ended < at for ended in right) / (at - began - 1)

    def at_full_speed(start: float) -> bool:
        made = sum(start <= ended < start + _WINDOW_S for ended in right)
        return made / _WINDOW_S >= FULL_SPEED * speed

    starts = np.arange(resumed, until - _WINDOW_S, 0.1)
    full = next((float(start - at) for start in starts if at_full_speed(start)), None)
    return Outcome(
        name,
        fault,
        kinds.pop("right", 0),
        kinds.pop("wrong", 0),
        dict(kinds),
        sum(each.ended - each.began > DEADLINE_S + 1 for each in after),
        silent_s,
        full,
    )


def markdown(found: dict[str, Any]) -> str:
    """The report."""
    outcomes = found["outcomes"]
    lines = [
        "# Reliability",
        "",
        f"{CLIENTS} clients ask for single images, each with a deadline of {DEADLINE_S:g} s. "
        "Meanwhile a process below `flowturbo.serve` is killed, or stopped for some time. Every "
        "image is compared with the one that its seed gave before. "
        f"{in_words(found['hardware'])}. `python -m bench.faults` measures this again.",
        "",
        "- **Right, wrong, failed**: answers after the fault. The client asks again until its "
        "deadline, so nothing fails if the server is back before.",
        "- **Overdue**: requests without an answer at their deadline.",
        "- **Silent**: the longest time without an answer. **Full speed**: when the clients have "
        f"{FULL_SPEED:.0%} of their images per second again.",
        "",
        "| process | fault | right | wrong | failed | overdue | silent, s | full speed after, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in outcomes:
        failed = ", ".join(f"{count} {kind}" for kind, count in each["failed"].items()) or "0"
        full = "" if each["full_speed_s"] is None else f"{each['full_speed_s']:.1f}"
        lines.append(
            f"| {each['process']} | {each['fault']} | {each['right']} | {each['wrong']} | {failed} "
            f"| {each['overdue']} | {each['silent_s']:.1f} | {full} |"
        )
    silent = statistics.median(each["silent_s"] for each in outcomes)
    lines += [
        "",
        f"The median silence is {silent:.1f} s: the server starts again in that time.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
