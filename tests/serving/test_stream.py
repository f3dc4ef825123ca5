"""Previews on a real server: what comes, in which order, and what slow or absent readers cost."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as triton
from flowturbo_client import (
    AsyncFlowTurboClient,
    DeadlineExceededError,
    FlowTurboClient,
    InvalidRequestError,
    ServerBusyError,
    Update,
)

from flowturbo.contract import STREAM
from flowturbo.serving.tritonserver import ServerAddress

TOLERANCE = 0.05  # of the largest value: bf16's rounding in other batches
IN_FLIGHT = 'flowturbo_requests_in_flight{pipeline="glyphs"}'
ReadMetrics = Callable[..., dict[str, float]]


@pytest.fixture
def client(glyphs_server: ServerAddress) -> Iterator[FlowTurboClient]:
    with FlowTurboClient(glyphs_server.grpc) as connected:
        yield connected


def quiet(address: ServerAddress, read_metrics: ReadMetrics) -> bool:
    """Whether no stream is in flight any more, within half a minute."""
    end = time.monotonic() + 30
    while read_metrics(address)[IN_FLIGHT] and time.monotonic() < end:
        time.sleep(0.1)
    return read_metrics(address)[IN_FLIGHT] == 0


@pytest.mark.parametrize(
    ("schedule", "every", "steps"),
    [
        ("H8", 1, [1, 2, 3, 4, 5, 6, 7, 8]),
        ("H1P5R3", 3, [3, 6, 9]),
        ("H1P5Z3", 2, [2, 4, 9]),  # the last call takes four steps at once
        ("E4", 9, [4]),
    ],
)
def test_previews_come_in_order_before_the_answer(
    client: FlowTurboClient, schedule: str, every: int, steps: list[int]
) -> None:
    found = list(client.stream(["A", "B"], seeds=[1, 2], schedule=schedule, preview_every=every))
    shown = [update.step for update in found]
    # A preview is dropped while the one before it is on its way.
    assert shown == sorted(set(shown)) and set(shown) <= set(steps) and shown[-1] == steps[-1]
    assert [update.final for update in found] == [False] * (len(found) - 1) + [True]
    assert all(update.images is not None and len(update.images) == 2 for update in found)
    answer = found[-1].generation
    assert answer and answer.seeds.tolist() == [1, 2] and answer.class_names == ("A", "B")


def test_the_answer_is_that_without_a_stream(client: FlowTurboClient) -> None:
    outputs = ("image", "latent")
    *_, last = client.stream("Q", seeds=[5], schedule="H1P5R3", outputs=outputs)
    want = client.generate("Q", seeds=[5], schedule="H1P5R3", outputs=outputs)
    assert last.generation and last.generation.latents is not None and want.latents is not None
    difference = np.abs(last.generation.latents - want.latents).max()
    assert difference <= TOLERANCE * np.abs(want.latents).max()


def test_previews_approach_the_image(client: FlowTurboClient) -> None:
    *previews, last = client.stream("Q", seeds=[5], schedule="H8")
    apart = [
        np.abs(u.images.astype(int) - last.images).mean() for u in previews if u.images is not None
    ]
    assert len(apart) >= 3 and apart[-1] < apart[0] / 2


def test_files(client: FlowTurboClient) -> None:
    found = list(client.stream("Q", seeds=[5], output_format="webp"))
    assert all(update.encoded and update.images is None for update in found)
    assert all(update.pil()[0].size == (64, 64) for update in found)


def test_edits_stream_too(client: FlowTurboClient) -> None:
    """Previews are pasted as the answer is."""
    image = client.generate("R", seeds=7).images
    assert image is not None
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    found = list(client.stream("R", seeds=[3], image=image[0], mask=mask, schedule="H8"))
    assert len(found) > 2
    for update in found:
        assert update.images is not None
        np.testing.assert_array_equal(update.images[0][:, :32], image[0][:, :32])


def test_async(glyphs_server: ServerAddress) -> None:
    async def scenario() -> list[Update]:
        async with AsyncFlowTurboClient(glyphs_server.grpc) as client:
            return [update async for update in client.stream("A", seeds=[1], schedule="H4")]

    found = asyncio.run(scenario())
    assert found[-1].final and not found[0].final


@pytest.mark.parametrize(
    ("every", "said"),
    [(0, "preview_every must be a number of steps, INT64 .*, got int64 .0."), (2**63 - 1, "")],
)
def test_preview_every(client: FlowTurboClient, every: int, said: str) -> None:
    if said:
        with pytest.raises(InvalidRequestError, match=said):
            list(client.stream("A", preview_every=every))
    else:
        assert [update.final for update in client.stream("A", preview_every=every)] == [True]


def test_errors_are_those_without_a_stream(client: FlowTurboClient) -> None:
    with pytest.raises(InvalidRequestError, match="class_name 'no' is unknown"):
        list(client.stream("no"))
    with pytest.raises(DeadlineExceededError):
        list(client.stream([0] * 64, schedule="E250", timeout_s=0.5))


def test_unary_requests_are_for_the_other_model(glyphs_server: ServerAddress) -> None:
    with triton.InferenceServerClient(glyphs_server.grpc) as raw:
        label = triton.InferInput("label", [1], "INT64")
        label.set_data_from_numpy(np.array([1]))
        with pytest.raises(Exception, match="decoupled"):
            raw.infer(STREAM, [label])


def test_a_reader_that_leaves_cancels(
    client: FlowTurboClient, glyphs_server: ServerAddress, read_metrics: ReadMetrics
) -> None:
    updates = client.stream([0] * 16, schedule="E250", preview_every=1)
    next(updates)
    updates.close()  # type: ignore[attr-defined]
    assert quiet(glyphs_server, read_metrics)


def test_a_slow_reader_gets_the_answer(
    client: FlowTurboClient, glyphs_server: ServerAddress, read_metrics: ReadMetrics
) -> None:
    """The server is done long before: it does not wait for readers."""
    updates = client.stream("A", seeds=[1], schedule="H8", timeout_s=60)
    next(updates)
    assert quiet(glyphs_server, read_metrics)
    time.sleep(2)
    *_, last = updates
    assert last.final


def test_streams_share_batches_with_other_requests(
    client: FlowTurboClient, glyphs_server: ServerAddress, read_metrics: ReadMetrics
) -> None:
    """Sixteen requests of the same length, half of them streams: few calls carry many rows."""

    def executions() -> float:
        return read_metrics(glyphs_server)[
            'nv_inference_exec_count{model="glyphs_velocity_predictor",version="1"}'
        ]

    together = threading.Barrier(16)

    def one(k: int) -> None:
        together.wait()
        if k % 2:
            client.generate("A", seeds=[k], schedule="E250")
        else:
            *_, last = client.stream("A", seeds=[k], schedule="E250", preview_every=250)
            assert last.final

    before = executions()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(16)))
    assert executions() - before < 2 * 250  # two batchers would make 250 calls each


def test_many_streams_at_once(glyphs_server: ServerAddress, read_metrics: ReadMetrics) -> None:
    """Each gets its answer, or is refused at once because the server is full."""
    refused, answered, lock = [0], [0], threading.Lock()

    def one(k: int) -> None:
        with FlowTurboClient(glyphs_server.grpc, timeout_s=120) as each:
            while True:
                try:
                    *_, last = each.stream("A", seeds=[k], schedule="H4", preview_every=2)
                except ServerBusyError:
                    with lock:
                        refused[0] += 1
                    time.sleep(0.2)
                    continue
                assert last.generation and last.generation.seeds.tolist() == [k]
                with lock:
                    answered[0] += 1
                return

    with ThreadPoolExecutor(200) as pool:
        list(pool.map(one, range(200)))
    assert answered[0] == 200
    assert quiet(glyphs_server, read_metrics)
