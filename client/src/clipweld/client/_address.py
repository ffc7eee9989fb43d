"""The address of a server: host, port, protocol, certificates and headers."""

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
    """Certificates for ``grpcs://`` and ``https://`` connections.

    Attributes:
        ca: PEM file of the certificate authorities to trust; None: for ``https://`` those of the system, for
            ``grpcs://`` those that gRPC ships.
        certificate: PEM file of the client's own certificate, for servers that require one. Needs ``key``.
        key: PEM file of the private key of ``certificate``.

    Raises:
        InvalidRequest: a path is not a file, or only one of ``certificate`` and ``key`` is given.

    Example:
        >>> from clipweld.client import TLS, ZeroShotClassifier
        >>> clip = ZeroShotClassifier("grpcs://clip.example.org:443", tls=TLS(ca="ca.pem"))  # doctest: +SKIP
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
        """Return an SSL context with these certificates, for Python's own sockets.

        Raises:
            InvalidRequest: a file does not hold certificates, or not the key of the certificate.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (ssl.SSLError, OSError) as exc:
            raise InvalidRequest(f"tls: certificates cannot be read ({exc}); expected PEM files that fit") from exc
        return context

    def contents(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Return the contents of the files for authorities, key and certificate; None for each that is not given."""
        ca, key, certificate = (
            None if file is None else Path(file).read_bytes() for file in (self.ca, self.key, self.certificate)
        )
        return ca, key, certificate


@dataclass(frozen=True)
class Address:
    """The address of one server, and what connecting to it needs.

    Attributes:
        protocol: "grpc" or "http".
        host: name or IP address; an IPv6 address is in brackets.
        encrypted: whether the connection uses TLS.
        tls: certificates, if it does.
        headers: sent with every request, such as ``{"authorization": "Bearer ..."}``; not in the repr, as they may be
            secrets.
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
    """Parse ``host:port``, ``grpc://host:port``, ``http://host:port``, ``grpcs://host:port`` or ``https://host:port``.

    Raises:
        InvalidRequest: the URL has another form, certificates are given without TLS, or a header can't be sent.
    """
    if not isinstance(url, str):
        raise InvalidRequest(f"url is {shown(url)}; {_EXPECTED}")
    if "@" in url:  # not shown: what comes before it may be a password
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
    """Return headers that both protocols can send. No message contains their values, which may be secrets."""
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
# Set by the protocols themselves, to describe a request and its body.
_OURS = {
    "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect",
    "inference-header-content-length", "te", "trailer", "transfer-encoding", "upgrade",
}  # fmt: skip
