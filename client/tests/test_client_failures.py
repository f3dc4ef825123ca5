"""Statuses to exceptions, retries, deadlines, health: against a real gRPC server."""

import asyncio
import threading

import pytest
from flowturbo_client import (
    AsyncFlowTurboClient,
    ConnectionFailedError,
    DeadlineExceededError,
    FlowTurboClient,
    FlowTurboError,
    InvalidRequestError,
    ModelNotReadyError,
    RequestCancelledError,
    ServerBusyError,
    ServerError,
)
from flowturbo_client.protocol import build_request
from flowturbo_client.retry import FIRST_CONTACT_S, RetryPlan
from grpc import StatusCode
from tritonclient.utils import InferenceServerException

FULL = (StatusCode.UNAVAILABLE, "server is full: 64 requests in flight")


@pytest.mark.parametrize(
    ("code", "message", "expected"),
    [
        (StatusCode.INVALID_ARGUMENT, "label 99 is not in 0..35", InvalidRequestError),
        (StatusCode.CANCELLED, "deadline passed after step 3 of 9", DeadlineExceededError),
        (StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", DeadlineExceededError),
        (StatusCode.CANCELLED, "cancelled after step 3 of 9", RequestCancelledError),
        (StatusCode.NOT_FOUND, "Request for unknown model: 'flowturbo'", ModelNotReadyError),
        (StatusCode.UNAVAILABLE, "Request for unknown model: no version", ModelNotReadyError),
        (StatusCode.INTERNAL, "the server failed on this request", ServerError),
        (StatusCode.UNIMPLEMENTED, "decoupled", ServerError),
    ],
)
def test_status_to_exception_never_retried(triton, code, message, expected):
    triton.script = [(code, message)]
    with FlowTurboClient(triton.url, retries=3) as client:
        with pytest.raises(FlowTurboError, match=message) as caught:
            client.generate(0)
    assert type(caught.value) is expected
    assert isinstance(caught.value.__cause__, InferenceServerException)
    assert len(triton.requests) == 1


def test_standard_bases():
    assert issubclass(DeadlineExceededError, TimeoutError)
    assert issubclass(InvalidRequestError, ValueError)


def test_a_full_server_is_asked_again(triton):
    triton.script = [FULL, FULL]
    with FlowTurboClient(triton.url, retries=2) as client:
        assert client.generate(0, 5).seeds.tolist() == [5]
    assert len(triton.requests) == 3
    assert len({request.SerializeToString() for request in _without_timeouts(triton)}) == 1


def _without_timeouts(triton):
    for request in triton.requests:
        del request.parameters["timeout"]
    return triton.requests


def test_a_full_server_is_given_up_after_the_retries(triton):
    triton.script = [FULL] * 9
    with FlowTurboClient(triton.url, retries=1) as client:
        with pytest.raises(ServerBusyError, match="try again later"):
            client.generate(0)
    assert len(triton.requests) == 2


def test_a_broken_connection_is_asked_again(triton):
    triton.script = [(StatusCode.UNAVAILABLE, "Socket closed")]
    with FlowTurboClient(triton.url) as client:
        client.generate(0)
    assert len(triton.requests) == 2


def test_a_server_that_lost_a_model_is_asked_again(triton):
    """It may be started again meanwhile; what is said then is the server's own reason."""
    gone = "glyphs_vae_decoder cannot answer, its process has ended: the server has to be restarted"
    triton.script = [(StatusCode.UNAVAILABLE, gone)]
    with FlowTurboClient(triton.url) as client:
        client.generate(0)
    assert len(triton.requests) == 2
    triton.script = [(StatusCode.UNAVAILABLE, gone)]
    with FlowTurboClient(triton.url, retries=0) as client:
        with pytest.raises(ConnectionFailedError, match=f"cannot answer: {gone}$"):
            client.generate(0)


def test_a_server_that_lost_the_model_itself_is_asked_again(triton):
    """Triton says so itself, as an error of its own."""
    gone = (StatusCode.INTERNAL, "Stub process 'flowturbo_0_0' is not healthy.")
    triton.script = [gone]
    with FlowTurboClient(triton.url) as client:
        client.generate(0)
    assert len(triton.requests) == 2
    triton.script = [gone]
    with FlowTurboClient(triton.url, retries=0) as client:
        with pytest.raises(ConnectionFailedError, match="process has ended .*has to be restarted"):
            client.generate(0)


def test_nobody_there(nobody):
    with FlowTurboClient(nobody, timeout_s=5) as client:
        with pytest.raises(ConnectionFailedError, match=nobody):
            client.generate(0)
        with pytest.raises(ConnectionFailedError):
            client.health()
        with pytest.raises(ConnectionFailedError, match=nobody):
            client.pipelines()
        assert client.is_ready() is False


def test_the_time_for_pipelines_is_checked(triton):
    with FlowTurboClient(triton.url) as client:
        with pytest.raises(InvalidRequestError, match="timeout_s"):
            client.pipelines(timeout_s=-1)
    assert not triton.requests


def test_deadline_is_told_to_the_server_and_a_little_longer_to_grpc(triton):
    with FlowTurboClient(triton.url, timeout_s=60) as client:
        client.generate(0)
        client.generate(0, timeout_s=3)
    timeouts_s = [request.parameters["timeout"].int64_param / 1e6 for request in triton.requests]
    # What is left of the limit when the request is sent.
    assert 3 < timeouts_s[0] <= 60 and 0 < timeouts_s[1] <= 3
    for timeout_s, grpc_s in zip(timeouts_s, triton.remaining_s, strict=True):
        assert grpc_s < timeout_s + 1  # gRPC rounds it up on the way
    told = build_request(0).arguments("flowturbo", remaining_s=3.0)
    assert (told["timeout"], told["client_timeout"]) == (3_000_000, 3.5)


def test_a_server_that_does_not_answer(triton):
    given_up = threading.Event()
    triton.script = [lambda context: given_up.wait(60)]
    with FlowTurboClient(triton.url, timeout_s=0.1) as client:
        with pytest.raises(DeadlineExceededError, match=r"within 0\.1 s"):
            client.generate(0)
    given_up.set()
    assert len(triton.requests) <= 1  # it may have been given up before the server had it


def test_the_deadline_covers_all_attempts():
    now_s = 0.0
    plan = RetryPlan(9, 1.0, clock_s=lambda: now_s, uniform=lambda low, high: high)
    delays_s = []
    with pytest.raises(ServerBusyError):
        while True:
            delays_s.append(plan.delay_s(ServerBusyError("full")))
            now_s += delays_s[-1]
    assert delays_s == pytest.approx([0.1, 0.2, 0.4])
    assert plan.remaining_s() == pytest.approx(0.3)


def test_jitter_covers_everything_from_zero():
    bounds = []

    def uniform(low, high):
        bounds.append((low, high))
        return low

    plan = RetryPlan(7, 60.0, uniform=uniform)
    assert [plan.delay_s(ServerBusyError("full")) for _ in range(7)] == [0] * 7
    assert bounds == [(0, high) for high in (0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0)]


def test_attempts_end_with_the_deadline_by_default():
    now_s = 0.0
    plan = RetryPlan(None, 3600.0, clock_s=lambda: now_s, uniform=lambda low, high: high)
    count = 0
    with pytest.raises(ServerBusyError):
        while True:
            now_s += plan.delay_s(ServerBusyError("full"))
            count += 1
    assert count > 1000 and plan.remaining_s() <= 2.0


def test_an_address_that_was_never_reached_is_given_up_early():
    now_s = 0.0
    plan = RetryPlan(
        None, 60.0, reached=False, clock_s=lambda: now_s, uniform=lambda low, high: high
    )
    with pytest.raises(ConnectionFailedError):
        while True:
            now_s += plan.delay_s(ConnectionFailedError("refused"))
    assert FIRST_CONTACT_S <= now_s < FIRST_CONTACT_S + 2.0
    known = RetryPlan(None, 60.0, reached=True)
    assert known.delay_s(ModelNotReadyError("it starts again")) <= 0.1


def test_a_hint_is_waited_for():
    busy = ServerBusyError("busy")
    busy.retry_after_s = 1.2
    plan = RetryPlan(None, 60.0, uniform=lambda low, high: high)
    assert plan.delay_s(busy) == pytest.approx(1.3)
    assert plan.delay_s(ServerBusyError("full")) == pytest.approx(0.2)
    short = RetryPlan(None, 1.0, uniform=lambda low, high: high)
    with pytest.raises(ServerBusyError):  # the deadline would pass before
        short.delay_s(busy)


def test_the_next_server_is_asked_at_once_and_the_least_hint_counts():
    plan = RetryPlan(None, 60.0, servers=3, first=1, uniform=lambda low, high: 0.0)
    asked, delays_s = [plan.server], []
    for hint_s in (3.0, 2.0, 4.0, None):
        busy = ServerBusyError("busy")
        busy.retry_after_s = hint_s
        delays_s.append(plan.delay_s(busy))
        asked.append(plan.server)
    assert asked == [1, 2, 0, 1, 2] and delays_s == [0.0, 0.0, 2.0, 0.0]


def test_the_hint_is_read_from_the_message(triton):
    said = "the server is busy and would miss this or another request's deadline; retry after 2.5 s"
    triton.script = [(StatusCode.UNAVAILABLE, said)]
    with FlowTurboClient(triton.url, retries=0) as client:
        with pytest.raises(ServerBusyError) as caught:
            client.generate(0)
    assert caught.value.retry_after_s == 2.5


def test_every_attempt_asks_for_the_same_images(triton):
    triton.script = [FULL, FULL]
    with FlowTurboClient(triton.url) as client:
        client.generate([0, 1])
    seeds = [triton.inputs(k)["seed"].tolist() for k in range(3)]
    assert seeds[0] == seeds[1] == seeds[2] and seeds[0][0] != seeds[0][1]


def test_another_server_takes_over(triton, nobody):
    with FlowTurboClient([nobody, triton.url]) as client:
        assert client.generate(0, 5).seeds.tolist() == [5]
        assert client.pipelines() and client.is_ready()
        assert client.health().url == triton.url  # the one that answered last
    with pytest.raises(InvalidRequestError, match="empty list"):
        FlowTurboClient([])
    with pytest.raises(InvalidRequestError, match="without http://"):
        FlowTurboClient([triton.url, "http://elsewhere"])


def test_another_server_takes_over_async(triton, nobody):
    async def scenario():
        async with AsyncFlowTurboClient([nobody, triton.url]) as client:
            return await client.generate(0, 5), await client.pipelines(), await client.is_ready()

    generation, pipelines, ready = asyncio.run(scenario())
    assert generation.seeds.tolist() == [5] and pipelines and ready


def test_health(triton):
    with FlowTurboClient(triton.url) as client:
        health = client.health()
        assert health.can_generate and health.ready and client.is_ready()
        assert (health.server_version, health.inputs) == ("2.51.0", ("label", "seed"))
        triton.model_ready = False
        health = client.health()
        assert health.live and not health.model_ready and health.inputs == ()
        assert not health.can_generate and not client.is_ready()


def test_a_closed_client_says_so(triton):
    client = FlowTurboClient(triton.url)
    client.close()
    client.close()
    with pytest.raises(FlowTurboError, match="closed"):
        client.generate(0)
    with pytest.raises(FlowTurboError, match="closed"):
        client.pipelines()
