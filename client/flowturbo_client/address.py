"""Where a server is, and whether a proxy stands between: gRPC takes one from the environment."""

import ipaddress
import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

# In the order in which gRPC looks for them; it knows no others.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_SCHEME = re.compile(r"^(dns|ipv4|ipv6):(//[^/]*/)?")
_PORT = re.compile(r":\d+$")


def is_local(url: str) -> bool:
    """Whether a gRPC target is on this machine: loopback addresses, localhost, Unix sockets."""
    if url.startswith(("unix:", "unix-abstract:")):
        return True
    return all(_is_loopback(_host(each)) for each in re.sub(_SCHEME, "", url).split(","))


def _host(address: str) -> str:
    """Without the port, and without the brackets of an IPv6 address."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    # Several colons without brackets are an IPv6 address alone.
    return address if address.count(":") > 1 else re.sub(_PORT, "", address)


def _is_loopback(host: str) -> bool:
    name = host.lower().rstrip(".")
    if name in ("localhost", "ip6-localhost", "ip6-loopback") or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    # Nobody else can be reached by the unspecified address, 0.0.0.0 or ::, either.
    return any(a.is_loopback or a.is_unspecified for a in (address, mapped or address))


def proxy_hint(url: str, environment: Mapping[str, str] = os.environ) -> str:
    """What to say of the proxy that calls to `url` go through, "" where there is none."""
    name = next((name for name in _PROXIES if environment.get(name)), None)
    exempt = environment.get("no_grpc_proxy") or environment.get("no_proxy") or ""
    host = _host(re.sub(_SCHEME, "", url))
    if name is None or is_local(url):
        return ""
    if any(host.endswith(part.strip()) for part in exempt.split(",") if part.strip()):
        return ""
    proxy = urlsplit(environment[name])
    shown = f"{proxy.hostname or environment[name]}{f':{proxy.port}' if proxy.port else ''}"
    return f"; calls go through the proxy {shown} ({name}): no_proxy={host} leaves it out"
