"""Starts, watches and stops a `tritonserver` process. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from flowturbo import contract
from flowturbo.pipeline import Pipeline, installed, read_pipeline
from flowturbo.serving.endpoint import drain, endpoint
from flowturbo.serving.installation import (
    Installation,
    ServerError,
    SetupError,
    check_path,
    find_server,
)

_SHARED_MEMORY = Path("/dev/shm")
_STUB_NAME = "triton_python_b"  # process name in the kernel: its first 15 characters
_INSTANCE = r"([a-z0-9][\w-]*)_\d+_\d+"  # name of a model instance in a process's command line
_POLL_S = 0.05
_ENDING_S = 5  # beyond the exit timeout: the server has a timer of its own
_ANSWERS_S = 600  # for one call of every model; a large model on few cores takes a minute
_ASK_S = 10  # for one request; short, so that a stop is noticed
_TRY_AGAIN = (499, 503, 504)  # the deadline passed, or the server is full
_LOG_TAIL_LINES = 40
# Each thread that allocates would keep freed memory of its own, in every process of the server.
_ALLOCATOR = {"MALLOC_ARENA_MAX": "2"}
# This program asks the kernel to end it with its parent, and then becomes the server. It is a
# separate program because code between fork and exec can deadlock on locks of other threads
# (gRPC's did). It also enlarges the stack of the server's threads. Release 24.10 parses JSON by
# recursion, and keeps the list of a body's chunks on the stack.
_PR_SET_PDEATHSIG = 1
_STACK = 64 << 20  # bytes of address space per thread
_CANNOT_RUN = 126  # a shell's exit code for a command that cannot be run
_END_WITH_PARENT = f"""
import ctypes, os, resource, sys
_, most = resource.getrlimit(resource.RLIMIT_STACK)
stack = {_STACK} if most == resource.RLIM_INFINITY else min({_STACK}, most)
resource.setrlimit(resource.RLIMIT_STACK, (stack, most))
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGTERM)})
try:
    os.execv(sys.argv[1], sys.argv[1:])
except OSError as error:
    print(f"cannot run {{sys.argv[1]}}: {{error}}", file=sys.stderr)
    sys.exit({_CANNOT_RUN})
"""
_WITH_PARENT = [sys.executable, "-I", "-S", "-c", _END_WITH_PARENT]


@dataclass(frozen=True)
class ServerOptions:
    """What to serve, and where. Port 0 means any free port; `extra_args` override the rest."""

    repository: Path
    tritonserver: Path | None = None
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    thread_pool_size: int = 128
    shm_mb: int = 16
    log_verbose: int = 0
    exit_timeout_s: int = 30
    extra_args: tuple[str, ...] = ()

    def at(self, address: ServerAddress) -> ServerOptions:
        """The same, on the ports of `address`."""
        grpc, http, metrics = (
            int(of.rsplit(":", 1)[1]) for of in (address.grpc, address.http, address.metrics)
        )
        return replace(self, grpc_port=grpc, http_port=http, metrics_port=metrics)


@dataclass(frozen=True)
class ServerAddress:
    """The addresses of a server as `host:port`, as tritonclient takes them."""

    grpc: str
    http: str
    metrics: str


def _claim_ports(options: ServerOptions) -> ServerAddress:
    """Checks that the ports are free, and picks a port for each 0. Raises SetupError."""
    try:
        # The server's HTTP front end needs an address instead of a name.
        host = socket.gethostbyname(options.host)
    except OSError as error:
        raise SetupError(
            f"--host {options.host}: {error.strerror}; give an IPv4 address"
        ) from error
    wanted = {
        "grpc": options.grpc_port,
        "http": options.http_port,
        "metrics": options.metrics_port,
    }
    with contextlib.ExitStack() as held:  # all ports at once, so that no two are equal
        for name, port in sorted(wanted.items(), key=lambda item: item[1] == 0):
            listener = held.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
                listener.listen(1)
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or error
                raise SetupError(
                    f"--{name}-port {port}: cannot listen on {host}:{port}: {reason}; "
                    f"free the port, or give another --{name}-port (0 picks a free one)"
                ) from error
            wanted[name] = listener.getsockname()[1]
    return ServerAddress(**{name: f"{host}:{port}" for name, port in wanted.items()})


def _arguments(
    options: ServerOptions, installation: Installation, address: ServerAddress, shm_prefix: str
) -> list[str]:
    listen = []
    for name, where in vars(address).items():
        host, port = where.rsplit(":", 1)
        listen += [f"--{name}-address={host}", f"--{name}-port={port}"]
    return [
        f"--model-repository={options.repository.absolute()}",
        *([f"--backend-directory={installation.backends}"] if installation.backends else []),
        *listen,
        f"--backend-config=python,thread-pool-size={options.thread_pool_size}",
        f"--backend-config=python,shm-default-byte-size={options.shm_mb * 2**20}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        f"--exit-timeout-secs={options.exit_timeout_s}",
        f"--log-verbose={options.log_verbose}",
        "--exit-on-error=true",
        "--strict-readiness=true",
        "--model-control-mode=none",
        "--allow-sagemaker=false",
        "--allow-vertex-ai=false",
        "--disable-auto-complete-config",
        # The client's pings while a call waits are no attack.
        "--grpc-http2-min-recv-ping-interval-without-data=10000",
        f"--grpc-header-forward-pattern=(?i)^{contract.CALLER_HEADER}$",
        f"--http-header-forward-pattern=(?i)^{contract.CALLER_HEADER}$",
        *options.extra_args,
    ]


class TritonServer:
    """A running server with its stub processes and shared memory; `stop` removes all of these.

    The server also ends when the thread that created this object ends: keep that thread alive.
    """

    def __init__(
        self, options: ServerOptions, installation: Installation, log: int | IO[bytes]
    ) -> None:
        """Starts the process; its output goes to `log`. Raises SetupError."""
        remedy = "Triton's Python backend cannot load models from there; move or link it"
        check_path("the model repository", options.repository.absolute(), remedy)
        self.address = _claim_ports(options)
        self._repository = options.repository
        self._exit_timeout_s = options.exit_timeout_s
        self._shm_prefix = f"flowturbo_{os.getpid()}_{secrets.token_hex(4)}_"
        arguments = _arguments(options, installation, self.address, self._shm_prefix)
        self._process = subprocess.Popen(
            [*_WITH_PARENT, installation.binary, *arguments],
            env=_ALLOCATOR | os.environ | installation.environment,
            # The stub (for Python 3.11) ignores PYTHONPATH, but it searches its working directory.
            # So models find `flowturbo` in a checkout that is not installed.
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    @property
    def exit_code(self) -> int | None:
        """The server's exit code, negative for a signal, or None while it runs."""
        return self._process.poll()

    def wait_ready(
        self, timeout_s: float | None = None, give_up: Callable[[], bool] = lambda: False
    ) -> bool:
        """Waits until all models are ready and give the outputs of the export; then returns True.

        Returns False if `give_up()` returned True. Raises ServerError.
        """
        deadline_s = time.monotonic() + (timeout_s if timeout_s is not None else float("inf"))
        while not give_up():
            if self.exit_code == _CANNOT_RUN:
                raise SetupError("tritonserver cannot be run: see the message above")
            if self.exit_code is not None:
                raise ServerError(f"tritonserver {self.ending} before it was ready")
            if self._is_ready():
                return self._check_answers(deadline_s, give_up)
            if time.monotonic() > deadline_s:
                raise ServerError(f"tritonserver was not ready after {timeout_s:g} s")
            time.sleep(_POLL_S)
        return False

    @property
    def ending(self) -> str:
        """How the server ended, in words."""
        code = self.exit_code
        if code is None:
            return "is still running"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    def model_processes(self) -> dict[int, str]:
        """The live processes of the Python backend, one per model instance, and their models.

        If one dies, the server (24.10) neither notices nor replaces it, and its requests hang.
        """
        everyone = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
        return {pid: model_of(pid) for pid in self.living(everyone)}

    def living(self, pids: Iterable[int]) -> set[int]:
        """The processes in `pids` that are alive and belong to this server's Python backend."""
        session = self._process.pid
        found = ((pid, _Process.find(pid)) for pid in pids)
        return {
            pid
            for pid, each in found
            if each and each.session == session and each.state != "Z" and each.name == _STUB_NAME
        }

    def stopped(self, pids: Iterable[int]) -> set[int]:
        """Those of the server's process and of `pids` that a signal has stopped."""
        found = {pid: _Process.find(pid) for pid in (self._process.pid, *pids)}
        return {pid for pid, each in found.items() if each and each.state in "Tt"}

    def _is_ready(self) -> bool:
        try:
            self._ask("health/ready", None, 1.0)
        except OSError:
            return False
        return True

    def _check_answers(self, deadline_s: float, give_up: Callable[[], bool]) -> bool:
        """Checks the models' outputs with a first request; False if `give_up()` returned True.

        Repeats the request if the server is full or the deadline passed: the check in the server
        continues meanwhile. Raises ServerError if an output is wrong.
        """
        if not installed(self._repository):
            return True
        deadline_s = min(deadline_s, time.monotonic() + _ANSWERS_S)
        path = f"models/{contract.ORCHESTRATOR}/infer"
        body = json.dumps(_first_request(read_pipeline(self._repository))).encode()
        while not give_up() and self.exit_code is None:
            try:
                self._ask(path, body, _ASK_S)
                return True
            except urllib.error.HTTPError as error:
                failure = _reason(error)
                again = error.code in _TRY_AGAIN
            except OSError as error:
                failure, again = str(error), True
            if not again or time.monotonic() > deadline_s:
                raise ServerError(f"the first request failed: {failure}")
            time.sleep(_POLL_S)
        if self.exit_code is not None:
            raise ServerError(f"tritonserver {self.ending} before it was ready")
        return False

    def _ask(self, path: str, body: bytes | None, timeout_s: float) -> None:
        host, port = self.address.http.rsplit(":", 1)
        url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/v2/{path}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(url, body), timeout=timeout_s) as answer:
            answer.read()

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> bool:
        """Lets in-flight requests finish, then ends everything. Returns whether it ended by itself.

        Waits at most the exit timeout, or until `hurry()`. Call it once only.
        """
        # Before SIGTERM: after it Triton refuses the calls between models, also those of requests
        # in flight.
        drained_s = time.monotonic() + self._exit_timeout_s
        drain(
            endpoint(self._process.pid),
            lambda: hurry() or self.exit_code is not None or time.monotonic() > drained_s,
        )
        # SIGTERM, not SIGINT. The server treats them alike, but a process in a shell's background
        # ignores SIGINT from the start, until the server is ready.
        self._process.terminate()
        deadline_s = drained_s + _ENDING_S
        while self.exit_code is None and time.monotonic() < deadline_s and not hurry():
            time.sleep(_POLL_S)
        unforced = self.exit_code in (0, -signal.SIGTERM)
        self.kill()
        return unforced

    def kill(self) -> None:
        """Ends everything at once. Callers see their connections break."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for region in _SHARED_MEMORY.glob(f"{self._shm_prefix}*"):
            region.unlink(missing_ok=True)
        shutil.rmtree(endpoint(self._process.pid).parent, ignore_errors=True)


def _first_request(pipeline: Pipeline) -> dict[str, Any]:
    """The first request, as JSON. It asks for the seed only, so it calls no model itself.

    The orchestrator checks all its models before it answers.
    """
    types = {"int64": "INT64", "float32": "FP32", "object": "BYTES"}
    inputs = [
        {
            "name": name,
            "datatype": types[str(value.dtype)],
            "shape": value.shape,
            "data": value.tolist(),
        }
        for name, value in pipeline.condition.example(1).items()
    ]
    return {"inputs": inputs, "outputs": [{"name": contract.SEED}]}


def _reason(error: urllib.error.HTTPError) -> str:
    told = error.read().decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, TypeError):
        told = str(json.loads(told)["error"])
    return told


def model_of(pid: int) -> str:
    """The model whose instance runs in the stub process `pid`."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        words = []
    return next((m[1] for word in words if (m := re.fullmatch(_INSTANCE, word))), "a model")


@dataclass(frozen=True)
class _Process:
    """A process: its name in the kernel (15 characters), state and session."""

    name: str
    state: str
    session: int

    @classmethod
    def find(cls, pid: int) -> _Process | None:
        """None if there is no such process any more."""
        try:
            # "pid (name) state parent group session ...": proc(5)
            head, _, tail = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        except OSError:
            return None
        state, _, _, session = tail.split()[:4]
        return cls(head.partition("(")[2], state, int(session))


@contextlib.contextmanager
def running_server(
    repository: Path,
    *,
    grpc_port: int = 0,
    http_port: int = 0,
    metrics_port: int = 0,
    extra_args: Sequence[str] = (),
    log_path: Path | None = None,
    timeout_s: float = 120,
) -> Iterator[ServerAddress]:
    """Serves `repository` on loopback during the with block. Port 0 means any free port.

    The server's log goes to `log_path`, else to a temporary file. Raises SetupError if the server
    cannot start. Raises ServerError, with the end of the log, if it is not ready within
    `timeout_s`.
    """
    options = ServerOptions(
        repository=Path(repository),
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        extra_args=tuple(extra_args),
        exit_timeout_s=10,
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = log_path or Path(scratch) / "log"
        with path.open("wb") as log:
            server = TritonServer(options, find_server(), log)
        try:
            _wait_or_show_log(server, timeout_s, path)
            yield server.address
        finally:
            server.stop()


def _wait_or_show_log(server: TritonServer, timeout_s: float, log: Path) -> None:
    try:
        server.wait_ready(timeout_s)
    except ServerError as error:
        tail = log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        raise ServerError("\n".join([f"{error}; the end of its log:", *tail])) from None
