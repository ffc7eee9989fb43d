"""Where a server listens, what is spoken there, and what it wants to see before it answers."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from client.errors import InvalidRequest

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
        for file in (self.ca, self.certificate, self.key):
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
        InvalidRequest: anything else, or certificates for an address without TLS.
    """
    if "@" in url:  # not shown: what stands before it may be a password
        raise InvalidRequest(f"url has a user's name in it; {_EXPECTED}, and headers for who asks")
    try:
        parts = urlsplit(url if "://" in url else f"grpc://{url}")
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise InvalidRequest(f"url {url!r} cannot be read ({exc}); {_EXPECTED}") from exc
    extra = parts.path.strip("/") or parts.query or parts.fragment
    if parts.scheme not in _SCHEMES or not host or not port or extra:
        raise InvalidRequest(f"url {url!r} cannot be used; {_EXPECTED}")
    protocol, encrypted = _SCHEMES[parts.scheme]
    if tls is not None and not encrypted:
        raise InvalidRequest(f"url {url!r} has no TLS and certificates are given; expected grpcs:// or https://")
    lower = {name.lower(): value for name, value in (headers or {}).items()}
    for name, value in lower.items():
        if not name.isascii() or not name or not str(value).isprintable():
            raise InvalidRequest(f"header {name!r} cannot be sent; expected an ASCII name and a printable value")
    return Address(protocol, f"[{host}]" if ":" in host else host, port, encrypted, tls or TLS(), lower)
