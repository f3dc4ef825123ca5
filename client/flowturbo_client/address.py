"""Whether a server is on this machine, and which proxy of the environment gRPC uses."""

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from urllib.parse import unquote

# In the order in which gRPC reads them; it reads no others.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_SCHEME = re.compile(r"^(dns|ipv4|ipv6|xds):(//[^/]*/|/{0,2})", re.IGNORECASE)
_NAMES = ("localhost", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback")
_PORT = re.compile(r":\d+$")


def is_local(url: str) -> bool:
    """Whether a gRPC target is on this machine: loopback addresses, localhost, Unix sockets."""
    if url.strip().lower().startswith(("unix:", "unix-abstract:")):
        return True
    return all(map(_is_loopback, _hosts(url)))


def _hosts(url: str) -> list[str]:
    """The hosts of a gRPC target, without scheme and ports."""
    return [_host(each) for each in unquote(re.sub(_SCHEME, "", url.strip())).split(",")]


def _host(address: str) -> str:
    """The host without its port and without the brackets of an IPv6 address."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    # Several colons without brackets: an IPv6 address without a port.
    return address if address.count(":") > 1 else re.sub(_PORT, "", address)


def _is_loopback(host: str) -> bool:
    name = host.lower().rstrip(".")
    plain = re.sub(r"\.localdomain[46]?$", "", name)
    if plain in _NAMES or name.endswith(".localhost"):
        return True
    if name == socket.gethostname().lower():
        return _leads_to_loopback(name)
    address = _address(host)
    if address is None:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    # The unspecified address, 0.0.0.0 or ::, also reaches only this machine.
    return any(a.is_loopback or a.is_unspecified for a in (address, mapped or address))


def _leads_to_loopback(name: str) -> bool:
    try:
        return all(_is_loopback(str(found[4][0])) for found in socket.getaddrinfo(name, None))
    except OSError:
        return False


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that `host` is; None for a name."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))  # short forms, such as 127.1
    except OSError:
        return None


def proxy_hint(url: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a hint on the proxy that calls to `url` go through, "" without a proxy.

    For gRPC a variable counts if it is set, even if it is empty.
    """
    name = next((name for name in _PROXIES if name in environment), None)
    if name is None or not environment[name] or is_local(url):
        return ""
    exempt = environment.get("no_grpc_proxy", environment.get("no_proxy", ""))
    host = _hosts(url)[0]
    if any(_is_exempt(host, part.strip()) for part in exempt.split(",") if part.strip()):
        return ""
    # Without the user name and the password.
    shown = re.sub(r"^(\w+://)?([^/]*@)?", "", environment[name]).rstrip("/")
    return f"; calls go through the proxy {shown} ({name}); bypass it with no_proxy={host}"


def _is_exempt(host: str, entry: str) -> bool:
    """Whether an entry of no_proxy matches `host`: the end of a name, or a network."""
    if host.lower().endswith(entry.lower()):
        return True
    address = _address(host)
    try:
        return address is not None and address in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False
