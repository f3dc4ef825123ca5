"""A real gateway before the real server."""

from collections.abc import Iterator

import openai
import pytest

from bench.gateway import RunningGateway, running_gateway
from flowturbo.serving.tritonserver import ServerAddress


@pytest.fixture(scope="session")
def gateway_process(glyphs_server: ServerAddress) -> Iterator[RunningGateway]:
    with running_gateway(glyphs_server.grpc, "--alias", "gpt-image-1", "scenes") as found:
        yield found


@pytest.fixture(scope="session")
def gateway(gateway_process: RunningGateway) -> str:
    return gateway_process.address


@pytest.fixture(scope="session")
def api(gateway: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", max_retries=0)
