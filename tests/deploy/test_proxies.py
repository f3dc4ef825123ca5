"""The proxies' configurations in deploy/, with the real proxies of Debian and a real server."""

import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from flowturbo_client import FlowTurboClient, InvalidRequestError

from bench.faults import SAME_LEVELS
from bench.proxies import proxy
from flowturbo.serving.tritonserver import ServerAddress


@pytest.fixture(params=["haproxy", "nginx"])
def url(
    request: pytest.FixtureRequest, glyphs_server: ServerAddress, tmp_path: Path
) -> Iterator[str]:
    """A proxy in front of one server that lives and two that are dead."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens here
        dead = ServerAddress(*[f"127.0.0.1:{closed.getsockname()[1]}"] * 3)
        with proxy(request.param, [dead, glyphs_server, dead], tmp_path) as at:
            yield at


def test_requests_reach_the_server_that_lives(url: str, glyphs_server: ServerAddress) -> None:
    with FlowTurboClient(url, retries=0) as client, FlowTurboClient(glyphs_server.grpc) as direct:
        for seed in range(8):
            made, want = (each.generate(["A"], [seed], "H4") for each in (client, direct))
            assert made.images is not None and want.images is not None
            assert np.abs(made.images.astype(int) - want.images).mean() <= SAME_LEVELS
        assert client.generate(["A"] * 64, list(range(64)), "E2").images is not None
        with pytest.raises(InvalidRequestError, match="class_name 'no' is unknown"):
            client.generate("no")
        *_, last = client.stream("A", schedule="H4")
        assert last.final


def test_callers_cannot_name_themselves(url: str) -> None:
    """The proxy takes the header away: nobody gets another's share."""
    label = triton.InferInput("label", [1], "INT64")
    label.set_data_from_numpy(np.array([1]))
    with triton.InferenceServerClient(url) as raw:
        answer = raw.infer("flowturbo", [label], headers={"flowturbo-caller": "somebody"})
    assert answer.as_numpy("image") is not None
