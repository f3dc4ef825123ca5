"""Serves a model repository, the OpenAI images API and the web page, until Ctrl-C.

`make web` runs this with the real server and gateway, both on loopback.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from flowturbo.serving.installation import ServerError
from flowturbo.serving.tritonserver import running_server


def main() -> int:
    """Returns the exit status of the gateway, or 1 if the server did not start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--port", type=int, default=8080)
    args = parser.parse_args()
    print(f"starting Triton on {args.repository} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "tritonserver.log"
        try:
            with running_server(args.repository, log_path=log) as address:
                command = [sys.executable, "-m", "flowturbo.gateway", "--service", address.grpc]
                print(f"open http://127.0.0.1:{args.port} in a browser; Ctrl-C stops", flush=True)
                return subprocess.run([*command, "--port", str(args.port)]).returncode
        except ServerError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    sys.exit(main())
