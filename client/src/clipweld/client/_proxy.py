"""The proxy that environment variables put between this machine and a server."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from clipweld.client._address import Address
from clipweld.client.errors import InvalidRequest

_LOOPBACK_NAMES = {"localhost", "localhost.localdomain", "localhost6", "ip6-localhost", "ip6-loopback"}


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy. Its text is the address and the variable that named it, without credentials.

    Attributes:
        url: ``http://host:port``.
        variable: the variable that named it, in small letters.
        user: user name; None if there are no credentials. Never shown.
        password: password, which may be empty. Never shown.
    """

    url: str
    variable: str
    user: str | None = field(default=None, repr=False)
    password: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"{self.url} ({self.variable})"

    @property
    def place(self) -> tuple[str, int]:
        """Its host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 80


def proxy_of(address: Address) -> Proxy | None:
    """Return the proxy through which requests to a server go; None if there is none.

    Loopback is always reached directly. For gRPC the first of grpc_proxy, https_proxy and http_proxy applies, for HTTP
    the one of the scheme; no_proxy lists hosts, domains and networks that are reached directly. The names of the
    variables may be in capital letters.

    Raises:
        InvalidRequest: the variable does not name an HTTP proxy.
    """
    host = address.host.strip("[]")
    if is_loopback(host):
        return None
    from urllib.request import getproxies_environment

    named = getproxies_environment()
    if _is_bypassed(host, address, named):
        return None
    schemes = ("grpc", "https", "http") if address.protocol == "grpc" else ("https" if address.encrypted else "http",)
    for scheme in schemes:
        if url := named.get(scheme):
            return _read(url if "://" in url else f"http://{url}", f"{scheme}_proxy", host)
    return None


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, judged by its spelling alone."""
    name = host.rstrip(".").lower()
    if name in _LOOPBACK_NAMES or name.endswith(".localhost"):
        return True
    found = _ip(name)
    mapped = getattr(found, "ipv4_mapped", None) or found
    return mapped is not None and (mapped.is_loopback or mapped.is_unspecified)


def _is_bypassed(host: str, address: Address, named: dict[str, str]) -> bool:
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

    lists = ("no", "no_grpc")[: 1 + (address.protocol == "grpc")]
    listed = ",".join(named[name] for name in lists if named.get(name))
    if proxy_bypass_environment(f"{host}:{address.port}" if ":" not in host else host, {"no": listed}):
        return True
    found = _ip(host)
    for entry in listed.split(",") if found is not None else ():
        with suppress(ValueError):
            if found in ipaddress.ip_network(entry.strip(" []"), strict=False):
                return True
    return False


def _read(url: str, variable: str, host: str) -> Proxy:
    try:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname:
            name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
            user = None if parts.username is None else unquote(parts.username)
            shown = f"http://{name}:{parts.port or 80}"
            return Proxy(shown, variable, user, unquote(parts.password or ""))
    except ValueError:
        pass
    raise InvalidRequest(  # the value is not shown: it may contain a password
        f"{variable} in the environment names no proxy that can be used for {host}; expected http://host:port, or the "
        "host in no_proxy"
    )


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with suppress(ValueError):
        return ipaddress.ip_address(host)
    with suppress(OSError, UnicodeError):
        return ipaddress.IPv4Address(socket.inet_aton(host))  # 127.1 and the like, which the system accepts
    return None
