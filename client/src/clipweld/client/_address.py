"""Where a server listens, what is spoken there, and what it wants to see before it answers."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clipweld.client._arguments import shown
from clipweld.client.errors import InvalidRequest

# scheme -> (protocol, encrypted)
_SCHEMES = {"grpc": ("grpc", False), "grpcs": ("grpc", True), "http": ("http", False), "https": ("http", True)}
_EXPECTED = "expected host:port or grpc://host:port (gRPC), or http://host:port; grpcs:// and https:// with TLS"


@dataclass(frozen=True)
class TLS:
    """Certificates for ``grpcs://`` and ``https://``; each a PEM file.

    Attributes:
        ca: authorities that the server's certificate may come from; None: those of the system.
        certificate, key: the client's own, where the server wants one.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise InvalidRequest("tls: a client certificate needs its key, and a key its certificate; give both")
        for name, file in vars(self).items():
            if file is not None and not isinstance(file, (str, Path)):
                raise InvalidRequest(f"tls: {name} is {shown(file)}; expected the path of a PEM file")
            if file is not None and not Path(file).is_file():
                raise InvalidRequest(f"tls: {file} is not a file; expected certificates or a key in PEM")

    def context(self) -> ssl.SSLContext:
        """The same for Python's own sockets.

        Raises:
            InvalidRequest: a file holds something else.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (ssl.SSLError, OSError) as exc:
            raise InvalidRequest(f"tls: certificates cannot be read ({exc}); expected PEM files that fit") from exc
        return context

    def contents(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """What the files hold: authorities, key, certificate."""
        ca, key, certificate = (
            None if file is None else Path(file).read_bytes() for file in (self.ca, self.key, self.certificate)
        )
        return ca, key, certificate


@dataclass(frozen=True)
class Address:
    """One server.

    Attributes:
        protocol: "grpc" or "http".
        encrypted: whether TLS is spoken.
        tls: certificates, where it is.
        headers: sent with every request, such as ``{"authorization": "Bearer ..."}``; never shown.
    """

    protocol: str
    host: str
    port: int
    encrypted: bool = False
    tls: TLS = TLS()
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse_url(url: str, tls: TLS | None = None, headers: Mapping[str, str] | None = None) -> Address:
    """Read ``host:port``, ``grpc://host:port``, ``http://host:port``, ``grpcs://host:port`` or ``https://host:port``.

    Raises:
        InvalidRequest: anything else, certificates for an address without TLS, or headers that can't be sent.
    """
    if not isinstance(url, str):
        raise InvalidRequest(f"url is {shown(url)}; {_EXPECTED}")
    if "@" in url:  # not shown: what stands before it may be a password
        raise InvalidRequest(f"url has a user's name in it; {_EXPECTED}, and headers for who asks")
    try:
        parts = urlsplit(url if "://" in url else f"grpc://{url}")
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError as exc:
        raise InvalidRequest(f"url {shown(url)} cannot be read ({exc}); {_EXPECTED}") from exc
    extra = parts.path.strip("/") or parts.query or parts.fragment
    if parts.scheme not in _SCHEMES or not host or _NO_HOST.search(url) or not port or extra:
        raise InvalidRequest(f"url {shown(url)} cannot be used; {_EXPECTED}")
    protocol, encrypted = _SCHEMES[parts.scheme]
    if tls is not None and not isinstance(tls, TLS):
        raise InvalidRequest(f"tls is {shown(tls)}; expected client.TLS(ca=..., certificate=..., key=...)")
    if tls is not None and not encrypted:
        raise InvalidRequest(f"url {url!r} has no TLS and certificates are given; expected grpcs:// or https://")
    host = f"[{host}]" if ":" in host else host
    return Address(protocol, host, port, encrypted, tls or TLS(), _checked_headers(headers))


def _checked_headers(headers: Mapping[Any, Any] | None) -> dict[str, str]:
    """Headers as both protocols take them; their values, which may be secrets, are in no message."""
    if headers is not None and not isinstance(headers, Mapping):
        raise InvalidRequest(
            f"headers is a {type(headers).__name__}; expected names and values, as in {{'name': '...'}}"
        )
    checked: dict[str, str] = {}
    for given, value in (headers or {}).items():
        name = given.lower() if isinstance(given, str) else ""
        if not _HEADER.fullmatch(name) or name in _OURS or name.startswith("grpc-") or name.endswith("-bin"):
            raise InvalidRequest(
                f"header {shown(given)} cannot be sent; expected a name of letters, digits, '-', '_' and '.', and none "
                "that says how a request is put together"
            )
        if name in checked:
            raise InvalidRequest(f"header {name!r} is given twice; expected each once, whatever its capitals")
        text = str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
        if text is None or not (text.isascii() and text.isprintable()):
            raise InvalidRequest(
                f"header {name!r} cannot be sent: its value, a {type(value).__name__}, is not printable ASCII"
            )
        checked[name] = text
    return checked


_NO_HOST = re.compile(r"[\s\x00-\x1f\x7f\\]")
_HEADER = re.compile(r"[0-9a-z_.-]+")
# What the protocols say themselves about a request and its body.
_OURS = {
    "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect",
    "inference-header-content-length", "te", "trailer", "transfer-encoding", "upgrade",
}  # fmt: skip
