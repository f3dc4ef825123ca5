"""What the HTTP gateway costs: `python -m bench.gateway`.

The same images, by gRPC from the service and by HTTP from the gateway before it, as base64 PNG
files. Both take turns in one run. Writes a JSON file and prints a table.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import urllib3
from flowturbo_client import FlowTurboClient, FlowTurboError
from tqdm import tqdm

from bench.against import interval_of, ratio, shown_ratio
from bench.closed_loop import closed_loop
from bench.faults import served
from bench.observe import hardware, in_words, write_json
from bench.web import ready_process
from flowturbo.command import run_command
from flowturbo.errors import FlowTurboError as ServiceError

CLIENTS = (1, 8)
# What to ask each pipeline for, by gRPC and by HTTP.
_ASKED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "glyphs": ({"labels": [1]}, {"label": 1}),
    "scenes": ({"prompts": ["a red circle"]}, {"prompt": "a red circle"}),
}
_FORM = "png"


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m bench.gateway", description=__doc__)
    add = parser.add_argument
    add("--repository", type=Path, default=Path("model_repository"))
    add("--pipeline", nargs="+", choices=list(_ASKED), default=list(_ASKED))
    add("--schedule", default="H1P5R3")
    add("--rounds", type=int, default=24, choices=(12, 16, 24))
    add("--seconds", type=float, default=2.5, help="of a measurement")
    add("--json", type=Path, default=Path("docs/benchmarks/gateway.json"))
    args = parser.parse_args(argv)
    errors = (FlowTurboError, ServiceError, OSError, ValueError)
    return run_command("gateway", lambda: _run(args), errors)


def _run(args: argparse.Namespace) -> None:
    found: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(served(args.repository, scratch / "server.log"))
        address = stack.enter_context(running_gateway(server.grpc)).address
        grpc = stack.enter_context(FlowTurboClient(server.grpc, timeout_s=600, retries=0))
        for pipeline in args.pipeline:
            calls = {
                "grpc": _by_grpc(grpc, pipeline, args.schedule),
                "http": _by_http(address, pipeline, args.schedule),
            }
            for call in calls.values():
                call()
            for clients in CLIENTS:
                found[f"{pipeline}, {clients}"] = _measured(
                    calls, clients, args, f"{pipeline}, {clients} clients"
                )
    write_json({"hardware": hardware(), "schedule": args.schedule, "found": found}, args.json)
    print(markdown(found, args.schedule))


def _measured(
    calls: dict[str, Callable[[], object]], clients: int, args: argparse.Namespace, title: str
) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {"grpc": [], "http": []}
    medians: dict[str, list[float]] = {"grpc": [], "http": []}
    for index in tqdm(range(args.rounds), title):
        for name in list(calls)[:: 1 if index % 2 else -1]:
            measured = closed_loop(calls[name], clients, args.seconds)
            speeds[name].append(measured.images_per_s)
            medians[name].append(measured.percentile(50))
    more_ms = np.subtract(medians["http"], medians["grpc"])
    return {
        "images_per_s": speeds,
        "latency_ms": medians,
        **ratio(speeds["grpc"], speeds["http"]),
        "more_ms": float(more_ms.mean()),
        "more_ms_interval": interval_of(more_ms),
    }


def _by_grpc(client: FlowTurboClient, pipeline: str, schedule: str) -> Callable[[], object]:
    asked = _ASKED[pipeline][0] | {"pipeline": pipeline, "schedule": schedule}
    return lambda: client.generate(seeds=[2], output_format=f"{_FORM}_base64", **asked)


def _by_http(address: str, pipeline: str, schedule: str) -> Callable[[], object]:
    pool = urllib3.PoolManager(maxsize=64)
    fields = {"model": pipeline, "seed": 2, "schedule": schedule, "output_format": _FORM}
    fields |= _ASKED[pipeline][1]

    def call() -> object:
        answer = pool.request("POST", f"{address}/v1/images/generations", json=fields)
        if answer.status != 200:
            raise FlowTurboError(f"HTTP {answer.status}: {answer.data[:200]!r}")
        return answer.json()["data"][0]["b64_json"]

    return call


@dataclass(frozen=True)
class RunningGateway:
    """A gateway's address and process."""

    address: str
    pid: int


@contextlib.contextmanager
def running_gateway(service: str, *options: str) -> Iterator[RunningGateway]:
    """A gateway in its own process on a free loopback port. Raises FlowTurboError."""
    command = [sys.executable, "-m", "flowturbo.gateway", "--service", service, "--port", "0"]
    with ready_process([*command, *options], "the gateway") as (pid, said):
        yield RunningGateway(said.removeprefix("ready: "), pid)


def markdown(found: dict[str, dict[str, Any]], schedule: str) -> str:
    """The table."""
    lines = [
        f"{in_words(hardware())}, schedule {schedule}, one image per request. Medians; intervals "
        "are 95%, paired.",
        "",
        "| pipeline, clients | gRPC, images/s | HTTP, images/s | ratio | more time, ms |",
        "|---|---|---|---|---|",
    ]
    for name, of in found.items():
        grpc, http = (np.median(of["images_per_s"][way]) for way in ("grpc", "http"))
        lines.append(
            f"| {name} | {grpc:.1f} | {http:.1f} | {shown_ratio(of)} | "
            f"{of['more_ms']:.2f} ± {of['more_ms_interval']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
