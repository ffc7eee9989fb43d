"""The proxy that environment variables put between this machine and a server."""

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
    """An HTTP proxy. Its text is the address and the variable that named it, without credentials.

    Attributes:
        host: its host name or IP address; an IPv6 address is in brackets.
        port: its port.
        variable: the variable that named it, in small letters.
        credentials: ``user:password@``, or empty; never shown.
    """

    host: str
    port: int
    variable: str
    credentials: str = field(default="", repr=False)

    @property
    def url(self) -> str:
        """The URL for gRPC, with credentials."""
        return f"http://{self.credentials}{self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """The headers that it expects."""
        text = unquote(self.credentials.removesuffix("@"))
        return {"Proxy-Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"} if text else {}

    def __str__(self) -> str:
        return f"http://{self.host}:{self.port} ({self.variable})"


def proxy_of(address: str, scheme: str) -> Proxy | None:
    """Return the proxy through which requests to a server go; None if there is none, as for loopback.

    Args:
        address: ``host:port``.
        scheme: "http", or "grpc", for which the first of grpc_proxy, https_proxy and http_proxy applies.

    Raises:
        ServerUnreachable: the variable does not name an HTTP proxy.
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
    """Whether a host is this machine, judged by its spelling alone."""
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
    raise ServerUnreachable(  # the value is not shown: it may contain a password
        f"{variable} in the environment names no proxy that can be used for {host}; expected http://host:port, or the "
        "host in no_proxy"
    )


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with suppress(ValueError):
        return ipaddress.ip_address(host)
    with suppress(OSError, UnicodeError):
        return ipaddress.IPv4Address(socket.inet_aton(host))  # 127.1 and the like, which the system accepts
    return None
