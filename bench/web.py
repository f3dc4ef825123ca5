"""A typical web server around PyTorch, for comparison: `python -m bench.web --port 8080`.

FastAPI under uvicorn. `POST /generate` answers raw uint8 images, with their shape in the header
`X-Shape`. So it sends as much as the service's `image` output. `GET /health` answers 200. With
--diffusers it serves diffusers' own pipeline, for prompts.
"""

import argparse
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import urllib3
import uvicorn
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel

from bench.baseline import PRECISIONS, TorchPipeline
from bench.diffusers_baseline import DiffusersPipeline
from flowturbo.errors import FlowTurboError, RequestError

_ROOT = Path(__file__).resolve().parents[1]
_HOST = "127.0.0.1"


class GenerateRequest(BaseModel):
    """One image per label; `seeds` has one entry per label."""

    labels: list[int]
    seeds: list[int]
    schedule: str = "H1P5R3"
    guidance_scale: float = 3.0


class PromptRequest(BaseModel):
    """One image per prompt; `seeds` has one entry per prompt."""

    prompts: list[str]
    seeds: list[int]
    steps: int
    guidance_scale: float


def create_app(pipeline: TorchPipeline) -> FastAPI:
    """The web application around `pipeline`."""
    app = _app()

    # Not `async`: FastAPI runs it in a thread pool, so the server stays responsive.
    @app.post("/generate")
    def generate(request: GenerateRequest) -> Response:
        _check(request, pipeline.num_classes)
        try:
            images = pipeline.generate(
                request.labels, request.seeds, request.schedule, request.guidance_scale
            )
        except RequestError as error:
            raise HTTPException(422, str(error)) from error
        return _response(images)

    return app


def create_prompt_app(pipeline: DiffusersPipeline) -> FastAPI:
    """The web application around diffusers' pipeline."""
    app = _app()

    @app.post("/generate")
    def generate(request: PromptRequest) -> Response:
        if not request.prompts or len(request.prompts) != len(request.seeds):
            raise HTTPException(422, "give one seed per prompt")
        return _response(
            pipeline.generate(request.prompts, request.seeds, request.steps, request.guidance_scale)
        )

    return app


def _app() -> FastAPI:
    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


def _response(images: np.ndarray) -> Response:
    shape = ",".join(map(str, images.shape))
    return Response(images.tobytes(), 200, {"X-Shape": shape}, "application/octet-stream")


def _check(request: GenerateRequest, num_classes: int) -> None:
    labels, seeds = request.labels, request.seeds
    if not labels or len(labels) != len(seeds):
        raise HTTPException(
            422, f"give one seed per label, got {len(labels)} labels and {len(seeds)} seeds"
        )
    for name, values, most in (("labels", labels, num_classes - 1), ("seeds", seeds, 2**63 - 1)):
        bad = [value for value in values if not 0 <= value <= most]
        if bad:
            raise HTTPException(422, f"{name} must be 0 to {most}, got {bad[0]}")


class WebClient:
    """Requests images over persistent connections; threads may share a client."""

    def __init__(self, port: int, timeout_s: float = 600) -> None:
        # Above any measured concurrency: connections beyond `maxsize` are not kept open.
        self._pool = urllib3.HTTPConnectionPool(_HOST, port, timeout=timeout_s, maxsize=256)

    def generate(
        self, labels: Sequence[int], seeds: Sequence[int], schedule: str, guidance_scale: float
    ) -> np.ndarray:
        """Images [n, H, W, 3] uint8. Raises RequestError with the server's reason if it refuses."""
        return self.post(
            labels=list(labels),
            seeds=list(seeds),
            schedule=schedule,
            guidance_scale=guidance_scale,
        )

    def post(self, **wanted: object) -> np.ndarray:
        """As `generate`, of a request with these fields."""
        answer = self._pool.request("POST", "/generate", json=wanted, retries=False)
        if answer.status != 200:
            raise RequestError(f"HTTP {answer.status}: {answer.json()['detail']}")
        shape = [int(size) for size in answer.headers["X-Shape"].split(",")]
        return np.frombuffer(answer.data, dtype=np.uint8).reshape(shape)

    def __enter__(self) -> "WebClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()


@contextlib.contextmanager
def running_web(
    weights: Path,
    threads: int,
    compiled: bool = False,
    precision: str = "fp32",
    *,
    diffusers: bool = False,
) -> Iterator[int]:
    """Runs a server in its own process on a free loopback port; yields the port.

    With `diffusers`, `weights` is a diffusers folder, and the pipeline is diffusers' own. Raises
    FlowTurboError if it exits before it is ready. Its messages go to standard error.
    """
    command = [sys.executable, "-m", "bench.web", "--port", "0", "--threads", str(threads)]
    command += ["--weights", str(weights.resolve()), "--precision", precision]
    command += ["--compiled"] * compiled + ["--diffusers"] * diffusers
    with ready_process(command, "the web server", _ROOT) as (_, said):
        yield int(said.rpartition(":")[2])


@contextlib.contextmanager
def ready_process(
    command: Sequence[str], name: str, folder: Path | None = None
) -> Iterator[tuple[int, str]]:
    """Runs a server until the block ends; yields its process id and the line that it prints first.

    Raises FlowTurboError if it exits before that. Its messages go to standard error.
    """
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        if not said:
            raise FlowTurboError(f"{name} exited with {process.wait()}: {command}")
        yield process.pid, said.strip()
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def main() -> None:
    """Serves until it is interrupted; prints the address once it is ready."""
    parser = argparse.ArgumentParser(prog="python -m bench.web", description=__doc__)
    parser.add_argument("--weights", type=Path, default=Path("weights/glyphs"))
    parser.add_argument("--port", type=int, default=8080, help="0: any free port")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--compiled", action="store_true", help="use torch.compile, before serving")
    parser.add_argument("--diffusers", action="store_true", help="--weights is a diffusers folder")
    args = parser.parse_args()
    if args.diffusers:
        app = create_prompt_app(DiffusersPipeline(args.weights, args.threads, args.precision))
    else:
        pipeline = TorchPipeline(args.weights, args.threads, args.compiled, args.precision)
        pipeline.generate([0], [0], "H1P1R1", 3.0)  # compiles for one guided image
        app = create_app(pipeline)
    config = uvicorn.Config(app, log_level="warning")
    with socket.create_server((_HOST, args.port)) as listener:
        print(f"ready http://{_HOST}:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
