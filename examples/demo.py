"""Serves a model repository, makes grids of pictures, and stops the server.

`make demo` runs this with the real server and client. One grid has a row of glyphs for each of
three schedules. The other has a row of glyph scenes for each of two, with their prompts.
flowturbo/serve.py keeps a server running; client/ has the library.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from flowturbo.serving.installation import ServerError
from flowturbo.serving.tritonserver import running_server

PROMPTS = (
    "a red letter b left of a blue 7 on white",
    "a yellow letter k above a green 4 on black",
    "the h is white and below a red 9, on blue",
    "on green, a purple letter x in the centre",
    "an orange 5 in the middle on a purple background",
    "a blue letter t at the top right on yellow",
    "a black letter r with a white 3 to its right on orange",
    "a green letter y right of a yellow letter e on red",
)


def main() -> int:
    """Returns the exit status of the client, or 1 if the server did not start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--characters", default="FLOWTURBO2", help="one glyph per character")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="one scene per prompt")
    parser.add_argument("--seed", type=int, default=2024)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output / "tritonserver.log"
    started = time.monotonic()
    print(f"starting Triton on {args.repository} (log: {log}) ...", flush=True)
    try:
        with running_server(args.repository, log_path=log) as address:
            print(f"ready after {time.monotonic() - started:.1f} s, gRPC at {address.grpc}")
            glyphs = ["--characters", args.characters, "--schedule", "H8", "H1P5R3", "fast"]
            scenes = ["--prompt", *args.prompts, "--pipeline", "scenes", "--schedule", "H8", "fast"]
            seed = ["--seed", str(args.seed)]
            return generate(address.grpc, *glyphs, *seed, "--output", args.output) or generate(
                address.grpc, *scenes, *seed, "--output", args.output / "scenes"
            )
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def generate(url: str, *options: object) -> int:
    """Runs the client's command once for all schedules, so that their rows share seeds."""
    command = [sys.executable, "-m", "flowturbo_client", "generate", "--url", url, "--warmup"]
    return subprocess.run([*command, *map(str, options)]).returncode


if __name__ == "__main__":
    sys.exit(main())
