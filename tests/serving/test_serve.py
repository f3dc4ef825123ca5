"""The launcher, on the real server, with models that only pass their input on."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from support import ROOT

from flowturbo.conditions.class_label import ClassLabel
from flowturbo.contract import Role
from flowturbo.pipeline import VERSION, ModelRecord, Pipeline, record_path, record_text
from flowturbo.serve import check_backends, check_repository
from flowturbo.serving.installation import Installation, ServerError, SetupError, find_server
from flowturbo.serving.supervision import STABLE_S, Restarts
from flowturbo.serving.tritonserver import ServerAddress, TritonServer, running_server

CONFIG = """name: "{name}"
backend: "python"
max_batch_size: 0
input [
  {{ name: "x" data_type: TYPE_FP32 dims: [ -1 ] optional: true }},
  {{ name: "label" data_type: TYPE_INT64 dims: [ -1 ] optional: true }}
]
output [
  {{ name: "y" data_type: TYPE_FP32 dims: [ -1 ] }},
  {{ name: "seed" data_type: TYPE_INT64 dims: [ -1 ] }}
]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""
MODEL = """import flowturbo.serving.tritonserver
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        {initialize}

    def execute(self, requests):
        return [pb_utils.InferenceResponse([passed_on(request)]) for request in requests]

def passed_on(request):
    (tensor,) = request.inputs()
    return pb_utils.Tensor(dict(x="y", label="seed")[tensor.name()], tensor.as_numpy())
"""
COMMAND = "python -m export --predictor predictor.pt"
PIPELINE = Pipeline(
    name="sit",
    condition=ClassLabel(10),
    latent_shape=(4, 8, 8),
    models={Role.PREDICTOR: ModelRecord()},
    command=COMMAND,
)
PREDICTOR = PIPELINE.model(Role.PREDICTOR)
START_S = 60
END_S = 30  # more than any machine needs to end a process


def write_repository(folder: Path, initialize: str = "pass") -> Path:
    """The orchestrator and a predictor, with the record of their pipeline."""
    for name in ("flowturbo", PREDICTOR):
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(CONFIG.format(name=name))
        (folder / name / "1" / "model.py").write_text(MODEL.format(initialize=initialize))
    (folder / PREDICTOR / "1" / "model.onnx").touch()
    write_record(folder)
    return folder


def write_record(repository: Path, pipeline: Pipeline = PIPELINE) -> Path:
    record = record_path(repository, pipeline.name)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(record_text(pipeline))
    return record


def processes_with(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def wait_until_gone(text: str, timeout_s: float) -> list[int]:
    deadline_s = time.monotonic() + timeout_s
    while (left := processes_with(text)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return left


@dataclass
class Cli:
    """`python -m flowturbo.serve` as a child process, on free ports."""

    process: subprocess.Popen[str]
    log: Path
    grpc: str = ""
    server_pid: int = 0
    regions: list[Path] = field(default_factory=list)

    @classmethod
    def start(cls, repository: Path, log: Path, *options: str) -> "Cli":
        ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "flowturbo.serve",
                    "--repository",
                    repository,
                    *ports,
                    *options,
                ],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=ROOT,
            )
        return cls(process, log)

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()  # ends with the process, at the latest
        assert line.startswith("ready: gRPC 127.0.0.1:"), self.log.read_text()
        self.grpc = line.split()[2].rstrip(",")
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        self.server_pid = int(children.read_text())
        self.regions = self.shared_memory()

    def shared_memory(self) -> list[Path]:
        return list(Path("/dev/shm").glob(f"flowturbo_{self.process.pid}_*"))

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(START_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_repository(tmp_path / "models")


@pytest.fixture
def cli(repository: Path, tmp_path: Path) -> Iterator[Cli]:
    started = Cli.start(repository, tmp_path / "log")
    yield started
    started.end()


def infer(address: str, x: np.ndarray) -> np.ndarray:
    tensor = grpc.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    with grpc.InferenceServerClient(address) as client:
        return np.asarray(client.infer("flowturbo", [tensor]).as_numpy("y"))


def test_answers_and_sigterm_leaves_nothing(cli: Cli, repository: Path) -> None:
    cli.wait_ready()
    x = np.arange(5, dtype=np.float32)
    np.testing.assert_array_equal(infer(cli.grpc, x), x)
    assert len(cli.regions) == 2
    assert len(processes_with(f"{repository}/")) == 2  # the stubs; the server has no slash there
    cli.process.send_signal(signal.SIGTERM)
    assert cli.process.wait(START_S) == 0, cli.log.read_text()
    assert wait_until_gone(str(repository), END_S) == []
    assert cli.shared_memory() == []
    assert "note: " in cli.log.read_text()
    log = cli.log.read_text()
    assert "note: pipeline sit has no refiner: schedules with R steps are refused" in log
    assert "note: pipeline sit has no decoder: only latents are served" in log


def test_ctrl_c_during_the_start_is_a_clean_stop(tmp_path: Path) -> None:
    slow = write_repository(tmp_path / "models", initialize="import time; time.sleep(60)")
    cli = Cli.start(slow, tmp_path / "log")
    try:
        deadline_s = time.monotonic() + START_S
        while len(processes_with(f"{slow}/")) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        cli.process.send_signal(signal.SIGINT)
        assert cli.process.wait(START_S) == 0, cli.log.read_text()
        assert wait_until_gone(str(slow), END_S) == []
        assert cli.shared_memory() == []
    finally:
        cli.end()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", ["tritonserver", PREDICTOR, "flowturbo"])
def test_what_dies_or_hangs_is_started_again(
    repository: Path, tmp_path: Path, victim: str, number: signal.Signals
) -> None:
    """On the same ports; nothing of the dead server is left."""
    cli = Cli.start(repository, tmp_path / "log")
    try:
        cli.wait_ready()
        address, server, regions = cli.grpc, cli.server_pid, cli.regions
        pid = server if victim == "tritonserver" else stub_of(repository / victim)
        os.kill(pid, number)
        cli.wait_ready()
        assert cli.grpc == address and cli.server_pid != server
        x = np.arange(5, dtype=np.float32)
        np.testing.assert_array_equal(infer(cli.grpc, x), x)
        assert not set(regions) & set(cli.shared_memory())
        told = {signal.SIGKILL: "died", signal.SIGSTOP: "was stopped by a signal"}[number]
        expected = f"error: the process of {victim} {told} ({pid}): starting again in "
        if (victim, number) == ("tritonserver", signal.SIGKILL):
            expected = "error: tritonserver was killed by SIGKILL: starting again in "
        assert expected in cli.log.read_text()
        cli.process.send_signal(signal.SIGTERM)
        assert cli.process.wait(START_S) == 0, cli.log.read_text()
        assert wait_until_gone(str(repository), END_S) == []
        assert cli.shared_memory() == []
    finally:
        cli.end()


def test_a_server_that_dies_again_and_again_is_given_up(repository: Path, tmp_path: Path) -> None:
    cli = Cli.start(repository, tmp_path / "log", "--restarts=1")
    try:
        for _ in range(2):
            cli.wait_ready()
            os.kill(cli.server_pid, signal.SIGKILL)
        assert cli.process.wait(START_S) == 1
        assert cli.log.read_text().splitlines()[-1] == (
            "error: tritonserver was killed by SIGKILL: given up after 2 quick deaths in a row"
        )
        assert wait_until_gone(str(repository), END_S) == []
        assert cli.shared_memory() == []
    finally:
        cli.end()


def test_without_restarts_a_server_that_dies_is_an_error(repository: Path, tmp_path: Path) -> None:
    cli = Cli.start(repository, tmp_path / "log", "--restarts=0")
    try:
        cli.wait_ready()
        os.kill(stub_of(repository / PREDICTOR), signal.SIGKILL)
        assert cli.process.wait(START_S) == 1
        last = cli.log.read_text().splitlines()[-1]
        assert f"the process of {PREDICTOR} died" in last
        assert last.endswith("it is no longer serving")
    finally:
        cli.end()


def test_restarts_come_later_and_end() -> None:
    now_s = 0.0
    restarts = Restarts(4, clock_s=lambda: now_s, uniform=lambda low, high: high)
    delays = []
    for _ in range(4):
        restarts.started()
        delays.append(restarts.delay_s())
    assert delays == [0.25, 0.5, 1.0, 2.0]
    restarts.started()
    assert restarts.delay_s() is None
    now_s += STABLE_S  # that one had run for long
    assert restarts.delay_s() == 0.25


def stub_of(model: Path) -> int:
    return next(pid for pid in processes_with(f"{model}/") if is_stub(pid))


def is_stub(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().startswith("triton_python_b")


def test_the_server_ends_with_a_killed_launcher(cli: Cli, repository: Path) -> None:
    cli.wait_ready()
    cli.process.kill()
    cli.process.wait()
    assert wait_until_gone(str(repository), END_S) == []


def test_a_check_alone_starts_nothing(tmp_path: Path) -> None:
    repository = write_repository(tmp_path / "models")
    done = run_cli("--check", "--repository", repository)
    assert (done.returncode, done.stdout) == (0, f"{repository} can be served here\n")
    (repository / PREDICTOR / "1" / "model.onnx").unlink()
    done = run_cli("--check", "--repository", repository)
    assert done.returncode == 2 and f"{PREDICTOR}/1/ has none of" in done.stderr


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([503, 499, 200], None),  # others had every place, or the check took longer than a request
        ([503, 500], "the first request failed: x_next is off"),
    ],
)
def test_the_first_request_is_asked_again(
    tmp_path: Path, answers: list[int], said: str | None
) -> None:
    asked: list[Any] = []

    class Front(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(answers.pop(0))
            self.end_headers()
            self.wfile.write(b'{"error": "x_next is off"}')

        def log_message(self, *_: object) -> None: ...

    write_record(tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), Front) as front:
        threading.Thread(target=front.serve_forever, daemon=True).start()
        server = TritonServer.__new__(TritonServer)
        server.address = ServerAddress("", f"127.0.0.1:{front.server_port}", "")
        server._repository = tmp_path
        server._process = SimpleNamespace(poll=lambda: None)  # type: ignore[assignment]
        if said:
            with pytest.raises(ServerError, match=said):
                server._check_answers(math.inf, lambda: False)
        else:
            assert server._check_answers(math.inf, lambda: False)
            assert not server._check_answers(math.inf, lambda: True)
        front.shutdown()
    assert answers == []
    # Of the pipeline's own kind, and for nothing that costs an evaluation.
    label = {"name": "label", "datatype": "INT64", "shape": [1], "data": [0]}
    assert all(each == {"inputs": [label], "outputs": [{"name": "seed"}]} for each in asked)


def test_a_binary_that_is_none_must_be_put_right(tmp_path: Path) -> None:
    repository = write_repository(tmp_path / "models")
    binary = tmp_path / "tritonserver"
    binary.write_text("#!/nowhere/interpreter\n")
    binary.chmod(0o755)
    ports = (f"--{name}-port=0" for name in ("http", "grpc", "metrics"))
    done = run_cli("--repository", repository, "--tritonserver", binary, *ports)
    assert done.returncode == 2
    assert f"cannot run {binary}: " in done.stderr
    assert (
        done.stderr.splitlines()[-1] == "error: tritonserver cannot be run: see the message above"
    )


def test_a_model_that_fails_to_load_is_an_error(tmp_path: Path) -> None:
    repository = write_repository(tmp_path / "models", initialize="raise ValueError('no weights')")
    cli = Cli.start(repository, tmp_path / "log")
    try:
        assert cli.process.wait(START_S) == 1
    finally:
        cli.end()
    log = cli.log.read_text()
    assert "no weights" in log
    assert log.splitlines()[-1] == "error: tritonserver exited with 1 before it was ready"
    assert cli.shared_memory() == []


def test_context_manager_serves_and_reports_the_log_of_a_failure(tmp_path: Path) -> None:
    good = write_repository(tmp_path / "good")
    log_path = tmp_path / "log"
    with running_server(good, log_path=log_path, extra_args=["--log-info=true"]) as address:
        x = np.ones(3, np.float32)
        np.testing.assert_array_equal(infer(address.grpc, x), x)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{address.metrics}/metrics") as response:
            assert b"nv_inference_request_success" in response.read()
    assert "Started GRPCInferenceService" in log_path.read_text()
    assert wait_until_gone(str(good), END_S) == []

    bad = write_repository(tmp_path / "bad", initialize="raise ValueError('no weights')")
    with pytest.raises(ServerError, match="no weights"), running_server(bad):
        pytest.fail("must not become ready")


def run_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flowturbo.serve", *map(str, arguments)]
    root = ROOT
    return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=START_S)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("", "no model repository at "),
        ("flowturbo", "lacks flowturbo/config.pbtxt"),
        ("flowturbo/1/pipelines", "has no pipeline: export one with `python -m export --name"),
        (PREDICTOR, "pipeline sit in .* is not complete:\n  sit_velocity_predictor/ is missing\n"),
        (f"{PREDICTOR}/config.pbtxt", "sit_velocity_predictor/config.pbtxt is missing"),
        (f"{PREDICTOR}/1", "sit_velocity_predictor/1/ has none of model.plan, model.onnx"),
    ],
)
def test_an_incomplete_repository_is_refused(repository: Path, missing: str, message: str) -> None:
    (repository / missing).rename(repository.parent / "away")
    with pytest.raises(SetupError, match=message):
        check_repository(repository)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"models": PIPELINE.models | {Role.DECODER: ModelRecord()}}, "sit_vae_decoder"),
        ({"ensembles": {"H1": "sit_h1"}}, "sit_h1"),
        ({"parts": ("sit_finisher",)}, "sit_finisher"),
    ],
    ids=["decoder", "ensemble", "finisher"],
)
def test_whatever_the_record_names_must_be_there(
    repository: Path, changes: dict[str, Any], missing: str
) -> None:
    """Optional models too; a folder that no record names is none of the pipeline's."""
    (repository / "else").mkdir()
    check_repository(repository)
    write_record(repository, replace(PIPELINE, **changes))
    with pytest.raises(SetupError, match=f"{missing}/ is missing"):
        check_repository(repository)
    (repository / missing).mkdir()
    with pytest.raises(SetupError, match=f"{missing}/config.pbtxt is missing"):
        check_repository(repository)


def test_an_incomplete_repository_exits_2_and_names_the_command(repository: Path) -> None:
    (repository / PREDICTOR / "1" / "model.onnx").unlink()
    result = run_cli("--repository", repository)
    assert result.returncode == 2
    assert f"Export it again with: {COMMAND}\n" in result.stderr
    assert "Traceback" not in result.stderr
    record_path(repository, "sit").unlink()
    result = run_cli("--repository", repository)
    assert result.returncode == 2
    assert "python -m export --name NAME --predictor FILE" in result.stderr
    assert f"--repository {repository}" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("now", "then", "said"),
    [
        (
            f'"version": {VERSION},',
            '"version": 0,',
            f"is a record of version 0, this release reads {VERSION}",
        ),
        (f'"version": {VERSION},', "", "is a record of version None"),
        ('"predictor"', '"corrector"', "is no record of a pipeline .*corrector"),
        (
            '"class_label"',
            '"melody"',
            "condition 'melody' is unknown, known are class_label, prompt",
        ),
    ],
)
def test_a_record_that_cannot_be_served_exits_2_and_names_the_command(
    repository: Path, now: str, then: str, said: str
) -> None:
    record = record_path(repository, "sit")
    assert record.read_text().count(now) == 1
    record.write_text(record.read_text().replace(now, then))
    with pytest.raises(SetupError, match=said) as caught:
        check_repository(repository)
    assert str(record) in str(caught.value)
    assert f"again with: {COMMAND}" in str(caught.value)
    result = run_cli("--repository", repository)
    assert (result.returncode, result.stderr) == (2, f"error: {caught.value}\n")


def test_half_a_record_is_refused(repository: Path) -> None:
    record = record_path(repository, "sit")
    record.write_text(record.read_text()[:100])
    with pytest.raises(SetupError, match="sit.json is not JSON: .*: export the pipeline again"):
        check_repository(repository)


def test_which_pipeline_is_the_default_must_be_clear(repository: Path) -> None:
    """With one pipeline alone it is that one."""
    config = repository / "flowturbo" / "config.pbtxt"
    text = config.read_text()

    def default(name: str) -> None:
        parameter = 'parameters { key: "default_pipeline" value: { string_value: "%s" } }'
        config.write_text(f"{text}\n{parameter % name}\n")

    check_repository(repository)
    default("sid")
    with pytest.raises(SetupError, match="default_pipeline 'sid' is not installed; .*: sit$"):
        check_repository(repository)
    other = replace(PIPELINE, name="other")
    (repository / PREDICTOR).rename(repository / other.model(Role.PREDICTOR))
    (repository / PREDICTOR).symlink_to(other.model(Role.PREDICTOR))
    write_record(repository, other)
    config.write_text(text)
    with pytest.raises(SetupError, match="default_pipeline must name one of other, sit: it is not"):
        check_repository(repository)
    default("sit")
    pipelines, _ = check_repository(repository)
    assert [pipeline.name for pipeline in pipelines] == ["other", "sit"]


def test_a_model_for_another_backend_is_refused(repository: Path) -> None:
    server = Installation(Path("/opt/tritonserver/bin/tritonserver"))
    wheel = Installation(Path("tritonserver"), backends=Path("backends"))
    for installation in (server, wheel):
        check_backends(repository, [PIPELINE], installation)
    models = {Role.PREDICTOR: ModelRecord(engine="tensorrt", on_gpu=True)}
    other = replace(PIPELINE, name="other", models=models)
    check_backends(repository, [PIPELINE, other], server)
    with pytest.raises(SetupError, match="other_velocity_predictor .*only the Python backend"):
        check_backends(repository, [PIPELINE, other], wheel)
    models = {Role.PREDICTOR: ModelRecord(runtime="nowhere")}
    with pytest.raises(SetupError, match="nowhere, which is not installed: pip install nowhere"):
        check_backends(repository, [replace(PIPELINE, models=models)], wheel)


def test_a_port_in_use_is_named_before_the_start(repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_cli("--repository", repository, "--http-port=0", "--grpc-port", port)
    assert result.returncode == 2
    assert f"--grpc-port {port}: cannot listen on 127.0.0.1:{port}" in result.stderr
    assert "tritonserver.cc" not in result.stderr
    result = run_cli("--repository", repository, f"--http-port={port}", f"--grpc-port={port}")
    assert result.returncode == 2
    assert f"--http-port {port}" in result.stderr
    assert run_cli("--http-port", 65536).returncode == 2


def test_a_path_that_the_stub_cannot_take_is_refused(tmp_path: Path) -> None:
    repository = write_repository(tmp_path / "my models")
    result = run_cli("--repository", repository, *(f"--{n}-port=0" for n in ("http", "grpc")))
    assert result.returncode == 2
    assert "has a ' ' in its path" in result.stderr


def test_no_server_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="not an executable file"):
        find_server(tmp_path / "tritonserver")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match="pip install nvidia-pytriton"):
        find_server()


def test_a_server_on_the_path_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    binary = tmp_path / "tritonserver"
    binary.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server() == Installation(binary)


def test_a_damaged_backend_folder_is_built_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backends = find_server().backends
    assert backends is not None
    stub = backends / "python" / "triton_python_backend_stub"
    size = stub.stat().st_size
    stub.write_bytes(b"half")
    assert find_server().backends == backends
    assert stub.stat().st_size == size
    left = sorted(p.name for p in (tmp_path / "flowturbo").iterdir())
    assert left[1:] == [backends.name] and left[0].startswith("server_guard-")


def test_a_guard_behind_a_link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a home folder often is one."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "link"))
    found = find_server()
    assert str(tmp_path / "link") in found.environment["LD_PRELOAD"] and found.notes == ()


@pytest.mark.parametrize("content", [b"", b"\x7fELF half"])
def test_a_damaged_guard_is_built_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    """The dynamic linker would pass over it, and the server be without."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    guard = Path(find_server().environment["LD_PRELOAD"])
    whole = guard.read_bytes()
    guard.write_bytes(content)
    found = find_server()
    assert found.environment["LD_PRELOAD"] == str(guard) and found.notes == ()
    assert len(guard.read_bytes()) == len(whole)


def test_a_cache_that_cannot_be_preloaded_from_is_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a:b"))
    found = find_server()
    assert "LD_PRELOAD" not in found.environment
    (note,) = found.notes
    assert "has a ':' in its path" in note


def test_without_a_compiler_the_danger_is_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And with one that fails."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_server()
    assert "LD_PRELOAD" not in found.environment
    (note,) = found.notes
    assert "classification of a BYTES output" in note and "no C compiler was found" in note
    (tmp_path / "cc").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "cc").chmod(0o755)
    (note,) = find_server().notes
    assert "returned non-zero exit status 3" in note
    monkeypatch.undo()
    monkeypatch.setenv("LD_PRELOAD", "libother.so")
    found = find_server()
    guard, other = found.environment["LD_PRELOAD"].split(":")
    assert Path(guard).is_file() and other == "libother.so"
    assert found.notes == ()


def test_a_python_without_a_stub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowturbo.serving.installation._PYTHON", "3.99")
    with pytest.raises(SetupError, match="3.99 models: it has stubs for 3.8, .*3.11"):
        find_server()
