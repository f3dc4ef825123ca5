"""The service on a real Triton server: independence, batching, errors, deadlines, cancellation."""

import base64
import json
import random
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from flowturbo_client import (
    DeadlineExceededError,
    FlowTurboClient,
    InvalidRequestError,
    ServerBusyError,
)
from support import GLYPHS, Caller, post
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from flowturbo import LocalPipeline
from flowturbo.conditions import REQUEST_OUTPUTS
from flowturbo.conditions.prompt import TRUNCATED
from flowturbo.contract import LABEL_ROLES, ORCHESTRATOR, Role, model_name
from flowturbo.generate import program_of
from flowturbo.request import parse_request
from flowturbo.serving.tritonserver import ServerAddress, running_server
from flowturbo.solver.calls import Variant

ReadMetrics = Callable[..., dict[str, float]]
# As much as one request may ask for: 250 steps of 128 rows. No test waits for its end.
LONG = {"schedule": "E250", "labels": [0] * 64}
LONG_STEP_ROWS, LONG_ROWS = 128, 250 * 128
PREDICTED = 'nv_inference_count{model="glyphs_velocity_predictor",version="1"}'
IN_FLIGHT = 'flowturbo_requests_in_flight{pipeline="glyphs"}'


@pytest.fixture
def client(glyphs_server: ServerAddress) -> Iterator[FlowTurboClient]:
    with FlowTurboClient(glyphs_server.grpc) as connected:
        yield connected


def outcome(name: str, pipeline: str = "glyphs") -> str:
    return f'flowturbo_requests_total{{outcome="{name}",pipeline="{pipeline}"}}'


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def rests(metrics: Callable[[], dict[str, float]]) -> float:
    """Waits until the call under way has ended; asserts that none follows; the rows so far."""
    wait_until(lambda: metrics()[IN_FLIGHT] == 0)
    rows = metrics()[PREDICTED]
    time.sleep(0.5)
    assert metrics()[PREDICTED] == rows
    return rows


def test_names_and_images(client: FlowTurboClient) -> None:
    result = client.generate(["A", "7"], seeds=[1, 2])
    assert result.class_names == ("A", "7")
    assert result.images is not None
    assert result.images.shape == (2, 64, 64, 3)
    np.testing.assert_array_equal(client.generate([0, 33], seeds=[1, 2]).images, result.images)


def test_presets(client: FlowTurboClient) -> None:
    """Those of the glyphs, `fast` without a name; and an unknown name is told them."""
    chosen = json.loads((GLYPHS / "presets.json").read_text())["presets"]
    for name, asked in (("best", "best"), ("fast", None)):
        named = client.generate("A", 1, asked, outputs=("latent",)).latents
        plain = client.generate("A", 1, chosen[name]["schedule"], outputs=("latent",)).latents
        np.testing.assert_allclose(named, plain, atol=1e-4)
    with pytest.raises(InvalidRequestError, match="the presets here are fast, balanced, best"):
        client.generate("A", 1, "better")


def test_settings_make_the_same_image_again(client: FlowTurboClient) -> None:
    """All that is not the caller's own choice is told: defaults, presets, the time grid."""
    first = client.generate("A", 1, "best", guidance_interval=(0.25, 1.0), outputs=("latent",))
    told = {key: value for key, value in first.settings.items() if key not in ("size", "variant")}
    assert told["guidance_scale"] == 3  # the pipeline's own default
    again = client.generate("A", 1, **told, outputs=("latent",))
    np.testing.assert_allclose(again.latents, first.latents, atol=1e-4)
    assert again.settings == first.settings


def test_a_request_on_its_own_time_grid(client: FlowTurboClient, glyphs_repository: Path) -> None:
    """Of a schedule that has an ensemble, whose grid is another."""
    times = (np.linspace(0, 1, 10) ** 0.9).tolist()
    found = client.generate(0, 1, "H1P5R3", times=times, outputs=("latent",))
    want = LocalPipeline(glyphs_repository).generate(0, 1, "H1P5R3", times=times)
    np.testing.assert_allclose(found.latents, want.latent, atol=1e-4)
    assert found.settings["times"] == pytest.approx(times)
    usual = client.generate(0, 1, "H1P5R3", outputs=("latent",))
    assert usual.latents is not None and found.latents is not None
    assert np.abs(usual.latents - found.latents).max() > 0.01


FILES = ("png", "jpeg", "webp")


@pytest.mark.parametrize("output_format", [*FILES, *(f"{name}_base64" for name in FILES)])
def test_encoded_images(client: FlowTurboClient, output_format: str) -> None:
    raw = client.generate("G", seeds=5).images
    assert raw is not None
    encoded = client.generate("G", seeds=5, output_format=output_format)
    difference = np.abs(np.asarray(encoded.pil()[0]).astype(int) - raw[0])
    assert difference.mean() < (0.001 if output_format.startswith("png") else 12)
    (data,) = encoded.encoded
    assert data.isascii() == output_format.endswith("_base64")


@pytest.fixture(scope="module")
def caller(glyphs_server: ServerAddress) -> Iterator[Caller]:
    with Caller(glyphs_server.grpc) as opened:
        yield opened


LABEL_JSON = {"name": "label", "shape": [1], "datatype": "INT64", "data": [0]}
PNG_TEXT = {"name": "output_format", "shape": [1], "datatype": "BYTES", "data": ["png_base64"]}


def test_answers_over_http_are_json(glyphs_server: ServerAddress, client: FlowTurboClient) -> None:
    """Images as files too, on both of Triton's endpoints."""
    seed = {"name": "seed", "shape": [1], "datatype": "INT64", "data": [5]}
    body = {"inputs": [LABEL_JSON, seed, PNG_TEXT], "outputs": [{"name": "encoded_image"}]}
    status, answer = post(glyphs_server, "infer", body)
    assert status == 200
    (text,) = answer["outputs"][0]["data"]
    scalars = {"label": 0, "seed": 5, "output_format": "png_base64"}
    status, answer = post(glyphs_server, "generate", scalars)
    assert (status, answer["encoded_image"]) == (200, text)
    expected = client.generate(0, 5, output_format="png").encoded
    assert base64.b64decode(text) == expected[0]


def test_outputs_come_in_the_order_asked_for(caller: Caller, glyphs_server: ServerAddress) -> None:
    """And in the contract's where no order was asked for: then without the latent."""
    order = [spec.name for spec in REQUEST_OUTPUTS]
    for wanted in (
        *(["seed", "latent"], ["class_name", "image"], ["latent", "seed", "image"]),
        ["pipelines", "settings", "image"],
    ):
        for names in (wanted, wanted[::-1]):
            found = caller.output_names(ORCHESTRATOR, names, label=np.array([0]))
            assert found == names
            body = {"inputs": [LABEL_JSON], "outputs": [{"name": name} for name in names]}
            _, answer = post(glyphs_server, "infer", body)
            assert [output["name"] for output in answer["outputs"]] == names
    usual = {"image", "seed", "class_name", "settings"}
    assert caller.output_names(ORCHESTRATOR, None, label=np.array([0])) == [
        name for name in order if name in usual
    ]


def test_outputs_in_process_come_in_the_order_asked_for(glyphs_repository: Path) -> None:
    pipeline = LocalPipeline(glyphs_repository)
    wanted = ["seed", "image", "settings", "class_name", "latent"]
    request = parse_request({"label": np.array([0])}, wanted, pipeline.pipeline, pipeline.settings)
    program = program_of(request, pipeline.pipeline, Variant.REFERENCE)
    assert list(pipeline.run(request, program)) == wanted


@pytest.mark.parametrize("name", [s.name for s in REQUEST_OUTPUTS if s.name != TRUNCATED])
def test_a_request_for_classification_does_not_end_the_server(
    glyphs_server: ServerAddress, caller: Caller, name: str
) -> None:
    """Triton's own extension: answered for numbers, refused for text."""
    number = {spec.name: spec.dtype is not np.object_ for spec in REQUEST_OUTPUTS}[name]
    extended = {"name": name, "parameters": {"classification": 2}}
    other = {"name": "seed" if name != "seed" else "image"}  # pipelines alone takes no input
    body = {"inputs": [LABEL_JSON, PNG_TEXT], "outputs": [extended, other]}
    status, answer = post(glyphs_server, "infer", body)
    assert (status == 200) == number
    assert number or "class result not available" in answer["error"]
    tensors = {"label": np.array([0]), "output_format": "png_base64"}
    names = [name, other["name"]]
    if number:
        caller.infer(ORCHESTRATOR, names, class_count=2, **tensors)
    else:
        with pytest.raises(InferenceServerException, match="class result not available"):
            caller.infer(ORCHESTRATOR, names, class_count=2, **tensors)
    assert caller.infer(ORCHESTRATOR, ["seed"], label=np.array([1]))


@pytest.mark.parametrize(
    "shape",
    [
        *([2**62], [2**63 - 1], [2**32, 2**32], [10**12], [0, 2**62], [2**24 + 1]),
        *([2**63], [2**64 - 1], [2**64 - 2**31, 2**64 - 2**31]),  # the server takes a sign off
    ],
)
def test_a_huge_shape_does_not_end_the_server(
    glyphs_server: ServerAddress, caller: Caller, shape: list[int]
) -> None:
    """The server would make room for so many numbers before it looks at those that are there."""
    body = {"inputs": [{**LABEL_JSON, "shape": shape}], "outputs": [{"name": "seed"}]}
    status, answer = post(glyphs_server, "infer", body)
    assert status == 400 and "2^24 elements" in answer["error"]
    assert caller.infer(ORCHESTRATOR, ["seed"], label=np.array([1]))


def test_deeply_nested_json_does_not_end_the_server(
    glyphs_server: ServerAddress, caller: Caller
) -> None:
    status, _ = post(glyphs_server, "infer", b'{"inputs":' + b"[" * 500_000)
    assert status >= 400
    assert caller.infer(ORCHESTRATOR, ["seed"], label=np.array([1]))


def test_many_chunks_do_not_end_the_server(glyphs_server: ServerAddress, caller: Caller) -> None:
    host, port = glyphs_server.http.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = f"POST /v2/models/{ORCHESTRATOR}/infer HTTP/1.1\r\nHost: x\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        connection.sendall(b"1\r\nA\r\n" * 1_000_000 + b"0\r\n\r\n")
        assert connection.recv(10) in (b"HTTP/1.1 4", b"HTTP/1.1 5")
    assert caller.infer(ORCHESTRATOR, ["seed"], label=np.array([1]))


def test_server_seeds_repeat(client: FlowTurboClient) -> None:
    first = client.generate(["Q", "Q"], outputs=("latent",))
    assert first.seeds[0] != first.seeds[1]
    again = client.generate(["Q", "Q"], seeds=first.seeds, outputs=("latent",))
    np.testing.assert_allclose(again.latents, first.latents, atol=1e-4)


def test_an_image_depends_on_its_seed_alone(
    client: FlowTurboClient, glyphs_repository: Path
) -> None:
    """Alone, in a request of 8, and among 8 concurrent requests of other schedules."""
    labels, seeds = list(range(8)), list(range(100, 108))
    together = client.generate(labels, seeds, "H1P5R3", outputs=("latent",)).latents
    schedules = ["H1P5R3", "H4", "P6", "H2P4R2", "E8", "A8", "H1R3", "P3E2"]
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(client.generate, labels[0], seeds[0], schedule, outputs=("latent",))
            for schedule in schedules
        ]
        among = [job.result().latents for job in jobs]
    local = LocalPipeline(glyphs_repository)
    for schedule, latents in zip(schedules, among, strict=True):
        alone = client.generate(labels[0], seeds[0], schedule, outputs=("latent",)).latents
        np.testing.assert_allclose(latents, alone, atol=1e-4)
        in_process = local.generate(labels[0], seeds[0], schedule).latent
        np.testing.assert_allclose(latents, in_process, atol=1e-4)
    np.testing.assert_allclose(among[0][0], together[0], atol=1e-4)


def test_more_images_than_one_batch_holds(client: FlowTurboClient) -> None:
    labels = [k % 36 for k in range(64)]  # 128 guided rows, 64 to a batch
    many = client.generate(labels, list(range(64)), "H1P1", outputs=("latent",)).latents
    last = client.generate(labels[-1], 63, "H1P1", outputs=("latent",)).latents
    np.testing.assert_allclose(many[-1], last[0], atol=1e-4)


def infer(address: ServerAddress, tensors: dict[str, Any], **options: Any) -> triton.InferResult:
    """A raw request, with none of the client's own checks."""
    inputs = []
    for name, value in tensors.items():
        dtype = "BYTES" if value.dtype == object else np_to_triton_dtype(value.dtype)
        inputs.append(triton.InferInput(name, list(value.shape), dtype))
        inputs[-1].set_data_from_numpy(value)
    with triton.InferenceServerClient(address.grpc) as raw:
        return raw.infer("flowturbo", inputs, client_timeout=60, **options)


def text(value: bytes) -> np.ndarray:
    return np.array([value], dtype=object)


def times(schedule: str, *values: float) -> dict[str, np.ndarray]:
    return {"schedule": text(schedule.encode()), "times": np.array(values, dtype=np.float32)}


LABEL = np.array([1], dtype=np.int64)
PIXELS = np.full((1, 64, 64, 3), 90, dtype=np.uint8)
MALFORMED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"label": np.array([1.0], dtype=np.float32)}, {}),
    ({"label": np.array([1], dtype=np.int32)}, {}),
    ({"label": np.array([[1]], dtype=np.int64)}, {}),
    ({"label": np.array([36], dtype=np.int64)}, {}),
    ({"label": np.array([-1], dtype=np.int64)}, {}),
    ({"label": np.array([], dtype=np.int64)}, {}),
    ({"label": np.zeros(100_000, dtype=np.int64)}, {}),
    ({"class_name": text(b"lowercase")}, {}),
    ({"class_name": text(b"\xff\xfe")}, {}),
    ({"seed": np.array([1], dtype=np.int64)}, {}),
    ({"label": LABEL, "class_name": text(b"A")}, {}),
    ({"label": LABEL, "schedule": text(b"H0")}, {}),
    ({"label": LABEL, "schedule": text(b"R3")}, {}),
    ({"label": LABEL, "schedule": text(b"H1P5R3X")}, {}),
    ({"label": LABEL, "schedule": text(b"")}, {}),
    ({"label": LABEL, "schedule": text(b"H" * 100_000)}, {}),
    ({"label": LABEL, "schedule": np.array([], dtype=object)}, {}),
    ({"label": LABEL, "schedule": np.array([b"H1", b"H2"], dtype=object)}, {}),
    ({"label": LABEL, "guidance_scale": np.array([np.nan], dtype=np.float32)}, {}),
    ({"label": LABEL, "guidance_scale": np.array([-1], dtype=np.float32)}, {}),
    ({"label": LABEL, "guidance_scale": np.array([1, 2], dtype=np.float32)}, {}),
    ({"label": LABEL, "guidance_interval": np.array([0.9, 0.1], dtype=np.float32)}, {}),
    ({"label": LABEL, "seed": np.array([-1], dtype=np.int64)}, {}),
    ({"label": LABEL, "seed": np.array([1, 2], dtype=np.int64)}, {}),
    ({"label": LABEL, "initial_noise": np.zeros((1, 4, 8, 8), dtype=np.float32)}, {}),
    ({"label": LABEL, "initial_noise": np.full((1, 4, 16, 16), np.inf, dtype=np.float32)}, {}),
    ({"label": LABEL, "output_format": text(b"gif")}, {}),
    ({"label": LABEL, "lable": LABEL}, {}),
    ({"label": LABEL, "pipeline": text(b"glyfs")}, {}),
    ({"label": LABEL, "pipeline": text(b"\xff\xfe")}, {}),
    ({"label": LABEL, "pipeline": np.array([b"glyphs", b"glyphs"], dtype=object)}, {}),
    ({"label": LABEL, "pipeline": np.array([], dtype=object)}, {}),
    ({"label": LABEL, "pipeline": text(b"../glyphs" * 10_000)}, {}),
    ({"label": LABEL, "times": np.array([0, 1], dtype=np.float32)}, {}),
    ({"label": LABEL, "times": np.array([], dtype=np.float32)}, {}),
    ({"label": LABEL, **times("H1", 0, np.nan)}, {}),
    ({"label": LABEL, **times("H1", 0.5, 0.5)}, {}),
    ({"label": LABEL, **times("H1", -1, 1)}, {}),
    ({"label": LABEL, **times("H1", 0, 1.1)}, {}),
    ({"label": LABEL, **times("H250", *range(250, -1, -1))}, {}),
    ({"label": LABEL, "times": np.zeros(100_000, dtype=np.float32)}, {}),
    ({"label": LABEL, "mask": PIXELS[..., 0]}, {}),
    ({"label": LABEL, "image": PIXELS.astype(np.float32)}, {}),
    ({"label": LABEL, "image": PIXELS[0]}, {}),
    ({"label": LABEL, "image": PIXELS[:, :0]}, {}),
    ({"label": LABEL, "image": PIXELS[:0]}, {}),
    ({"label": LABEL, "image": np.repeat(PIXELS, 3, 0)}, {}),
    ({"label": LABEL, "image": PIXELS, "image_file": text(b"x")}, {}),
    ({"label": LABEL, "image_file": text(b"")}, {}),
    ({"label": LABEL, "image_file": text(b"\x89PNG\r\n\x1a\n" + bytes(5000))}, {}),
    ({"label": LABEL, "image_file": text(b"\xff\xd8\xff\xe0" + bytes(5000))}, {}),
    ({"label": LABEL, "image_file": text(b"RIFF\x10\0\0\0WEBPVP8 " + bytes(5000))}, {}),
    ({"label": LABEL, "image": PIXELS, "mask": np.zeros((1, 64, 64), np.uint8)}, {}),
    ({"label": LABEL, "image": PIXELS, "mask": np.zeros((1, 64, 63), np.uint8)}, {}),
    ({"label": LABEL, "image": PIXELS, "mask_file": text(b"no mask")}, {}),
    ({"label": LABEL, "image": PIXELS, "strength": np.array([np.nan], np.float32)}, {}),
    ({"label": LABEL, "image": PIXELS, "strength": np.array([2], np.float32)}, {}),
    ({"label": LABEL, "image": PIXELS, "feather": np.array([2])}, {}),
    ({"label": LABEL, "image": PIXELS, "invert": np.array([True]), "seed": LABEL}, {}),
    ({"label": LABEL}, {"parameters": {"steps": 20}}),
    ({}, {}),
    ({"label": LABEL}, {"outputs": [triton.InferRequestedOutput("picture")]}),
    ({"label": LABEL}, {"outputs": [triton.InferRequestedOutput("encoded_image")]}),
]


def test_malformed_requests_disturb_nobody(
    client: FlowTurboClient, glyphs_server: ServerAddress
) -> None:
    expected = client.generate(4, 44, "H1P2", outputs=("latent",)).latents
    stop = threading.Event()

    def good() -> int:
        count = 0
        while not stop.is_set():
            latents = client.generate(4, 44, "H1P2", outputs=("latent",)).latents
            np.testing.assert_allclose(latents, expected, atol=1e-4)
            count += 1
        return count

    def bad(index: int) -> None:
        tensors, options = MALFORMED[index % len(MALFORMED)]
        with pytest.raises(InferenceServerException) as caught:
            infer(glyphs_server, tensors, **options)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT", caught.value
        message = caught.value.message()
        assert "Traceback" not in message
        assert 10 < len(message) < 600

    order = random.Random(0).sample(range(500), 500)
    with ThreadPoolExecutor(10) as pool:
        running = [pool.submit(good) for _ in range(2)]
        try:
            list(pool.map(bad, order))
        finally:
            stop.set()
        assert all(job.result() > 0 for job in running)
    assert client.is_ready()


def test_errors_say_what_is_allowed(client: FlowTurboClient) -> None:
    with pytest.raises(InvalidRequestError, match="label must be 0 to 35, got 36"):
        client.generate(36)


def test_a_cancelled_request_stops(
    glyphs_server: ServerAddress, client: FlowTurboClient, read_metrics: ReadMetrics
) -> None:
    before = read_metrics(glyphs_server)
    with long_request(glyphs_server) as call:
        begun = before[PREDICTED] + LONG_STEP_ROWS
        wait_until(lambda: read_metrics(glyphs_server, at_once=True)[PREDICTED] >= begun)
        call.cancel()
        at_cancel = read_metrics(glyphs_server, at_once=True)[PREDICTED]
        wait_until(
            lambda: (
                read_metrics(glyphs_server)[outcome("cancelled")]
                == before[outcome("cancelled")] + 1
            )
        )
    # The step under way ends, and perhaps some that began before the cancellation had arrived.
    assert rests(lambda: read_metrics(glyphs_server)) - at_cancel <= 3 * LONG_STEP_ROWS


@contextmanager
def long_request(address: ServerAddress) -> Iterator[Any]:
    """A request of LONG under way, which is gone afterwards; yields its gRPC call."""
    inputs = [
        triton.InferInput("label", [64], "INT64"),
        triton.InferInput("schedule", [1], "BYTES"),
    ]
    inputs[0].set_data_from_numpy(np.zeros(64, dtype=np.int64))
    inputs[1].set_data_from_numpy(text(b"E250"))
    with triton.InferenceServerClient(address.grpc) as raw:
        call = raw.async_infer("flowturbo", inputs, callback=lambda result, error: None)
        try:
            yield call
        finally:
            call.cancel()


def test_an_expired_request_stops(
    glyphs_server: ServerAddress, client: FlowTurboClient, read_metrics: ReadMetrics
) -> None:
    before = read_metrics(glyphs_server)
    with pytest.raises(DeadlineExceededError):
        client.generate(**LONG, timeout_s=0.5)
    expired = before[outcome("deadline")] + 1
    wait_until(lambda: read_metrics(glyphs_server)[outcome("deadline")] == expired)
    assert rests(lambda: read_metrics(glyphs_server)) - before[PREDICTED] < LONG_ROWS


def test_metrics_count_what_was_done(
    glyphs_server: ServerAddress, client: FlowTurboClient, read_metrics: ReadMetrics
) -> None:
    before = read_metrics(glyphs_server)
    client.generate([1, 2], schedule="H1P5R3", guidance_scale=1.0)
    client.generate([1], schedule="H1P5R3", guidance_scale=2.0)

    def rows() -> dict[Role, float]:
        after = read_metrics(glyphs_server)
        names = {role: model_name("glyphs", role) for role in LABEL_ROLES}
        keys = {
            role: f'flowturbo_rows_total{{model="{name}",pipeline="glyphs"}}'
            for role, name in names.items()
        }
        return {role: after[key] - before[key] for role, key in keys.items()}

    expected = {Role.PREDICTOR: 28, Role.REFINER: 12, Role.DECODER: 3}
    wait_until(lambda: rows() == expected)  # counted once the answers are out
    after = read_metrics(glyphs_server)
    count = 'flowturbo_request_duration_seconds_count{pipeline="glyphs"}'
    assert [after[of] - before[of] for of in (outcome("ok"), count)] == [2, 2]


def test_requests_refused_before_their_pipeline_is_known_are_counted(
    glyphs_server: ServerAddress, client: FlowTurboClient, read_metrics: ReadMetrics
) -> None:
    """As those of the pipeline "unknown", not of one that a caller can make up."""
    before = read_metrics(glyphs_server)
    with pytest.raises(
        InvalidRequestError, match="pipeline 'glyfs' is unknown, known are glyphs, scenes$"
    ):
        client.generate(1, pipeline="glyfs")
    with pytest.raises(InvalidRequestError, match="label must be 0 to 35"):
        client.generate(36, pipeline="glyphs")
    refused = {outcome("invalid", "unknown"), outcome("invalid")}
    wait_until(lambda: all(read_metrics(glyphs_server)[key] > before[key] for key in refused))
    after = read_metrics(glyphs_server)
    assert after.keys() == before.keys()
    totals = [key for key in after if key.startswith("flowturbo_requests_total")]
    assert {key for key in totals if after[key] != before[key]} == refused


def test_a_full_server_refuses_at_once(
    glyphs_repository: Path, tmp_path: Path, read_metrics: ReadMetrics
) -> None:
    repository = tmp_path / "models"
    shutil.copytree(glyphs_repository, repository)
    config = repository / "flowturbo" / "config.pbtxt"
    setting = '{ key: "max_inflight", value: { string_value: "'
    assert f'{setting}64"' in config.read_text()
    config.write_text(config.read_text().replace(f'{setting}64"', f'{setting}2"'))
    with running_server(repository) as address, FlowTurboClient(address.grpc, retries=0) as client:
        with long_request(address), long_request(address):
            wait_until(lambda: read_metrics(address)[IN_FLIGHT] == 2)
            for _ in range(3):
                with pytest.raises(ServerBusyError, match="at most 2 are allowed"):
                    client.generate(1, schedule="E1")
            # Both are still under way: none of the three has waited for a place.
            assert read_metrics(address)[IN_FLIGHT] == 2
        wait_until(lambda: read_metrics(address)[IN_FLIGHT] == 0)
        assert client.generate(1, schedule="E1").images is not None
        wait_until(lambda: read_metrics(address)[outcome("busy")] == 3)


def test_the_header_of_a_caller_is_taken_and_no_other_parameter(
    glyphs_server: ServerAddress,
) -> None:
    label = triton.InferInput("label", [1], "INT64")
    label.set_data_from_numpy(np.array([1]))
    with triton.InferenceServerClient(glyphs_server.grpc) as raw:
        answer = raw.infer("flowturbo", [label], headers={"flowturbo-caller": "alice"})
        assert answer.as_numpy("image") is not None
        with pytest.raises(InferenceServerException, match="unknown request parameter 'other'"):
            raw.infer("flowturbo", [label], parameters={"other": "1"})
    body = {
        "inputs": [{"name": "label", "shape": [1], "datatype": "INT64", "data": [1]}],
        "outputs": [{"name": "seed"}],
    }
    status, answer = post(glyphs_server, "infer", body, **{"FlowTurbo-Caller": "alice"})
    assert status == 200 and answer["outputs"][0]["name"] == "seed"


def test_what_cannot_be_in_time_is_refused_with_a_hint(glyphs_server: ServerAddress) -> None:
    """Of many large requests that come at once with a deadline, some are taken and all answered."""
    outcomes: Counter[str] = Counter()

    def large(k: int) -> None:
        with FlowTurboClient(glyphs_server.grpc, retries=0) as client:
            try:
                client.generate([0] * 64, [64 * k + j for j in range(64)], "H8", timeout_s=15)
                outcomes["answered"] += 1
            except ServerBusyError as error:
                assert error.retry_after_s is not None and error.retry_after_s > 0
                outcomes["refused"] += 1
            except DeadlineExceededError:
                outcomes["late"] += 1

    with FlowTurboClient(glyphs_server.grpc) as client:
        client.generate([0] * 64, list(range(64)), "H8", timeout_s=120)  # such calls are known now
    with ThreadPoolExecutor(48) as pool:
        list(pool.map(large, range(48)))
    assert outcomes.total() == 48
    assert outcomes["answered"] >= 1 and outcomes["refused"] >= 1
    assert outcomes["late"] <= outcomes["answered"]
