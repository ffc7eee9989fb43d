"""Which proxy the environment's variables put between this machine and a server."""

from __future__ import annotations

import base64
import ipaddress
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]  # typeshed

from clipweld.exporter.errors import ServerUnreachable

LOOPBACK_NAMES = {"localhost", "localhost.localdomain", "localhost6", "ip6-localhost", "ip6-loopback"}


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy. As text, it is its address and the variable that named it, without credentials.

    Attributes:
        host, port: where it is.
        variable: which one named it, in small letters.
        credentials: ``user:password@``, or nothing; never shown.
    """

    host: str
    port: int
    variable: str
    credentials: str = field(default="", repr=False)

    @property
    def url(self) -> str:
        """For gRPC, with credentials."""
        return f"http://{self.credentials}{self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that it expects."""
        text = unquote(self.credentials.removesuffix("@"))
        return {"Proxy-Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"} if text else {}

    def __str__(self) -> str:
        return f"http://{self.host}:{self.port} ({self.variable})"


def proxy_of(address: str, scheme: str) -> Proxy | None:
    """The proxy that requests to a server go through; None where there is none, as to loopback.

    Args:
        address: ``host:port``.
        scheme: "grpc", for which the first of grpc_proxy, https_proxy and http_proxy counts, or "http".

    Raises:
        ServerUnreachable: the variable names something else than an HTTP proxy.
    """
    host = urlsplit(f"//{address}").hostname or ""
    named = getproxies_environment()
    if is_loopback(host) or _is_bypassed(host, address, scheme, named):
        return None
    for name in ("grpc", "https", "http") if scheme == "grpc" else (scheme,):
        if url := named.get(name):
            return _read(url if "://" in url else f"http://{url}", f"{name}_proxy", host)
    return None


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its spelling alone."""
    name = host.rstrip(".").lower()
    if name in LOOPBACK_NAMES or name.endswith(".localhost"):
        return True
    found = _ip(name)
    mapped = getattr(found, "ipv4_mapped", None) or found
    return mapped is not None and (mapped.is_loopback or mapped.is_unspecified)


def _is_bypassed(host: str, address: str, scheme: str, named: dict[str, str]) -> bool:
    listed = ",".join(named[name] for name in ("no", "no_grpc")[: 1 + (scheme == "grpc")] if named.get(name))
    if proxy_bypass_environment(host if ":" in host else address, {"no": listed}):
        return True
    found = _ip(host)
    for entry in listed.split(",") if found is not None else ():
        with suppress(ValueError):
            if found in ipaddress.ip_network(entry.strip(" []"), strict=False):
                return True
    return False


def _read(url: str, variable: str, host: str) -> Proxy:
    with suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname:
            name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
            credentials, _, _ = parts.netloc.rpartition("@")
            return Proxy(name, parts.port or 80, variable, f"{credentials}@" if credentials else "")
    raise ServerUnreachable(  # what it says is not shown: it may have a password in it
        f"{variable} in the environment names no proxy that can be used for {host}; expected http://host:port, or the "
        "host in no_proxy"
    )


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with suppress(ValueError):
        return ipaddress.ip_address(host)
    with suppress(OSError, UnicodeError):
        return ipaddress.IPv4Address(socket.inet_aton(host))  # 127.1, and what else the system takes for one
    return None
