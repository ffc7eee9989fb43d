"""The web server of the demo page: on loopback only, for this page alone."""

from __future__ import annotations

import json
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from clipweld.client._demo import Comparison
from clipweld.client.errors import BadImage, ClientError, InvalidRequest

HOST = "127.0.0.1"
MAX_UPLOAD_BYTES = 20_000_000
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class PageServer(ThreadingHTTPServer):
    """Serves the page on loopback, and answers no other page.

    It refuses requests made by pages of other sites (by Origin and Sec-Fetch-Site), and requests that reached this
    address under another name (by Host), as in DNS rebinding. It logs and stores nothing.

    Args:
        comparison: answers the questions.
        port: port to listen on; 0 takes a free one.

    Raises:
        InvalidRequest: the port can't be used.
    """

    daemon_threads = True

    def __init__(self, comparison: Comparison, port: int) -> None:
        self.comparison = comparison
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as exc:
            reason = (exc.strerror or str(exc)).lower()
            raise InvalidRequest(
                f"no page at {HOST}:{port}: {reason}; give another --port, or --port 0 for one that is free"
            ) from exc
        shown_port = "" if self.server_port == 80 else f":{self.server_port}"
        self.hosts = (f"{HOST}{shown_port}", f"localhost{shown_port}")

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{self.hosts[0]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore browsers that went away; a bug keeps its traceback."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Refusal(Exception):
    """A response that refuses a request: its status, and one line for people."""

    def __init__(self, status: HTTPStatus, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = 30  # seconds for which a connection may be silent

    def respond(self) -> None:
        """Answer any request."""
        try:
            self._refuse_strangers()
            content, kind = self._routed()
            self._send(HTTPStatus.OK, content, kind)
        except _Refusal as exc:
            self._send_refusal(exc)
        except ClientError as exc:
            asked_wrongly = isinstance(exc, (BadImage, InvalidRequest))
            message = str(exc).replace("image 0 (bytes)", "this file")
            self._send_refusal(_Refusal(HTTPStatus.BAD_REQUEST if asked_wrongly else HTTPStatus.BAD_GATEWAY, message))
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            self._send_refusal(_Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "a bug; see the terminal of client demo"))
            raise

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = respond  # noqa: N815

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send in our format what the base class refuses, such as a broken request line."""
        status = HTTPStatus(code)
        self._send_refusal(_Refusal(status, message or status.phrase))

    def log_message(self, *args: Any) -> None:
        """Log nothing."""

    def version_string(self) -> str:
        """Return a name without the versions of Python and its library."""
        return "clipweld"

    def _refuse_strangers(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            raise _Refusal(HTTPStatus.FORBIDDEN, f"this page is at {self.server.url} and has no other name")
        origin = self.headers.get("Origin", f"http://{hosts[0]}")
        site = self.headers.get("Sec-Fetch-Site", "same-origin")
        if origin != f"http://{hosts[0]}" or site not in ("same-origin", "none"):
            raise _Refusal(
                HTTPStatus.FORBIDDEN, f"another site asked; to see the page, type its address: {self.server.url}"
            )

    def _routed(self) -> tuple[bytes, str]:
        """Return the content and its type."""
        target = urlsplit(self.path)
        if target.path == "/answer":
            self._refuse_unless("POST")
            return _as_json(self._answer(parse_qs(target.query)))
        if target.path == "/state":
            self._refuse_unless("GET", "HEAD")
            return _as_json({**self.server.comparison.state(), "max_upload_bytes": MAX_UPLOAD_BYTES})
        if target.path in FILES:
            self._refuse_unless("GET", "HEAD")
            name, kind = FILES[target.path]
            return Path(__file__).with_name("page").joinpath(name).read_bytes(), kind
        raise _Refusal(HTTPStatus.NOT_FOUND, f"nothing here; the page is at {self.server.url}")

    def _refuse_unless(self, *methods: str) -> None:
        if self.command not in methods:
            allowed = ", ".join(methods)
            raise _Refusal(HTTPStatus.METHOD_NOT_ALLOWED, f"{self.command} is not taken, {allowed} is", Allow=allowed)

    def _answer(self, asked: dict[str, list[str]]) -> dict[str, Any]:
        """Answer a question. Body: the image file. Query: ``task=NAME``, or one ``label=TEXT`` per label."""
        task = asked.get("task", [None])[0]
        return self.server.comparison.answer(self._image(), asked.get("label", []), task)

    def _image(self) -> bytes:
        announced = self.headers.get("Content-Length", "")
        if not (announced.isascii() and announced.isdigit()):
            raise _Refusal(HTTPStatus.LENGTH_REQUIRED, "the image came without its size")
        size = int(announced[:15])
        if size > MAX_UPLOAD_BYTES:
            raise _Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the image has {size / 1e6:.1f} MB; at most {MAX_UPLOAD_BYTES / 1e6:g} MB are taken",
            )
        image = self.rfile.read(size)
        if len(image) < size:
            raise _Refusal(HTTPStatus.BAD_REQUEST, "the image did not arrive whole; send it again")
        return image

    def _send_refusal(self, refusal: _Refusal) -> None:
        content, kind = _as_json({"error": str(refusal)})
        self._send(refusal.status, content, kind, **refusal.headers)

    def _send(self, status: HTTPStatus, content: bytes, kind: str, **more: str) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind, "Content-Length": str(len(content)), **HEADERS, **more
        }.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _as_json(value: Any) -> tuple[bytes, str]:
    return json.dumps(value, ensure_ascii=False).encode(), "application/json"
