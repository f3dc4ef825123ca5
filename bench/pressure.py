"""Asks for more than a server can do: `python -m bench.pressure`.

Large requests come all at once, each with a deadline. The bound is how many of them fit into that
time one after the other, as measured here in the same run. Then single images come while clients
with large requests keep the server busy. Writes a JSON file and a report.
"""

import argparse
import asyncio
import math
import re
import statistics
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flowturbo_client import (
    AsyncFlowTurboClient,
    DeadlineExceededError,
    FlowTurboError,
    ServerBusyError,
)
from tqdm import tqdm

from bench.observe import hardware, in_words, write_json
from flowturbo.command import run_command
from flowturbo.serving.tritonserver import ServerAddress, running_server

CLIENTS, IMAGES, SCHEDULE = 64, 64, "H8"
DEADLINES_S = (7.0, 20.0, 60.0)
BULK_CLIENTS, SMALL_PER_S, SMALL_DEADLINE_S = 4, 2.0, 2.0
_FOREVER_S = 600.0


@dataclass(frozen=True)
class Crowd:
    """Large requests that came at once. `fit` of them fit into the time one after the other."""

    deadline_s: float
    fit: int
    answered: int
    late: int
    refused: int
    refusal_p95_ms: float
    refusal_max_ms: float


@dataclass(frozen=True)
class Mixed:
    """Single images beside large requests.

    `step_ms` is the longest batch of a large request: it is not interrupted. `limit_ms` is twice
    the time on an idle server, and one such step.
    """

    idle_p50_ms: float
    step_ms: float
    limit_ms: float
    p50_ms: float
    p95_ms: float
    asked: int
    failed: int
    bulk_images_per_s: float
    bulk_alone_images_per_s: float


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m bench.pressure", description=__doc__)
    add = parser.add_argument
    add("--repository", type=Path, default=Path("model_repository"))
    add("--deadlines", type=float, nargs="+", default=list(DEADLINES_S), help="seconds")
    add("--seconds", type=float, default=60.0, help="of single images beside large requests")
    add("--json", type=Path, default=Path("docs/benchmarks/pressure.json"))
    args = parser.parse_args(argv)
    errors = (FlowTurboError, OSError, ValueError)
    return run_command("pressure", lambda: asyncio.run(_run(args)), errors)


async def _run(args: argparse.Namespace) -> None:
    log = args.json.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with running_server(args.repository, log_path=log) as address:
        async with AsyncFlowTurboClient(address.grpc, retries=0, timeout_s=_FOREVER_S) as client:
            found: dict[str, Any] = {"hardware": hardware(), "schedule": SCHEDULE}
            found["one_s"] = await _one_after_another(client)
            found["crowds"] = []
            for deadline_s in args.deadlines:
                crowd = await _crowd(client, deadline_s, found["one_s"])
                found["crowds"].append(asdict(crowd))
                write_json(found, args.json)
            step_ms = _longest_step_ms(address)
            found["mixed"] = asdict(await _mixed(client, args.seconds, found["one_s"], step_ms))
    write_json(found, args.json)
    report = markdown(found)
    args.json.with_suffix(".md").write_text(report)
    log.unlink()
    print(report)


async def _large(client: AsyncFlowTurboClient, seed: int, timeout_s: float) -> None:
    seeds = [seed * IMAGES + k for k in range(IMAGES)]
    await client.generate([k % 36 for k in seeds], seeds, SCHEDULE, timeout_s=timeout_s)


async def _one_after_another(client: AsyncFlowTurboClient, count: int = 6) -> float:
    """Seconds per large request; the first two warm up."""
    taken = []
    for seed in tqdm(range(count), desc="one after the other"):
        started = time.perf_counter()
        await _large(client, seed, _FOREVER_S)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[2:])


async def _crowd(client: AsyncFlowTurboClient, deadline_s: float, one_s: float) -> Crowd:
    taken: dict[str, list[float]] = {"answered": [], "late": [], "refused": []}

    async def one(seed: int) -> None:
        started = time.perf_counter()
        try:
            await _large(client, seed, deadline_s)
            kind = "answered"
        except ServerBusyError:
            kind = "refused"
        except DeadlineExceededError:
            kind = "late"
        passed_s = time.perf_counter() - started
        late = kind == "answered" and passed_s > deadline_s
        taken["late" if late else kind].append(passed_s)

    print(f"{CLIENTS} requests of {IMAGES} images, deadline {deadline_s:g} s", flush=True)
    await asyncio.gather(*(one(seed) for seed in range(CLIENTS)))
    refused_ms = [s * 1e3 for s in taken["refused"]] or [0.0]
    counts = {kind: len(of) for kind, of in taken.items()}
    return Crowd(
        deadline_s,
        math.floor(deadline_s / one_s),
        **counts,
        refusal_p95_ms=float(np.percentile(refused_ms, 95)),
        refusal_max_ms=max(refused_ms),
    )


def _longest_step_ms(address: ServerAddress) -> float:
    """The longest batch, as the service's metrics have it."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{address.metrics}/metrics") as answer:
        text = answer.read().decode()
    found = re.findall(r"^flowturbo_block_seconds{.*} (\S+)$", text, re.MULTILINE)
    return max(map(float, found)) * 1e3


async def _mixed(
    client: AsyncFlowTurboClient, seconds: float, one_s: float, step_ms: float
) -> Mixed:
    async def small(seed: int) -> float:
        started = time.perf_counter()
        await client.generate([seed % 36], [seed], SCHEDULE, timeout_s=SMALL_DEADLINE_S)
        return (time.perf_counter() - started) * 1e3

    # In turns with a pause: each meets an idle server.
    idle_ms = [await small(seed) for seed in range(3)]
    for seed in tqdm(range(20), desc="single images, idle server"):
        await asyncio.sleep(0.3)
        idle_ms.append(await small(seed))
    end, made = time.perf_counter() + seconds, Counter[str]()

    async def bulk(k: int) -> None:
        seed = 1000 * (k + 1)
        while time.perf_counter() < end:
            await _large(client, seed, _FOREVER_S)
            made["bulk"] += IMAGES
            seed += 1

    async def timed(seed: int) -> float | None:
        try:
            return await small(seed)
        except FlowTurboError:
            return None

    started = time.perf_counter()
    running = [asyncio.create_task(bulk(k)) for k in range(BULK_CLIENTS)]
    await asyncio.sleep(one_s)
    asked = []
    for seed in tqdm(range(int((seconds - 2 * one_s) * SMALL_PER_S)), desc="beside large requests"):
        asked.append(asyncio.create_task(timed(seed)))
        await asyncio.sleep(1 / SMALL_PER_S)
    taken = await asyncio.gather(*asked)
    await asyncio.gather(*running)
    passed_s = time.perf_counter() - started
    took_ms = [ms for ms in taken if ms is not None]
    idle = statistics.median(idle_ms[3:])
    return Mixed(
        idle,
        step_ms,
        2 * idle + step_ms,
        statistics.median(took_ms),
        float(np.percentile(took_ms, 95)),
        len(taken),
        len(taken) - len(took_ms),
        made["bulk"] / passed_s,
        IMAGES / one_s,
    )


def markdown(found: dict[str, Any]) -> str:
    """The report."""
    lines = [
        "# Under pressure",
        "",
        f"glyphs, {in_words(found['hardware'])}. A request of {IMAGES} images with "
        f"`{found['schedule']}` takes {found['one_s']:.2f} s if it comes alone (median of four).",
        "",
        f"## {CLIENTS} such requests at once",
        "",
        "“Fit” is how many fit into the time one after the other, rounded down.",
        "",
        "| deadline | fit | answered in time | late | refused | refusal p95, max |",
        "|---|---|---|---|---|---|",
    ]
    for crowd in found["crowds"]:
        lines.append(
            f"| {crowd['deadline_s']:g} s | {crowd['fit']} | {crowd['answered']} | {crowd['late']} "
            f"| {crowd['refused']} | {crowd['refusal_p95_ms']:.0f} ms, "
            f"{crowd['refusal_max_ms']:.0f} ms |"
        )
    mixed = found["mixed"]
    lines += [
        "",
        "## Single images beside large requests",
        "",
        f"{BULK_CLIENTS} clients ask for {IMAGES} images each, again and again. {SMALL_PER_S:g} "
        f"single images per second come with a deadline of {SMALL_DEADLINE_S:g} s.",
        "",
        "| | |",
        "|---|---|",
        f"| single image, idle server, p50 | {mixed['idle_p50_ms']:.0f} ms |",
        f"| beside large requests, p50, p95 | {mixed['p50_ms']:.0f} ms, {mixed['p95_ms']:.0f} ms |",
        f"| twice the idle time and one large step | {mixed['limit_ms']:.0f} ms |",
        f"| failed | {mixed['failed']} of {mixed['asked']} |",
        f"| large requests, images/s | {mixed['bulk_images_per_s']:.1f} (alone "
        f"{mixed['bulk_alone_images_per_s']:.1f}) |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
