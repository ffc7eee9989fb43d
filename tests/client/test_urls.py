"""Images from URLs: only where allowed, within limits, and never from inside the network."""

import base64
import contextlib
import functools
import io
import json
import socket
import ssl
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import trustme
from PIL import Image

from clipweld.client import ZeroShotClassifier, _urls
from clipweld.client._images import Reading, name_of, preprocess
from clipweld.client._urls import fetch
from clipweld.client.cli import main
from clipweld.client.errors import BadImage

INSIDE = (
    "127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.0.0.1", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]",
    "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255",
    "[fe80::1]", "[fc00::1]", "[fec0::1]", "[ff02::1]", "[2002:7f00:1::]", "[64:ff9b::a00:1]", "[::ffff:10.0.0.1]",
)  # fmt: skip


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Serves an image at ``/image``; other paths misbehave."""

    def do_GET(self):
        self.server.asked.append(self.path)
        kind, _, rest = self.path.removeprefix("/").partition("/")
        with_body = {"image": png(), "page": b"<html>", "short": png()}.get(kind, b"")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest.replace("PORT", str(self.server.server_port)))
        elif kind == "loop":
            self.send_response(301)
            self.send_header("Location", "/loop")
        elif kind == "drip":
            for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
            return
        else:
            self.send_response(404 if kind == "missing" else 200)
        if kind == "packed":
            self.send_header("Content-Encoding", "gzip")
        if kind == "large":
            self.send_header("Content-Length", "50000001")
        elif kind != "endless":
            self.send_header("Content-Length", str(len(with_body) + (9 if kind == "short" else 0)))
        self.end_headers()
        self.wfile.write(with_body)
        while kind == "endless":
            self.wfile.write(bytes(1 << 16))

    def log_message(self, *args):
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Ignore errors: clients hang up as soon as they have read enough."""


@contextlib.contextmanager
def serving(context=None):
    with Quiet(("127.0.0.1", 0), Handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        server.asked = []
        server.address = f"http{'s' if context else ''}://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def site():
    with serving() as server:
        yield server


@pytest.fixture
def connections(monkeypatch):
    """The addresses that the test tried to connect to; every connection is refused."""
    tried = []

    def connect(self, address):
        tried.append(address)
        raise ConnectionRefusedError("this test reaches nobody")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return tried


def test_an_image_is_fetched_from_its_url_and_through_redirects(site):
    assert fetch(f"{site.address}/image", "it", loopback=True) == png()
    assert fetch(f"{site.address}/to//image", "it", loopback=True) == png()
    assert fetch(f"{site.address}/to/http://127.0.0.1:PORT/image", "it", loopback=True) == png()


@pytest.mark.parametrize("host", INSIDE)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_addresses_inside_the_network_are_refused_without_a_connection(connections, host, scheme):
    with pytest.raises(BadImage, match=r"^it cannot be fetched: .* is no public address; fetch it yourself") as caught:
        fetch(f"{scheme}://{host}/image", "it")
    assert connections == []
    assert "\n" not in str(caught.value)


def test_a_name_is_resolved_once_and_the_checked_address_is_used(monkeypatch, connections):
    """Otherwise a name could resolve to a public address when checked and a private one when used: DNS rebinding."""
    answers = [["93.184.216.34"], ["127.0.0.1"]]
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, port, **_: [(2, 1, 6, "", (ip, port)) for ip in answers.pop(0)]
    )
    with pytest.raises(BadImage, match="cannot be fetched"):
        fetch("http://changes.example/image", "it")
    assert (connections, len(answers)) == ([("93.184.216.34", 80)], 1)
    answers[:] = [["10.0.0.1", "93.184.216.34"]]  # of several addresses, only public ones are used
    with pytest.raises(BadImage, match="cannot be fetched"):
        fetch("http://both.example/image", "it")
    assert connections[1:] == [("93.184.216.34", 80)]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("to/file:///etc/passwd", "it redirects to scheme 'file', expected http or https"),
        ("to/ftp://127.0.0.1/a.png", "it redirects to scheme 'ftp', expected http or https"),
        ("to/http://169.254.169.254/latest", "169.254.169.254 is at 169.254.169.254, which is no public address"),
        ("to/http://me:secret@127.0.0.1:PORT/image", "it holds a user name or a password"),
        ("loop", "it redirects more than 5 times"),
        ("missing", "the server answered 404 Not Found"),
        ("large", "it has 50,000,001 bytes, at most 50,000,000 are taken"),
        ("endless", "it has more than 50,000,000 bytes"),
        ("short", "it ended 9 bytes early"),
        ("packed", "the server answered with compressed content"),
    ],
)
def test_bad_redirects_and_bad_answers_are_refused(site, path, message):
    with pytest.raises(BadImage) as caught:
        fetch(f"{site.address}/{path}", "it", loopback=True)
    assert str(caught.value).startswith(f"it cannot be fetched: {message}")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/", "Connection refused"),
        ("http://127.0.0.1:99999/", "Port out of range"),
        ("http:///image", "it names no host"),
        ("http://127.0.0.1:x/", "Port could not be cast"),
    ],
)
def test_urls_that_cannot_be_reached_are_refused_with_the_reason(url, message):
    with pytest.raises(BadImage, match=rf"^it cannot be fetched: .*{message}"):
        fetch(url, "it", loopback=True)


def test_https_verifies_certificates_and_never_redirects_to_http(tmp_path, monkeypatch):
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with serving(context) as server:
        with pytest.raises(BadImage, match=r"^it cannot be fetched: .*certificate verify failed"):
            fetch(f"{server.address}/image", "it", loopback=True)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert fetch(f"{server.address}/to//image", "it", loopback=True) == png()
        with pytest.raises(BadImage, match="it redirects to scheme 'http', expected https"):
            fetch(f"{server.address}/to/http://127.0.0.1:PORT/image", "it", loopback=True)
        with pytest.raises(BadImage, match=r"^it cannot be fetched: .*certificate verify failed"):
            fetch(server.address.replace("127.0.0.1", "localhost") + "/image", "it", loopback=True)


def test_a_server_that_sends_byte_by_byte_times_out(site, monkeypatch):
    monkeypatch.setattr(_urls, "TIMEOUT_S", 0.3)
    with pytest.raises(BadImage, match=r"^it cannot be fetched: not done within 0\.3 s"):
        fetch(f"{site.address}/drip", "it", loopback=True)


@pytest.fixture
def allowed(monkeypatch):
    """Treat loopback as a public address."""
    monkeypatch.setattr(_urls, "fetch", functools.partial(fetch, loopback=True))


def test_a_url_is_refused_by_default_with_the_setting_to_allow_it(fake, site):
    asked = len(site.asked)
    with (
        ZeroShotClassifier(fake.url) as clip,
        pytest.raises(BadImage, match="is a URL; allow that with allow_urls=True"),
    ):
        list(clip.classify(f"{site.address}/image", ["cat", "dog"]))
    assert len(site.asked) == asked


@pytest.mark.usefixtures("allowed")
def test_urls_may_be_mixed_with_other_images(fake, site):
    url = f"{site.address}/image"
    with ZeroShotClassifier(fake.url, allow_urls=True) as clip:
        one, other = clip.classify([url, png()], ["cat", "dog"])
        with pytest.raises(BadImage, match=rf"^{site.address}/page \(6 bytes\) is no image; expected AVIF"):
            list(clip.classify(f"{site.address}/page", ["cat", "dog"]))
    assert (one.image, one.predictions) == (url, other.predictions)


@pytest.mark.usefixtures("allowed")
def test_the_command_accepts_urls_with_a_flag_and_writes_them_to_results(fake, site, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["client", "classify", *arguments, "--labels", "cat, dog", "--url", fake.url])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code or 0, *capsys.readouterr()

    url, out = f"{site.address}/image", tmp_path / "a.jsonl"
    code, _, err = run(url, "--out", str(out))
    assert (code, err) == (1, f"client: {url} is a URL; --allow-urls allows that\n")
    assert list(tmp_path.iterdir()) == []
    code, said, _ = run(url, "--allow-urls", "--out", str(out), "--json")
    assert (code, json.loads(said)["images"]) == (0, 1)
    assert json.loads(out.read_text())["image"] == url


def test_passwords_in_urls_are_not_printed():
    url = "https://me:secret@example.org/a.png?size=1@2"
    assert name_of(url, 0) == "https://...@example.org/a.png?size=1@2"
    assert name_of("ftp://me:secret@example.org", 0) == "ftp://...@example.org"
    for reading, message in ((Reading(), "is a URL"), (Reading(allow_urls=True), "it holds a user name or a password")):
        with pytest.raises(BadImage, match=message) as caught:
            preprocess(url, name_of(url, 0), size=32, resize_mode="shortest", interpolation="bicubic", reading=reading)
        assert "secret" not in str(caught.value)


def test_data_urls_are_images():
    sized = {"size": 32, "resize_mode": "shortest", "interpolation": "bicubic"}
    expected = preprocess(png(), "it", **sized)
    encoded = base64.b64encode(png()).decode()
    url = f"data:image/png;base64,{encoded}"
    for one in (url, f"DATA:;BASE64,{encoded}", "data:image/png," + "".join(f"%{byte:02x}" for byte in png())):
        np.testing.assert_array_equal(preprocess(one, "it", **sized, reading=Reading()), expected)
    assert name_of(url, 3) == name_of(url, 4) != name_of(url + "AAAA", 3)
    assert len(name_of(url, 3)) < 40
    with pytest.raises(BadImage, match=r"^it is damaged \("):
        preprocess("data:image/png;base64,@@@", "it", **sized)
