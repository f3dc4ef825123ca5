"""Streams: what is yielded, what errors become, and what is left when a stream ends."""

import asyncio
import threading
import time

import numpy as np
import pytest
from flowturbo_client import (
    AsyncFlowTurboClient,
    ConnectionFailedError,
    FlowTurboClient,
    FlowTurboError,
    InvalidRequestError,
    RequestCancelledError,
    ServerBusyError,
    ServerError,
)
from flowturbo_client.__main__ import main
from grpc import StatusCode
from PIL import Image


def collected(url, **options):
    async def scenario():
        async with AsyncFlowTurboClient(url) as client:
            return [update async for update in client.stream("A", **options)]

    return asyncio.run(scenario())


def plainly(url, **options):
    with FlowTurboClient(url) as client:
        return list(client.stream("A", **options))


BOTH = pytest.mark.parametrize("stream", [plainly, collected])


@BOTH
def test_previews_and_the_answer(triton, stream):
    found = stream(triton.url, seeds=[7], preview_every=2)
    assert [(update.step, update.final) for update in found] == [(1, False), (2, False), (3, True)]
    assert all(update.images.shape == (1, 4, 6, 3) for update in found)
    assert found[-1].generation.seeds.tolist() == [7]
    assert triton.requests[-1].model_name == "flowturbo_stream"
    assert triton.inputs()["preview_every"].tolist() == [2]


@BOTH
def test_files(triton, stream):
    found = stream(triton.url, output_format="png")
    assert all(update.images is None and update.pil()[0].size == (6, 4) for update in found)


@BOTH
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ((StatusCode.INVALID_ARGUMENT, "label must be 0 to 7, got 8"), InvalidRequestError),
        ((StatusCode.UNAVAILABLE, "server is full: 64 requests in flight"), ServerBusyError),
        ((StatusCode.INTERNAL, "a broken model"), ServerError),
    ],
)
def test_errors_are_those_without_a_stream(triton, stream, error, kind):
    triton.script = [error]
    with pytest.raises(kind, match=error[1]):
        stream(triton.url)
    assert len(triton.requests) == 1  # streams are not repeated


@BOTH
def test_a_server_that_is_not_there(nobody, stream):
    with pytest.raises(ConnectionFailedError):
        stream(nobody, timeout_s=5, image=np.zeros((512, 512, 3), np.uint8))


@BOTH
def test_a_stream_without_its_answer(triton, stream):
    triton.script = [{"none": True}]
    with pytest.raises(ServerError, match="flowturbo_stream ended without its answer"):
        stream(triton.url)


@BOTH
def test_refused_before_sending(triton, stream):
    with pytest.raises(InvalidRequestError, match="preview_every must be an integer"):
        stream(triton.url, preview_every="often")
    assert not triton.requests


def test_one_thread_serves_all_streams(triton):
    with FlowTurboClient(triton.url) as client:
        for _ in range(5):
            list(client.stream("A"))
            assert next(client.stream("A")).step == 1
    own = [each for each in threading.enumerate() if each.name.startswith("flowturbo")]
    assert len(own) == 1


def test_leaving_cancels(triton):
    gone = threading.Event()

    def hold(context):
        if len(triton.requests) and not gone.is_set():
            context.add_callback(gone.set)
            time.sleep(0.05)

    triton.script = [hold]
    with FlowTurboClient(triton.url) as client:
        updates = client.stream("A")
        next(updates)
        updates.close()
        assert gone.wait(5)


def test_closing_the_client_ends_its_streams(triton):
    held = threading.Event()
    triton.script = [lambda context: held.wait(5)]
    client = FlowTurboClient(triton.url)
    threading.Timer(0.3, client.close).start()
    started = time.monotonic()
    with pytest.raises(RequestCancelledError):
        list(client.stream("A"))
    assert time.monotonic() - started < 4
    held.set()
    with pytest.raises(FlowTurboError, match="closed"):
        list(client.stream("A"))


def test_closing_the_other_client_ends_its_streams(triton):
    held = threading.Event()
    triton.script = [lambda context: held.wait(5)]

    async def scenario():
        client = AsyncFlowTurboClient(triton.url)

        async def read():
            return [update async for update in client.stream("A")]

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.3)
        await client.close()
        with pytest.raises(FlowTurboError):
            await reading

    asyncio.run(scenario())
    held.set()


def test_watch(triton, tmp_path, capsys):
    words = ["generate", "--labels", "A", "B", "--watch", "--seed", "7", "--url", triton.url]
    assert main([*words, "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == ["step 1", "step 2", "step 3, final"]
    assert sorted(out.split()) == sorted(map(str, tmp_path.iterdir()))
    with Image.open(tmp_path / "forming.webp") as animation:
        assert animation.n_frames >= 1 and animation.size == (12, 4)
    assert triton.inputs()["seed"].tolist() == [7, 8]


@pytest.mark.parametrize(
    "words", [["--schedule", "H4", "H8"], ["--batch", "1"], ["--warmup"], ["--prompts", "FILE"]]
)
def test_watch_takes_one_request(triton, tmp_path, capsys, words):
    path = tmp_path / "prompts.txt"
    path.write_text("a red b\n")
    words = [str(path) if word == "FILE" else word for word in words]
    what = [] if "--prompts" in words else ["--labels", "A", "B"]
    options = ["--watch", "--url", triton.url, "--output", str(tmp_path)]
    assert main(["generate", *what, *words, *options]) == 1
    assert "--watch" in capsys.readouterr().err and not triton.requests
