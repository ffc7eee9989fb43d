"""Which proxy requests go through, and that errors name it. All on loopback: ".invalid" is never resolved."""

import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from select import select
from socket import create_connection, create_server
from urllib.parse import urlsplit

import pytest

from clipweld.client import ZeroShotClassifier
from clipweld.client._address import parse_url
from clipweld.client._proxy import proxy_of
from clipweld.client.errors import ClientError, InvalidRequest, NotAllowed, RequestTimeout, ServerUnavailable

VARIABLES = ("http", "https", "grpc", "all", "no", "no_grpc")
SECRET = "pass%40word"


class Proxy(BaseHTTPRequestHandler):
    """A proxy that connects every host name to ports of this machine, or refuses."""

    def do_CONNECT(self):
        if self.refused():
            return
        self.send_response(200)
        self.end_headers()
        with create_connection(("127.0.0.1", self.server.grpc_port)) as beyond:
            other = {self.connection: beyond, beyond: self.connection}
            while True:
                for ready in select(list(other), [], [])[0]:
                    if not (data := ready.recv(2**16)):
                        return
                    other[ready].sendall(data)

    def do_GET(self):
        if self.refused():
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = HTTPConnection("127.0.0.1", self.server.http_port)
        headers = {name: value for name, value in self.headers.items() if not name.lower().startswith("proxy")}
        connection.request(self.command, urlsplit(self.path).path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name in ("Content-Type", "Content-Encoding", "Inference-Header-Content-Length"):
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        connection.close()

    do_POST = do_GET  # noqa: N815

    def refused(self):
        self.server.asked.append((self.command, self.path, self.headers.get("Proxy-Authorization")))
        if self.server.status:
            self.send_error(self.server.status)
        return bool(self.server.status)

    def log_message(self, *args):
        """Nothing is logged."""


@pytest.fixture
def proxy():
    """A proxy that refuses everything until it gets the ports of a server; ``asked`` lists its requests."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        server.daemon_threads, server.status, server.asked = True, 403, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def environment(monkeypatch):
    """A function that sets the given proxy variables and unsets all others."""

    def set_to(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(f"{name}_proxy", raising=False)
            monkeypatch.delenv(f"{name}_proxy".upper(), raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_to()
    return set_to


def everything(url):
    return {"http_proxy": url, "https_proxy": url, "grpc_proxy": url, "HTTP_PROXY": url, "all_proxy": url}


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST"])
def test_loopback_is_contacted_without_a_proxy(server, proxy, environment, connect, picture, name):
    environment(**everything(proxy.url))
    for url in (server.url, server.http_url):
        with connect(url.replace("127.0.0.1", name), timeout_s=10) as clip:
            assert clip.classify(picture, ["cat", "dog"])[0].version == 2
    assert proxy.asked == []


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_other_hosts_are_reached_through_the_proxy(server, proxy, environment, connect, picture, scheme):
    proxy.status, proxy.grpc_port, proxy.http_port = 0, *(int(u.split(":")[-1]) for u in (server.url, server.http_url))
    environment(http_proxy=proxy.url.replace("//", f"//me:{SECRET}@"))
    with connect(f"{scheme}://clipweld.invalid:80", timeout_s=20) as clip:
        assert clip.classify(picture, ["cat", "dog"])[0].version == 2
    assert {who for *_, who in proxy.asked} == {"Basic bWU6cGFzc0B3b3Jk"}
    assert all("clipweld.invalid:80" in path or "//clipweld.invalid/" in path for _, path, _ in proxy.asked)


@pytest.mark.parametrize(
    "url", ["grpc://clipweld.invalid:80", "http://clipweld.invalid:80", "https://clipweld.invalid:443"]
)
@pytest.mark.parametrize("status", [403, 407, 502])
def test_an_error_names_the_proxy_without_its_password(proxy, environment, connect, url, status):
    proxy.status = status
    environment(**everything(proxy.url.replace("//", f"//me:{SECRET}@")))
    with connect(url, timeout_s=5, retries=0) as clip, pytest.raises((ServerUnavailable, NotAllowed)) as caught:
        clip.versions()
    assert f"clipweld.invalid:{url[-2:] if url[-3] == ':' else 443} through the proxy {proxy.url} (" in str(
        caught.value
    )
    assert "no_proxy" in str(caught.value)
    assert "pass" not in str(caught.value)
    assert proxy.asked


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_proxy_that_is_unreachable_or_silent_is_named(environment, connect, scheme):
    with create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        environment(http_proxy=f"http://me:{SECRET}@127.0.0.1:{port}")
        with connect(f"{scheme}://clipweld.invalid:80", timeout_s=0.5, retries=0) as clip:
            with pytest.raises(ClientError, match=f"through the proxy http://127.0.0.1:{port} ") as caught:
                clip.versions()
            assert isinstance(caught.value, (RequestTimeout, ServerUnavailable))
    refused = r"\(http_proxy\): connection refused; correct http_proxy, or list"
    with (
        connect(f"{scheme}://clipweld.invalid:80", timeout_s=5, retries=0) as clip,
        pytest.raises(ServerUnavailable, match=refused),
    ):
        clip.versions()


A, B, C = (f"http://{name}:3128" for name in "abc")


@pytest.mark.parametrize(
    ("url", "variables", "expected"),
    [
        ("grpc://host:1", {"grpc_proxy": A, "https_proxy": B, "http_proxy": C}, A),
        ("grpc://host:1", {"https_proxy": B, "http_proxy": C}, B),
        ("grpc://host:1", {"HTTP_PROXY": C}, C),
        ("http://host:1", {"grpc_proxy": A, "https_proxy": B, "http_proxy": C}, C),
        ("https://host:1", {"http_proxy": C}, None),
        ("https://host:1", {"HTTPS_PROXY": B}, B),
        ("http://host:1", {"http_proxy": "a:3128"}, A),
        ("http://host:1", {"http_proxy": "http://a"}, "http://a:80"),
        ("http://host:1", {"http_proxy": A, "HTTP_PROXY": B}, A),
        ("http://host:1", {"http_proxy": A, "no_proxy": "host"}, None),
        ("http://host:1", {"http_proxy": A, "NO_PROXY": "other, .host"}, None),
        ("http://host.of.mine:1", {"http_proxy": A, "no_proxy": "of.mine"}, None),
        ("http://host:1", {"http_proxy": A, "no_proxy": "host:1"}, None),
        ("http://host:1", {"http_proxy": A, "no_proxy": "host:2"}, A),
        *((f"{scheme}://host:1", {"http_proxy": A, "no_proxy": "*"}, None) for scheme in ("grpc", "http")),
        ("http://10.1.2.3:1", {"http_proxy": A, "no_proxy": "10.0.0.0/8"}, None),
        ("http://11.1.2.3:1", {"http_proxy": A, "no_proxy": "10.0.0.0/8"}, A),
        ("http://[fd00::1]:1", {"http_proxy": A, "no_proxy": "fd00::/8"}, None),
        ("http://host:1", {"http_proxy": A, "no_grpc_proxy": "host"}, A),
        ("grpc://host:1", {"http_proxy": A, "no_grpc_proxy": "host"}, None),
        *(
            (f"grpc://{host}:1", {"grpc_proxy": A}, None)
            for host in ("127.8.9.1", "[::1]", "localhost.", "a.localhost")
        ),
        *((f"http://{host}:1", {"http_proxy": A}, None) for host in ("127.1", "[::ffff:127.0.0.1]", "0.0.0.0", "[::]")),
        ("http://localhost.com:1", {"http_proxy": A}, A),
        ("http://128.0.0.1:1", {"http_proxy": A}, A),
    ],
)
def test_the_usual_proxy_variables_are_followed(environment, url, variables, expected):
    environment(**variables)
    found = proxy_of(parse_url(url))
    assert (found and found.url) == expected


@pytest.mark.parametrize("value", ["socks5://a:1", "https://a:1", "http://", "http://a:port", f"ftp://me:{SECRET}@a:1"])
def test_a_proxy_setting_that_is_not_http_is_refused_and_its_variable_named(environment, connect, value):
    environment(HTTPS_PROXY=value)
    with (
        connect("grpc://host:1") as clip,
        pytest.raises(InvalidRequest, match=r"^https_proxy in the environment") as caught,
    ):
        clip.versions()
    assert "pass" not in str(caught.value)


def test_an_invalid_proxy_setting_does_not_matter_for_loopback(fake, environment):
    environment(**everything("nonsense://"))
    with ZeroShotClassifier(fake.url) as clip:
        assert clip.versions() == [1, 2]
