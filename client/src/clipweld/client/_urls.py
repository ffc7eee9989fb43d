"""Images from http:// and https:// URLs, for callers who allow them: within limits, and never from internal addresses.

A program that fetches URLs given by others can be made to send requests to its own machine or network (server-side
request forgery). So a host name is resolved once, its address is checked, and the connection goes to that very address.
Loopback, private, link-local and other non-public addresses are refused, again at each redirect. No proxy is used,
since it would resolve names itself. One fetch takes at most `TIMEOUT_S` seconds, not counting the look-up of names, and
`MAX_BYTES` bytes.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import ipaddress
import socket
import ssl
import time
from typing import IO, Any
from urllib.parse import SplitResult, quote, unquote_to_bytes, urljoin, urlsplit

from clipweld.client._image_files import one_line
from clipweld.client.errors import BadImage

MAX_BYTES = 50_000_000
TIMEOUT_S = 30.0
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = {"User-Agent": "clipweld", "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch(url: str, name: str, *, loopback: bool = False) -> bytes:
    """Return the bytes of the file at a URL.

    Args:
        url: http:// or https://.
        name: what error messages call it.
        loopback: also fetch from this machine; for tests.

    Raises:
        BadImage: the URL is refused or can't be reached, the file is too large or takes too long, or the answer is
            anything but a file.
    """
    end = time.monotonic() + TIMEOUT_S
    try:
        target = _checked(urlsplit(url))
        for _ in range(1 + MAX_REDIRECTS):
            answer = _ask(target, end, loopback)
            if isinstance(answer, bytes):
                return answer
            target = _checked(urlsplit(urljoin(target.geturl(), answer.location)), before=target)
        raise _Refused(f"it redirects more than {MAX_REDIRECTS} times")
    except _Refused as exc:
        raise BadImage(f"{name} cannot be fetched: {exc}") from exc
    except TimeoutError as exc:
        raise BadImage(f"{name} cannot be fetched: not done within {TIMEOUT_S:g} s") from exc
    except (OSError, ValueError, http.client.HTTPException) as exc:
        raise BadImage(f"{name} cannot be fetched: {getattr(exc, 'strerror', None) or one_line(exc)}") from exc


def data_of(url: str, name: str) -> bytes:
    """Return the bytes in a ``data:`` URL.

    Raises:
        BadImage: it is damaged.
    """
    head, comma, body = url.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        data = unquote_to_bytes(body)
        return base64.b64decode(data, validate=True) if head.lower().endswith(";base64") else data
    except (ValueError, binascii.Error) as exc:
        raise BadImage(f"{name} is damaged ({one_line(exc)}); expected data:image/png;base64,...") from exc


class _Refused(Exception):
    """The reason why nothing is fetched."""


class _Redirect:
    def __init__(self, location: str) -> None:
        self.location = location


class _Timed(io.RawIOBase):
    """A socket with a deadline: each read and write gets the time that is left."""

    def __init__(self, connected: socket.socket, end: float) -> None:
        self._socket, self._end = connected, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(_left(self._end))
        return self._socket.recv_into(buffer)

    def makefile(self, mode: str) -> IO[bytes]:
        return io.BufferedReader(_Timed(self._socket, self._end))

    def sendall(self, data: bytes) -> None:
        self._socket.settimeout(_left(self._end))
        self._socket.sendall(data)


def _ask(target: SplitResult, end: float, loopback: bool) -> bytes | _Redirect:
    secure, host = target.scheme == "https", target.hostname or ""
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    port = target.port or kind.default_port
    connection = kind(host, port)
    with _connected(host, port, end, loopback) as plain:
        used = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
        with used:
            connection.sock = _Timed(used, end)  # has all that http.client needs of a socket
            path = quote(target.path or "/", safe="/%:@!$&'()*+,;=~-._")
            query = f"?{quote(target.query, safe='/%:@!$&()*+,;=~-._?')}" if target.query else ""
            connection.request("GET", path + query, headers=HEADERS)
            return _content(connection.getresponse())


def _content(response: http.client.HTTPResponse) -> bytes | _Redirect:
    location = response.getheader("Location")
    if response.status in REDIRECTS and location:
        return _Redirect(location)
    if response.status != 200:
        raise _Refused(f"the server answered {response.status} {one_line(Exception(response.reason))}")
    if response.getheader("Content-Encoding", "identity").lower() != "identity":
        raise _Refused("the server answered with compressed content, which was not asked for")
    if (response.length or 0) > MAX_BYTES:
        raise _Refused(f"it has {response.length:,} bytes, at most {MAX_BYTES:,} are taken")
    parts, size = [], 0
    while part := response.read(1 << 16):
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise _Refused(f"it has more than {MAX_BYTES:,} bytes")
    if response.length:
        raise _Refused(f"it ended {response.length:,} bytes early")
    return b"".join(parts)


def _connected(host: str, port: int, end: float, loopback: bool) -> socket.socket:
    """Connect to an address of the host that is allowed."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    allowed = [one for one in found if _is_allowed(str(one[4][0]), loopback)]
    if not allowed:
        raise _Refused(f"{host} is at {found[0][4][0]}, which is no public address; fetch it yourself, and give bytes")
    failed: OSError | None = None
    for family, kind, protocol, _, address in allowed:
        connected = socket.socket(family, kind, protocol)
        try:
            connected.settimeout(_left(end))
            connected.connect(address)
            return connected
        except OSError as exc:
            connected.close()
            failed = exc
    raise failed or OSError("no address")


def _is_allowed(address: str, loopback: bool) -> bool:
    ip = _meant(ipaddress.ip_address(address.partition("%")[0]))
    if ip.is_loopback:
        return loopback
    others = ip.is_private or ip.is_link_local or ip.is_multicast or ip.is_reserved or ip.is_unspecified
    return ip.is_global and not others and not getattr(ip, "is_site_local", False)


def _meant(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the IPv4 address that an IPv6 address leads to; other addresses as they are."""
    if isinstance(ip, ipaddress.IPv6Address):
        translated = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None
        return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None) or translated or ip
    return ip


def _checked(target: SplitResult, before: SplitResult | None = None) -> SplitResult:
    """Return the target of the first request or of a redirect, if it may be fetched.

    Raises:
        _Refused: its scheme, host or credentials are not allowed.
        ValueError: its port is not a number.
    """
    schemes = ("https",) if before is not None and before.scheme == "https" else ("http", "https")
    if target.scheme not in schemes:
        what = "it redirects to" if before is not None else "it has"
        raise _Refused(f"{what} scheme {target.scheme!r}, expected {' or '.join(schemes)}")
    if target.username is not None or target.password is not None:
        raise _Refused("it holds a user name or a password; fetch it yourself, and give bytes")
    if not target.hostname:
        raise _Refused("it names no host")
    _ = target.port  # raises the ValueError
    return target


def _left(end: float) -> float:
    """Return the seconds until ``end``, or raise TimeoutError after it."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
