"""Serves a model repository, generates one grid with three schedules, and stops the server.

`make demo` runs this with the real server and client. flowturbo/serve.py keeps a server running;
client/ has the library.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from flowturbo.serving.installation import ServerError
from flowturbo.serving.tritonserver import running_server

SCHEDULES = ("H8", "H1P5R3", "fast")


def main() -> int:
    """Returns the exit status of the client, or 1 if the server did not start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--characters", default="FLOWTURBO2", help="one image per character")
    parser.add_argument("--seed", type=int, default=2024)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output / "tritonserver.log"
    started = time.monotonic()
    print(f"starting Triton on {args.repository} (log: {log}) ...", flush=True)
    try:
        with running_server(args.repository, log_path=log) as address:
            print(f"ready after {time.monotonic() - started:.1f} s, gRPC at {address.grpc}")
            return generate(address.grpc, args.characters, args.seed, args.output)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def generate(url: str, text: str, seed: int, output: Path) -> int:
    """Runs the client's command once for all schedules, so that their rows share seeds."""
    command = [
        sys.executable,
        "-m",
        "flowturbo_client",
        "generate",
        "--url",
        url,
        "--characters",
        text,
    ]
    command += ["--seed", str(seed), "--schedule", *SCHEDULES, "--warmup", "--output", str(output)]
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
