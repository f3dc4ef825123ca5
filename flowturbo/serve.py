"""Serves a model repository: `python -m flowturbo.serve`. Exit codes: see `main`."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from flowturbo.command import integer
from flowturbo.contract import ORCHESTRATOR, Role
from flowturbo.errors import RepositoryError
from flowturbo.pipeline import (
    EXPORT_HINT,
    Pipeline,
    default_name,
    installed,
    read_pipelines,
)
from flowturbo.runtimes import RUNTIMES
from flowturbo.serving.engines import check_gpus, tensorrt_version
from flowturbo.serving.installation import Installation, ServerError, SetupError, find_server
from flowturbo.serving.supervision import Restarts, Watch
from flowturbo.serving.tritonserver import ServerOptions, TritonServer
from flowturbo.settings import Settings, orchestrator_config

_OPTIONAL = {  # optional roles, and what is lost without them
    Role.REFINER: "schedules with R steps are refused",
    Role.DECODER: "only latents are served, no images",
    Role.ENCODER: "requests with an image are refused",
}
_MODEL_FILES = ("model.plan", "model.onnx", "model.pt2")
_STDERR = 2
_RESTARTS = 5
_POLL_S = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C or SIGTERM.

    Returns 0 after a requested stop, 1 if the server failed, 2 if the user must fix something
    before the server can start.
    """
    options, most_restarts, check_alone = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        pipelines, notes = check_repository(options.repository)
        _note(notes)
        installation = find_server(options.tritonserver)
        _note(installation.notes)
        check_backends(options.repository, pipelines, installation)
        _note(check_gpus(pipelines, tensorrt_version()))
        if check_alone:
            print(f"{options.repository} can be served here", flush=True)
        else:
            _serve(options, installation, most_restarts)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, SetupError) else 1
    return 0


def _note(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)


def check_repository(repository: Path) -> tuple[list[Pipeline], list[str]]:
    """The pipelines in `repository`, and notes on missing roles. Raises SetupError."""
    if not repository.is_dir():
        raise SetupError(
            f"no model repository at {repository}: give the model_repository folder of the source "
            "tree with --repository"
        )
    if not orchestrator_config(repository).is_file():
        raise SetupError(
            f"{repository} lacks {ORCHESTRATOR}/config.pbtxt: not a repository of "
            "FlowTurbo. Give the model_repository folder of the source tree with --repository "
            "(`git checkout -- model_repository` restores it)"
        )
    if not installed(repository):
        raise SetupError(
            f"{repository} has no pipeline: export one with `{EXPORT_HINT} --repository "
            f"{repository}` (the glyphs model: `make export`)."
        )
    try:
        pipelines, settings = read_pipelines(repository), Settings.load(repository)
        default_name(pipelines, settings)
        for pipeline in pipelines.values():
            pipeline.default_schedule(settings)
    except RepositoryError as error:
        raise SetupError(str(error)) from error
    for pipeline in pipelines.values():
        if problems := list(_problems(repository, pipeline)):
            raise SetupError(
                f"pipeline {pipeline.name} in {repository} is not complete:\n"
                + "".join(f"  {problem}\n" for problem in problems)
                + f"Export it again with: {pipeline.command or EXPORT_HINT}"
            )
    notes = [
        f"pipeline {pipeline.name} has no {role}: {loss}"
        for pipeline in pipelines.values()
        for role, loss in _OPTIONAL.items()
        if not pipeline.has(role)
    ]
    return list(pipelines.values()), notes


def _problems(repository: Path, pipeline: Pipeline) -> Iterator[str]:
    composed = [pipeline.model(role) for role in pipeline.models]
    for name in pipeline.folders:
        model = repository / name
        if not model.is_dir():
            yield f"{name}/ is missing"
            continue
        if not (model / "config.pbtxt").is_file():
            yield f"{name}/config.pbtxt is missing"
        if name in composed and not any((model / "1" / f).is_file() for f in _MODEL_FILES):
            yield f"{name}/1/ has none of {', '.join(_MODEL_FILES)}"


def check_backends(
    repository: Path, pipelines: Iterable[Pipeline], installation: Installation
) -> None:
    """Raises SetupError if this server cannot load a model."""
    for pipeline in pipelines:
        for role, record in pipeline.models.items():
            name, runtime = pipeline.model(role), record.runtime
            embedded = record.engine == "python"
            if embedded and importlib.util.find_spec(RUNTIMES.get(runtime, runtime)) is None:
                raise SetupError(
                    f"{name} was exported for the Python backend with {runtime}, which is not "
                    f"installed: pip install {RUNTIMES.get(runtime, runtime)}, or export again"
                )
            if runtime == "torch" and record.on_gpu and _is_for_cpus():
                raise SetupError(
                    f"{name} was exported for PyTorch on a GPU, but the PyTorch here is a build "
                    "for CPUs: install one for GPUs (in Docker, TORCH_BUILD=cu130 in .env and "
                    "docker compose --profile torch build), or export with --provider cpu"
                )
            if installation.backends is not None and not embedded:
                raise SetupError(
                    f"{name} was exported for a server with TensorRT or ONNX Runtime, but the one "
                    "in the nvidia-pytriton wheel has only the Python backend: export it again for "
                    "the Python backend, or name another server with --tritonserver"
                )


def _is_for_cpus() -> bool:
    return importlib.metadata.version("torch").endswith("+cpu")


class _Signals:
    """Counts stop signals: Ctrl-C or SIGTERM."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._received)

    def _received(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1


def _serve(options: ServerOptions, installation: Installation, most_restarts: int) -> None:
    """Runs a server, and another one on the same ports whenever it has died."""
    signals, restarts = _Signals(), Restarts(most_restarts)
    was_ready = False
    while not signals.count:
        restarts.started()
        try:
            server = TritonServer(options, installation, _STDERR)
            options = options.at(server.address)
            fault = _run(server, signals)
            was_ready = True
        except ServerError as error:
            if not was_ready:  # the first start: nothing that another could mend
                raise
            fault = str(error)
        if signals.count:
            return
        delay_s = restarts.delay_s()
        if delay_s is None:
            quick = f"given up after {most_restarts + 1} quick deaths in a row"
            raise ServerError(f"{fault}: {quick if most_restarts else 'it is no longer serving'}")
        print(f"error: {fault}: starting again in {delay_s:.1f} s", file=sys.stderr, flush=True)
        until = time.monotonic() + delay_s
        while time.monotonic() < until and not signals.count:
            time.sleep(_POLL_S)


def _run(server: TritonServer, signals: _Signals) -> str:
    """Waits until the server is ready, and then until it dies or a signal comes.

    Returns why it died. Afterwards nothing of it is left. Raises ServerError if it is never ready,
    or does not end by itself after a signal.
    """
    fault = ""
    try:
        if server.wait_ready(give_up=lambda: signals.count > 0):
            watch, at = Watch(server), server.address
            print(f"ready: gRPC {at.grpc}, HTTP {at.http}, metrics {at.metrics}", flush=True)
            while not signals.count and not (fault := watch.fault() or ""):
                time.sleep(_POLL_S)
        if signals.count and not server.stop(hurry=lambda: signals.count > 1):
            raise ServerError(f"tritonserver did not stop cleanly: it {server.ending}")
    finally:
        server.kill()  # after a fault nobody waits: requests may never end
    return fault


def _parse(argv: list[str]) -> tuple[ServerOptions, int, bool]:
    """The server's options, how often to start it again, and whether to check only."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = _parser()
    values = vars(parser.parse_args(argv[:cut]))
    check_alone, most_restarts = values.pop("check"), values.pop("restarts")
    options = ServerOptions(**values, extra_args=tuple(argv[cut + 1 :]))
    return options, most_restarts, check_alone


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flowturbo.serve",
        description="Serve a model repository with Triton, by default on loopback only.",
        epilog="Flags after `--` go to tritonserver unchanged; paths in them must be absolute.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = ServerOptions(Path("model_repository"))
    add = parser.add_argument
    add("--repository", type=Path, default=default.repository, help="the model repository")
    add("--host", default=default.host, help="IPv4 address to listen on")
    for name in ("http", "grpc", "metrics"):
        value = getattr(default, f"{name}_port")
        add(f"--{name}-port", type=integer(0, 65535), default=value, help="0 picks a free one")
    add(
        "--thread-pool-size",
        type=integer(1, 65535),
        default=default.thread_pool_size,
        help="concurrent calls between models, per model; must exceed the in-flight requests",
    )
    add(
        "--shm-mb",
        type=integer(1, 2**20),
        default=default.shm_mb,
        help="initial shared memory per Python model instance, in MiB; it grows when needed",
    )
    add(
        "--exit-timeout-s",
        type=integer(0, 86400),
        default=default.exit_timeout_s,
        help="seconds to let in-flight requests finish when the server stops",
    )
    add(
        "--restarts",
        type=integer(0, 1000),
        default=_RESTARTS,
        help="give up after so many restarts, each within 10 s of the one before; 0: never "
        "start again",
    )
    add("--check", action="store_true", help="check whether the repository can be served, and exit")
    add("--log-verbose", type=integer(0, 99), default=default.log_verbose, help="0 is off")
    add(
        "--tritonserver",
        type=Path,
        metavar="PATH",
        help="server binary; by default the one on PATH, else that of the nvidia-pytriton wheel",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
