"""Three servers behind HAProxy or nginx: one dies every ten seconds, or is restarted in turn.

`python -m bench.proxies haproxy` runs the proxy of PATH, or Debian's, with its configuration in
deploy/. Clients ask for single images. Every answer is compared with the image that its seed gave
before. Writes a JSON file.
"""

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from flowturbo_client import FlowTurboError
from tqdm import tqdm

from bench.downloads import DownloadError, debian_package
from bench.faults import DEADLINE_S, Answered, Served, known_images, load, served, wait_ready
from bench.observe import hardware, write_json
from flowturbo.command import run_command
from flowturbo.errors import FlowTurboError as ServiceError
from flowturbo.solver.sampler import Array

SERVERS, CLIENTS, EVERY_S = 3, 6, 10.0
CONFIGURATIONS = {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}
_DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
_READY_S = 20.0


class At(Protocol):
    """A server's addresses, host:port."""

    @property
    def grpc(self) -> str: ...

    @property
    def http(self) -> str: ...


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m bench.proxies", description=__doc__)
    add = parser.add_argument
    add("proxy", choices=list(CONFIGURATIONS))
    add("--repository", type=Path, default=Path("model_repository"))
    add("--minutes", type=float, default=10.0, help="of servers that die")
    add("--rolling-minutes", type=float, default=3.0, help="of servers that are restarted in turn")
    add("--json", type=Path, help="default: docs/benchmarks/proxy_NAME.json")
    args = parser.parse_args(argv)
    errors = (FlowTurboError, ServiceError, DownloadError, OSError, ValueError)
    return run_command("proxies", lambda: _run(args), errors)


def _run(args: argparse.Namespace) -> None:
    path = args.json or Path("docs/benchmarks") / f"proxy_{args.proxy}.json"
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = [
            stack.enter_context(served(args.repository, scratch / f"{k}.log"))
            for k in range(SERVERS)
        ]
        url = stack.enter_context(proxy(args.proxy, servers, scratch))
        known = known_images(url)
        found = {
            "killed": under_fire(url, servers, known, 60 * args.minutes, _killed),
            "restarted": under_fire(url, servers, known, 60 * args.rolling_minutes, Served.restart),
        }
    write_json({"proxy": args.proxy, "hardware": hardware(), **found}, path)
    print(found)


def _killed(server: Served) -> None:
    os.kill(server.processes()["tritonserver"], signal.SIGKILL)


def under_fire(
    url: str,
    servers: Sequence[Served],
    known: Array,
    seconds: float,
    harm: Callable[[Served], None],
) -> dict[str, Any]:
    """Harms a server every EVERY_S while the others are ready; counts what clients get at `url`.

    Every answer is compared with the `known` image of its seed.
    """
    asked: list[Answered] = []
    until = [time.monotonic() + seconds]
    clients = [
        threading.Thread(target=load, args=(url, known, until, asked)) for _ in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    harmed = 0
    try:
        for victim, _ in zip(
            itertools.cycle(servers), tqdm(range(int(seconds / EVERY_S)), desc="servers harmed"),
            strict=False,
        ):  # fmt: skip
            next_s = time.monotonic() + EVERY_S
            for server in servers:
                server.wait_ready()
            if time.monotonic() >= until[0]:
                break
            harm(victim)
            harmed += 1
            time.sleep(max(0.0, min(next_s, until[0]) - time.monotonic()))
    finally:
        for client in clients:
            client.join()
    kinds = Counter(each.outcome for each in asked)
    return {
        "seconds": seconds,
        "servers": harmed,
        "requests": len(asked),
        "right": kinds.pop("right", 0),
        "wrong": kinds.pop("wrong", 0),
        "failed": dict(kinds),
        "overdue": sum(each.ended - each.began > DEADLINE_S + 1 for each in asked),
        "longest_s": max(each.ended - each.began for each in asked),
    }


@contextlib.contextmanager
def proxy(name: str, servers: Sequence[At], folder: Path) -> Iterator[str]:
    """The proxy `name` in front of `servers`; yields its address. Raises FlowTurboError.

    Its configuration and logs go into `folder`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = (_DEPLOY / CONFIGURATIONS[name]).read_text()
    text = text.replace("*:8001", f"127.0.0.1:{port}")
    text = text.replace("listen 8001", f"listen 127.0.0.1:{port}")
    for k, server in enumerate(servers, start=1):
        http = server.http.rpartition(":")[2]
        lines = text.splitlines()
        for place, line in enumerate(lines):
            if f" images-{k}:8001" in line:
                line = line.replace(f"images-{k}:8001", server.grpc)
                lines[place] = line.replace("port 8000", f"port {http}")
        text = "\n".join([*lines, ""])
    if name == "nginx":  # its usual folders belong to the system
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
        text = text.replace("http {", f"http {{ {paths}", 1)
    path = folder / CONFIGURATIONS[name]
    path.write_text(text)
    command = [*_found(name), "-f", str(path)]
    if name == "nginx":
        once = f"daemon off; pid {folder}/pid; error_log stderr;"
        command = [*_found(name), "-p", str(folder), "-c", str(path), "-g", once]
    log_path = folder / f"{name}.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"127.0.0.1:{port}"
    try:
        wait_ready(
            url,
            process,
            _READY_S,
            lambda: f"the proxy is not ready: {log_path.read_text()[-2000:]}",
        )
        yield url
    finally:
        process.terminate()
        process.wait()


def _found(name: str) -> list[str]:
    """The program of this name, with what it needs before it."""
    if path := shutil.which(name):
        return [path]
    folder = debian_package(name, along="lib(lua5.3-0|pcre2?-.*|opentracing.*|ssl.*|crypt.*)")
    libraries = ":".join(str(p) for p in sorted(folder.glob("usr/lib/*-linux-gnu")))
    return ["env", f"LD_LIBRARY_PATH={libraries}", str(folder / "usr" / "sbin" / name)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
