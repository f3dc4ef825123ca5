"""The asyncio client: same answers, same errors, and cancellation that reaches the server."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from flowturbo_client import (
    AsyncFlowTurboClient,
    ConnectionFailedError,
    DeadlineExceededError,
    FlowTurboError,
    InvalidRequestError,
    RequestCancelledError,
    ServerError,
)
from grpc import StatusCode


def test_generate_retry_and_health(triton):
    triton.script = [(StatusCode.UNAVAILABLE, "server is full")]

    async def scenario():
        async with AsyncFlowTurboClient(triton.url) as client:
            assert (await client.health()).inputs == ("label", "seed")
            assert await client.is_ready()
            return await client.generate(["A", "B"], [1, 2], output_format="png")

    result = asyncio.run(scenario())
    assert result.class_names == ("A", "B") and len(result.encoded) == 2
    assert len(triton.requests) == 2


def test_pipeline_times_and_settings(triton):
    async def scenario():
        async with AsyncFlowTurboClient(triton.url) as client:
            return await client.generate(0, None, "H2", pipeline="latents", times=[0, 0.25, 1])

    used = asyncio.run(scenario()).settings
    assert triton.inputs()["pipeline"].tolist() == [b"latents"]
    assert triton.inputs()["times"].tolist() == [0.0, 0.25, 1.0]
    assert (used["pipeline"], used["schedule"]) == ("latents", "H2")
    assert used["times"] == [0.0, 0.25, 1.0]


def test_pipelines(triton, nobody):
    async def scenario():
        async with AsyncFlowTurboClient(triton.url) as client:
            assert await client.pipelines() == triton.pipelines
            triton.script = [{"pipelines": np.array([b"{}"], object)}]
            with pytest.raises(ServerError, match="must be a list"):
                await client.pipelines()
            with pytest.raises(InvalidRequestError, match="timeout_s"):
                await client.pipelines(timeout_s=0)
        with pytest.raises(FlowTurboError, match="closed"):
            await client.pipelines()
        async with AsyncFlowTurboClient(nobody) as away:
            with pytest.raises(ConnectionFailedError, match=nobody):
                await away.pipelines()

    asyncio.run(scenario())
    assert triton.output_names() == ["pipelines"] and triton.inputs() == {}


def test_requests_run_at_once(triton):
    together = threading.Barrier(3, timeout=60)
    triton.script = [lambda context: together.wait()] * 3

    async def scenario():
        async with AsyncFlowTurboClient(triton.url) as client:
            return await asyncio.gather(*(client.generate(0, seed) for seed in range(3)))

    assert [result.seeds[0] for result in asyncio.run(scenario())] == [0, 1, 2]


def test_cancelling_the_task_cancels_the_request(triton):
    started = threading.Event()

    def wait_for_cancel(context):
        context.add_callback(triton.cancelled.set)
        started.set()
        triton.cancelled.wait(60)

    triton.script = [wait_for_cancel]

    async def scenario():
        async with AsyncFlowTurboClient(triton.url) as client:
            task = asyncio.create_task(client.generate(0))
            await asyncio.to_thread(started.wait, 60)
            assert not triton.cancelled.is_set()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # Before the channel closes, which would cancel the request anyway.
            assert await asyncio.to_thread(triton.cancelled.wait, 60)

    asyncio.run(scenario())
    assert len(triton.requests) == 1


def test_errors(triton, nobody):
    triton.script = [
        (StatusCode.INVALID_ARGUMENT, "no such schedule"),
        (StatusCode.CANCELLED, "deadline passed"),
    ]

    async def scenario():
        client = AsyncFlowTurboClient(triton.url)
        with pytest.raises(InvalidRequestError, match="no such schedule"):
            await client.generate(0)
        with pytest.raises(DeadlineExceededError):
            await client.generate(0)
        await client.close()
        with pytest.raises(FlowTurboError, match="closed"):
            await client.generate(0)
        async with AsyncFlowTurboClient(nobody, retries=0) as away:
            assert not await away.is_ready()
            with pytest.raises(ConnectionFailedError):
                await away.generate(0)

    asyncio.run(scenario())


def test_one_client_in_several_event_loops(triton):
    """One after the other, as asyncio.run makes them, and in two threads at once."""
    client = AsyncFlowTurboClient(triton.url)

    async def seed(value: int) -> int:
        return int((await client.generate("A", value)).seeds[0])

    assert [asyncio.run(seed(k)) for k in range(3)] == [0, 1, 2]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda k: asyncio.run(seed(k)), range(3, 9))) == list(range(3, 9))

    async def close() -> None:
        assert await seed(9) == 9
        await client.close()

    # A loop that has ended takes its channel along.
    assert len(client._channels) <= 2
    asyncio.run(close())
    with pytest.raises(FlowTurboError, match="closed"):
        asyncio.run(seed(10))


def test_to_close_the_client_cancels_what_is_awaited(triton):
    """As an error of this client: nobody cancels the task itself."""
    started, end = threading.Event(), threading.Event()

    def wait(context):
        started.set()
        end.wait(60)

    triton.script = [wait]

    async def scenario():
        client = AsyncFlowTurboClient(triton.url)
        task = asyncio.create_task(client.generate(0))
        await asyncio.to_thread(started.wait, 60)
        await client.close()
        with pytest.raises(RequestCancelledError, match="the client was closed"):
            await task

    asyncio.run(scenario())
    end.set()
