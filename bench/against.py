"""Compares the service with that of another checkout: `python -m bench.against ../before`.

Each checkout has its own exported repository and serves with its own code. Both servers run; one is
measured at a time, the other one idles. Two servers of the same code differ by a few percent, so
both start anew several times. Ratios are paired by round. Writes a JSON file.
"""

import argparse
import contextlib
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flowturbo_client import FlowTurboClient, FlowTurboError
from tqdm import tqdm

from bench.closed_loop import closed_loop
from bench.faults import served
from bench.observe import hardware, in_words, write_json
from flowturbo.command import run_command
from flowturbo.errors import FlowTurboError as ServiceError

CASES = ("1x1", "8x1", "1x8")  # clients x images per request
_REPOSITORY = "model_repository"
_T_95 = {12: 2.201, 16: 2.131, 24: 2.069}  # Student's t, two-sided, by rounds


@dataclass(frozen=True)
class Case:
    """`clients` clients that ask for `images` images at a time."""

    clients: int
    images: int
    schedule: str

    def __str__(self) -> str:
        return f"{self.schedule}, clients {self.clients}, images {self.images}"


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m bench.against", description=__doc__)
    add = parser.add_argument
    add("before", type=Path, help="the other checkout, with its model_repository exported")
    add("--now", type=Path, default=Path(), help="default: this folder")
    add("--schedule", nargs="+", default=["H1P5R3", "fast"])
    add("--case", nargs="+", choices=CASES, default=list(CASES), help="clients x images")
    add("--guidance-scale", type=float, help="default: the pipeline's")
    add("--rounds", type=int, default=12, choices=list(_T_95))
    add("--starts", type=int, default=4, help="of both servers; they divide the rounds")
    add("--seconds", type=float, default=2.5, help="of a measurement")
    add("--json", type=Path, default=Path("output/against.json"))
    args = parser.parse_args(argv)
    errors = (FlowTurboError, ServiceError, OSError, ValueError)
    return run_command("against", lambda: _run(args), errors)


def _run(args: argparse.Namespace) -> None:
    if args.rounds % args.starts:
        raise ValueError(f"--starts must divide --rounds {args.rounds}, got {args.starts}")
    cases = []
    for schedule in args.schedule:
        for text in args.case:
            clients, images = map(int, text.split("x"))
            cases.append(Case(clients, images, schedule))
    found: dict[str, Any] = {str(case): {"before": [], "now": []} for case in cases}
    with tqdm(total=2 * args.rounds * len(cases)) as bar:
        for _ in range(args.starts):
            _measured(args, cases, args.rounds // args.starts, found, bar)
    for case in found.values():
        case |= ratio(case["before"], case["now"])
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json({"hardware": hardware(), "cases": found}, args.json)
    print(markdown(found))


def _measured(
    args: argparse.Namespace, cases: Sequence[Case], rounds: int, found: Any, bar: Any
) -> None:
    """Images per second of some rounds, joined to `found`, with servers that were just started."""
    roots = {"before": args.before.resolve(), "now": args.now.resolve()}
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        clients = {}
        for name, root in roots.items():
            server = stack.enter_context(served(root / _REPOSITORY, scratch / name, root))
            client = FlowTurboClient(server.grpc, timeout_s=600, retries=0)
            clients[name] = stack.enter_context(client)
        for index in range(-1, rounds):  # the first round warms up
            for case in cases:
                names = list(clients) if index % 2 else list(clients)[::-1]
                for name in names:
                    speed = _speed(clients[name], case, args)
                    if index >= 0:
                        found[str(case)][name].append(speed)
                        bar.update()


def _speed(client: FlowTurboClient, case: Case, args: argparse.Namespace) -> float:
    seeds = list(range(case.images))
    return closed_loop(
        lambda: client.generate(seeds, seeds, case.schedule, guidance_scale=args.guidance_scale),
        case.clients,
        args.seconds,
        case.images,
    ).images_per_s


def ratio(before: Sequence[float], now: Sequence[float]) -> dict[str, float]:
    """The mean ratio of images per second, now to before, with its 95% interval."""
    logs = np.log(now) - np.log(before)
    mean, half = float(logs.mean()), interval_of(logs)
    return {"ratio": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}


def interval_of(values: np.ndarray) -> float:
    """Half the 95% interval of the mean of paired differences, one per round."""
    return _T_95[len(values)] * float(values.std(ddof=1)) / math.sqrt(len(values))


def shown_ratio(of: dict[str, Any]) -> str:
    """A ratio with its interval."""
    return f"{of['ratio']:.3f} ({of['low']:.3f} to {of['high']:.3f})"


def markdown(found: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"{in_words(hardware())}. Images per second, medians; ratio with its 95% interval, paired.",
        "",
        "| case | before | now | ratio |",
        "|---|---|---|---|",
    ]
    for name, of in found.items():
        before, now = np.median(of["before"]), np.median(of["now"])
        lines.append(f"| {name} | {before:.1f} | {now:.1f} | {shown_ratio(of)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
