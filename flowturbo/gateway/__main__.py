"""Serves the OpenAI images API and a web page: `python -m flowturbo.gateway`.

It is a client of the image service. On an address that other machines reach it needs API keys.
"""

import argparse
import gc
import ipaddress
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from flowturbo_client import FlowTurboError

from flowturbo.command import integer, positive, run_command
from flowturbo.gateway.app import Gateway, application
from flowturbo.gateway.edge import Bounds
from flowturbo.gateway.filters import Filter
from flowturbo.gateway.heads import BoundedHead, bounded_listener
from flowturbo.gateway.kept import Kept
from flowturbo.gateway.keys import KeyFileError, Keys
from flowturbo.gateway.service import ImageService

_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_GRACE_S = 30


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2, and one line on stderr, for errors that the user can fix."""
    args = options(argv)
    errors = (FlowTurboError, KeyFileError, OSError, ValueError)
    return run_command("gateway", lambda: _run(args), errors)


def options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m flowturbo.gateway", description=__doc__)
    add = parser.add_argument
    add(
        "--service",
        default="localhost:8001",
        metavar="HOST:PORT[,HOST:PORT]",
        help="gRPC endpoint; of several, each takes over if another fails (default: %(default)s)",
    )
    add("--host", default="127.0.0.1", help="default: %(default)s")
    add(
        "--port",
        type=integer(0, 65535),
        default=8080,
        help="0: any free port (default: %(default)s)",
    )
    add("--keys", type=Path, metavar="FILE", help="API keys (python -m flowturbo.gateway.keys)")
    add(
        "--alias",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "PIPELINE"),
        help="another name of a pipeline, such as gpt-image-1",
    )
    add("--filter", metavar="MODULE:FACTORY", help="a content filter (flowturbo.gateway.filters)")
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="default: %(default)s")
    add("--max-requests", type=positive, default=256, help="at a time (default: %(default)s)")
    add("--max-body-mb", type=positive, default=64, help="default: %(default)s")
    add("--kept-mb", type=positive, default=256, help="of images with addresses")
    add("--kept-s", type=positive, default=3600, metavar="SECONDS", help="how long they are kept")
    add("--public-url", metavar="URL", help="of this gateway, where a proxy is before it")
    add("--certificate", type=Path, metavar="FILE", help="PEM, turns TLS on")
    add("--private-key", type=Path, metavar="FILE", help="PEM")
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> None:
    local = args.host in _LOCAL or _is_loopback(args.host)
    if args.keys is None and not local:
        raise ValueError(
            f"--host {args.host} can be reached from other machines: give --keys, or take 127.0.0.1"
        )
    gateway = Gateway(
        ImageService(args.service.split(","), args.timeout, dict(args.alias)),
        Keys(args.keys),
        Kept(args.kept_mb << 20, args.kept_s),
        Filter.load(args.filter) if args.filter else Filter(),
        args.public_url.rstrip("/") if args.public_url else None,
    )
    if (args.certificate is None) != (args.private_key is None):
        raise ValueError("give both --certificate and --private-key, or none")
    public = urlsplit(args.public_url or "")
    # Without keys, a page whose name leads here must not get answers (DNS rebinding).
    own = _LOCAL | {args.host} | ({public.hostname} if public.hostname else set())
    hosts = None if args.keys else frozenset(own)
    size = args.max_body_mb << 20
    bounds = Bounds(size, args.timeout, args.max_requests, hosts, public.netloc or None)
    # Whoever sends nonsense would fill the log with warnings.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    config = uvicorn.Config(
        application(gateway, bounds),
        ssl_certfile=args.certificate,
        ssl_keyfile=args.private_key,
        http=BoundedHead,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
        log_level="error",
    )
    with bounded_listener((args.host, args.port), _family(args.host)) as listener:
        scheme, port = "https" if args.certificate else "http", listener.getsockname()[1]
        gc.freeze()  # garbage collections leave out what the start has made
        print(f"ready: {scheme}://{_shown_host(args.host)}:{port}", flush=True)
        uvicorn.Server(config).run(sockets=[listener])


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]


def _shown_host(host: str) -> str:
    """As in an address: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
