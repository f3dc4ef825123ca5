"""A proxy of the environment is for other machines, and is named where it is in the way."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest
from flowturbo_client import (
    AsyncFlowTurboClient,
    ConnectionFailedError,
    DeadlineExceededError,
    FlowTurboClient,
)
from flowturbo_client.address import is_local, proxy_hint


@pytest.fixture
def proxy(monkeypatch) -> Iterator[list[bytes]]:
    """A proxy that refuses everything, and what it was asked."""
    asked: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                asked.append(connection.recv(300).split(b"\r\n")[0])
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        for name in ("no_proxy", "no_grpc_proxy", "grpc_proxy", "https_proxy"):
            monkeypatch.delenv(name, raising=False)
        url = f"http://user:secret@127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("http_proxy", url)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield asked
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(timeout=10)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_is_reached_directly(triton, proxy, host):
    url = triton.url.replace("127.0.0.1", host)
    with FlowTurboClient(url) as client:
        assert client.generate("A", 1).seeds.tolist() == [1]
        assert client.is_ready()

    async def generate() -> int:
        async with AsyncFlowTurboClient(url) as client:
            return int((await client.generate("A", 2)).seeds[0])

    assert asyncio.run(generate()) == 2
    assert proxy == []


def test_a_proxy_in_the_way_is_named(proxy):
    with FlowTurboClient("images.example.test:8001", retries=0) as client:
        with pytest.raises(ConnectionFailedError) as caught:
            client.generate("A", 1)
    said = str(caught.value)
    assert "calls go through the proxy 127.0.0.1:" in said
    assert "(http_proxy); bypass it with no_proxy=images.example.test" in said
    assert "secret" not in said
    assert proxy and proxy[0].startswith(b"CONNECT images.example.test:8001")


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("localhost:8001", True),
        ("LOCALHOST.:8001", True),
        ("a.localhost:8001", True),
        ("127.0.0.1:8001", True),
        ("127.3.2.1", True),
        ("0.0.0.0:8001", True),
        ("[::1]:8001", True),
        ("::1", True),
        ("[::ffff:127.0.0.1]:8001", True),
        ("dns:///localhost:8001", True),
        ("dns://8.8.8.8/localhost:8001", True),
        ("ipv4:127.0.0.1:8001,127.0.0.2:8001", True),
        ("ipv6:[::1]:8001", True),
        ("unix:/run/triton.sock", True),
        ("127.1:1", True),
        ("localhost.localdomain:1", True),
        ("localhost6", True),
        ("localhost4.localdomain4:1", True),
        ("dns:/localhost:1", True),
        ("DNS:///localhost:1", True),
        ("xds:///localhost:1", True),
        ("ipv6:%5B::1%5D:1", True),
        (" localhost:1", True),
        ("10.1:1", False),
        ("dns:/images:1", False),
        ("localhost.localdomain.example.com:1", False),
        ("ipv4:127.0.0.1:8001,10.0.0.2:8001", False),
        ("10.0.0.1:8001", False),
        ("[2001:db8::1]:8001", False),
        ("localhost.example.com:8001", False),
        ("images:8001", False),
    ],
)
def test_what_is_this_machine(url, local):
    assert is_local(url) == local


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({}, None),
        ({"HTTP_PROXY": "http://p:1"}, None),  # gRPC does not look at it
        ({"http_proxy": "http://p:1"}, "p:1 (http_proxy)"),
        ({"http_proxy": "http://p:1", "grpc_proxy": "http://q:2"}, "q:2 (grpc_proxy)"),
        ({"https_proxy": "http://p"}, "p (https_proxy)"),
        ({"http_proxy": "http://p:1", "no_proxy": "a, .example.com"}, None),
        ({"http_proxy": "http://p:1", "no_proxy": "other.org"}, "p:1 (http_proxy)"),
        ({"http_proxy": "http://p:1", "no_proxy": ".EXAMPLE.com"}, None),
        # A variable that is set counts, even where it is empty.
        ({"http_proxy": "http://p:1", "grpc_proxy": ""}, None),
        ({"http_proxy": "http://p:1", "no_proxy": "*", "no_grpc_proxy": ""}, "p:1 (http_proxy)"),
        ({"http_proxy": "http://u:pw@p:99999999/"}, "proxy p:99999999 (http_proxy)"),
        ({"http_proxy": "http://[bad"}, "[bad (http_proxy)"),
    ],
)
def test_which_proxy_is_named(environment, named):
    hint = proxy_hint("images.example.com:8001", environment)
    assert (named in hint) if named else hint == ""
    assert "pw" not in hint


def test_networks_that_no_proxy_is_for():
    environment = {"http_proxy": "http://p:1", "no_proxy": "10.0.0.0/8,fd00::/8"}
    for url, through in [("10.2.3.4:1", False), ("[fd00::1]:1", False), ("11.2.3.4:1", True)]:
        assert bool(proxy_hint(url, environment)) == through


def test_a_proxy_that_keeps_silent_is_named(monkeypatch):
    """It takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")
        for name in ("no_proxy", "no_grpc_proxy", "grpc_proxy", "https_proxy"):
            monkeypatch.delenv(name, raising=False)
        with FlowTurboClient("images.example.test:8001", retries=0, timeout_s=0.3) as client:
            with pytest.raises(DeadlineExceededError, match="calls go through the proxy 127.0.0.1"):
                client.generate("A", 1)


@pytest.mark.parametrize(("leads_to", "local"), [("127.0.1.1", True), ("10.0.0.7", False)])
def test_the_machines_own_name(monkeypatch: pytest.MonkeyPatch, leads_to: str, local: bool) -> None:
    """Where it leads to this machine's loopback, as Debian writes it in /etc/hosts."""
    monkeypatch.setattr(socket, "gethostname", lambda: "Desk")
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (leads_to, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
    assert is_local("desk:8001") == local
