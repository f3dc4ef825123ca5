"""The command `flowturbo-client`: generate and edit images in files, or ask for health."""

import argparse
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from .client import FlowTurboClient
from .errors import FlowTurboError, InvalidRequestError
from .gallery import Row, generate_row, row_of, write_grid, write_row
from .manifest import Wanted, generate_file, read_prompts
from .verb_commands import REPLAY_HELP, VERBS, add_replay, add_verb, positive
from .watch import watch, write_animation


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 on failure, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        with _client(args) as client:
            return int(args.run(client, args))
    except (FlowTurboError, OSError) as error:
        # A server's message may have several lines.
        print(f"flowturbo-client: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("flowturbo-client: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowturbo-client", description="Generate images with a FlowTurbo server."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _generate_parser(commands.add_parser("generate", help="write images and a labelled grid"))
    for name, verb in VERBS.items():
        add_verb(commands.add_parser(name, help=verb.help), verb, _server_options)
    add_replay(commands.add_parser("replay", help=REPLAY_HELP), _server_options)
    pipelines = commands.add_parser("pipelines", help="show the pipelines of the server")
    _server_options(pipelines, default_timeout_s=5.0)
    pipelines.set_defaults(run=_pipelines)
    health = commands.add_parser("health", help="show the server's state; exit 0 when ready")
    _server_options(health, default_timeout_s=5.0)
    health.set_defaults(run=_health)
    return parser


def _generate_parser(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--labels", nargs="+", metavar="NAME", help="class names, one image each")
    what.add_argument("--ids", nargs="+", type=int, metavar="ID", help="class ids, one image each")
    what.add_argument("--characters", type=_text, help="one image per character, its class name")
    what.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts, one image each")
    what.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a text per line: writes pictures and manifest.jsonl, and goes on where it stopped",
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument("--size", metavar="WIDTHxHEIGHT", help="in pixels (default: the server's)")
    parser.add_argument(
        "--count",
        type=positive,
        default=1,
        metavar="N",
        help="images per class or prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--pipeline", metavar="NAME", help="a pipeline of the server (default: the server's)"
    )
    parser.add_argument(
        "--schedule",
        nargs="+",
        action="extend",
        metavar="H1P5R3",
        help="schedules, or presets such as fast; the grid has one row per schedule "
        "(default: the server's)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="image i has seed N + i (default: a random choice; 0 with --prompts)",
    )
    parser.add_argument("--guidance-scale", type=float, metavar="S", help="1.0 is unguided")
    parser.add_argument(
        "--output", type=Path, default=Path("images"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--strip-metadata", action="store_true", help="do not write into files how they were made"
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=8,
        metavar="N",
        help="maximum images per request (default: %(default)s)",
    )
    parser.add_argument(
        "--warmup",
        action="store_true",
        help="first send one request per schedule; its latency does not count",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="show the images as they form, and write forming.webp; one request, one schedule",
    )
    _server_options(parser, default_timeout_s=60.0)
    parser.set_defaults(run=_generate)


def _server_options(parser: argparse.ArgumentParser, default_timeout_s: float) -> None:
    parser.add_argument(
        "--url",
        default="localhost:8001",
        metavar="HOST:PORT[,HOST:PORT]",
        help="gRPC endpoint; of several, each takes over if another fails (default: %(default)s)",
    )
    parser.add_argument("--model", default="flowturbo", help="default: %(default)s")
    parser.add_argument(
        "--timeout",
        type=float,
        default=default_timeout_s,
        metavar="SECONDS",
        help="per request (default: %(default)s)",
    )
    parser.add_argument("--tls", action="store_true", help="encrypt, trusting the system's CAs")
    parser.add_argument("--ca", type=Path, metavar="FILE", help="encrypt, trusting these PEM CAs")


def _client(args: argparse.Namespace) -> FlowTurboClient:
    credentials = None
    if args.tls or args.ca:
        credentials = grpc.ssl_channel_credentials(args.ca.read_bytes() if args.ca else None)
    return FlowTurboClient(
        args.url.split(","), model=args.model, timeout_s=args.timeout, credentials=credentials
    )


def _generate(client: FlowTurboClient, args: argparse.Namespace) -> int:
    if args.prompts:
        return _from_file(client, args)
    named = args.labels or args.ids or args.prompt or list(args.characters)
    labels = [each for each in named for _ in range(args.count)]
    schedules = list(dict.fromkeys(args.schedule or [None]))
    if args.watch:
        return _watch(client, args, labels, schedules)
    base_seed = args.seed
    if base_seed is None and len(schedules) > 1:
        # Rows can be compared only if they start from the same noise.
        base_seed = secrets.randbelow(2**31)
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for schedule in schedules:
        rows.append(_row(client, args, labels, schedule, base_seed))
        for path in write_row(rows[-1], args.output):
            print(path)
    print(write_grid(rows, args.output))
    return 0


def _watch(
    client: FlowTurboClient,
    args: argparse.Namespace,
    labels: Sequence[int] | Sequence[str],
    schedules: Sequence[str | None],
) -> int:
    if len(schedules) > 1 or len(labels) > args.batch or args.warmup:
        raise InvalidRequestError(
            f"--watch takes one schedule, at most --batch {args.batch} images and no --warmup"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    seeds = None if args.seed is None else [args.seed + k for k in range(len(labels))]
    what: dict[str, Any] = {"prompts" if args.prompt else "labels": labels, **_options(args)}
    scale = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    updates = client.stream(
        **what, **scale, seeds=seeds, schedule=schedules[0], output_format="png"
    )
    generation, frames = watch(updates, sys.stderr)
    row = row_of(generation, labels, schedules[0])
    for path in (*write_row(row, args.output), write_grid([row], args.output)):
        print(path)
    print(write_animation(frames, args.output))
    return 0


def _row(
    client: FlowTurboClient,
    args: argparse.Namespace,
    labels: Sequence[int] | Sequence[str],
    schedule: str | None,
    base_seed: int | None,
) -> Row:
    options: dict[str, Any] = {
        "of_prompts": bool(args.prompt),
        "guidance_scale": args.guidance_scale,
        **_options(args),
    }
    if args.warmup:
        batch = labels[: args.batch]
        generate_row(
            client,
            batch,
            schedule,
            base_seed=None,
            batch=args.batch,
            progress=lambda line: None,
            **options,
        )
    return generate_row(
        client,
        labels,
        schedule,
        base_seed=base_seed,
        batch=args.batch,
        progress=_tell,
        **options,
    )


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a generation that are the same in all its requests."""
    found = {
        "pipeline": args.pipeline,
        "negative_prompts": args.negative_prompt,
        "size": args.size,
        "strip_metadata": args.strip_metadata or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _from_file(client: FlowTurboClient, args: argparse.Namespace) -> int:
    if args.schedule and len(args.schedule) > 1:
        raise InvalidRequestError("--prompts takes one schedule")
    if args.warmup or args.watch:
        raise InvalidRequestError("--warmup and --watch do not go with --prompts")
    texts = read_prompts(args.prompts)
    options = {"schedule": (args.schedule or [None])[0], "guidance_scale": args.guidance_scale}
    wanted = [
        Wanted(k, text, (args.seed or 0) + k)
        for k, text in enumerate(text for text in texts for _ in range(args.count))
    ]
    made = generate_file(
        client, wanted, args.output, args.batch, _tell, **options, **_options(args)
    )
    print(f"{made} of {len(wanted)} images made, {len(wanted) - made} were there: {args.output}")
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _pipelines(client: FlowTurboClient, args: argparse.Namespace) -> int:
    for each in client.pipelines(timeout_s=args.timeout):
        condition, size = each["condition"], each["size"]
        presets = ", ".join(f"{name} {text}" for name, text in each["presets"].items())
        # Either names or ids of classes; a negative prompt beside the prompt.
        takes = (" or " if condition["kind"] == "class_label" else ", ").join(condition["takes"])
        table = {
            "condition": f"{condition['kind']}, takes {takes}",
            "size": f"{size[1]}x{size[0]}" if size else "latents only",
            "schedules": f"{presets}; or steps such as {each['default_schedule']}",
            "defaults": f"{each['default_schedule']}, guidance {each['default_guidance_scale']:g}",
        }
        sizes = each.get("sizes") or []
        if len(sizes) > 1:
            table["size"] = ", ".join(f"{wide}x{high}" for high, wide in sizes)
        if names := condition.get("class_names"):
            table["classes"] = ", ".join(names)
        elif "num_classes" in condition:
            table["classes"] = f"0 to {condition['num_classes'] - 1}"
        table["images"] = "edits, inpaints and inverts" if each.get("edits") else "takes none"
        print(each["name"])
        for name, value in table.items():
            print(f"  {name:<10}{value}")
    return 0


def _health(client: FlowTurboClient, args: argparse.Namespace) -> int:
    health = client.health(timeout_s=args.timeout)
    table = {
        "server": f"{health.url} (Triton {health.server_version})",
        "live": _yes(health.live),
        "ready": _yes(health.ready),
        "model": f"{health.model}: {'ready' if health.model_ready else 'not ready'}",
        "inputs": ", ".join(health.inputs) or "unknown",
    }
    for name, value in table.items():
        print(f"{name:<8}{value}")
    return 0 if health.can_generate else 1


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected at least one character")
    return text
