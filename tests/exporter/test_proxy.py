"""Loopback is reached without a proxy; other hosts follow the usual variables, and errors name the proxy."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from clipweld.exporter.errors import ServerUnreachable
from clipweld.exporter.serving.connection import Connection, ModelControl
from clipweld.exporter.serving.proxy import is_loopback, proxy_of
from clipweld.exporter.serving.switch import loaded_versions, promote
from clipweld.exporter.serving.triton import serve

VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "no_proxy", "no_grpc_proxy")
ELSEWHERE = "models.invalid:8001"  # a host name that is never resolved


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in VARIABLES:
        for spelling in (name, name.upper()):
            monkeypatch.delenv(spelling, raising=False)


@pytest.fixture
def proxy():
    """A proxy that refuses everything, and the list of its requests."""
    asked = []

    class Refusing(BaseHTTPRequestHandler):
        def refuse(self):
            asked.append((self.command, self.path, self.headers.get("Proxy-Authorization")))
            self.send_error(502, "refused by the proxy")

        do_CONNECT = do_GET = do_POST = refuse  # noqa: N815

        def log_message(self, *_):
            pass

    listening = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{listening.server_address[1]}", asked
    listening.shutdown()
    listening.server_close()


@pytest.mark.parametrize("spelling", ["small", "capital"])
def test_loopback_is_reached_without_a_proxy(repository, proxy, monkeypatch, spelling):
    address, asked = proxy
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
        monkeypatch.setenv(name if spelling == "small" else name.upper(), f"http://{address}")
    with serve(repository.path) as server:
        port = server.url.rpartition(":")[2]
        for url in (server.url, server.http_url, f"localhost:{port}"):
            assert loaded_versions(repository, url)[-1] == repository.served
            promote(repository, 3 - repository.served, [url])
    assert asked == []


@pytest.mark.parametrize(
    ("scheme", "variable"),
    [("grpc", "grpc_proxy"), ("grpc", "https_proxy"), ("grpc", "HTTP_PROXY"), ("http", "http_proxy")],
)
def test_other_hosts_are_reached_through_the_proxy_and_errors_name_it(proxy, monkeypatch, scheme, variable):
    address, asked = proxy
    monkeypatch.setenv(variable, f"http://me:secret@{address}")
    with pytest.raises(ServerUnreachable) as caught:
        ModelControl(f"{scheme}://{ELSEWHERE}", "key", 5)
    assert f"through the proxy http://{address} ({variable.lower()})" in str(caught.value)
    assert "secret" not in str(caught.value)
    method, target, authorization = asked[0]
    assert ELSEWHERE in target
    assert method == ("CONNECT" if scheme == "grpc" else "POST")  # with the full URL
    assert authorization == "Basic bWU6c2VjcmV0"


def test_hosts_listed_in_no_proxy_are_reached_directly(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:1")
    assert str(proxy_of(ELSEWHERE, "http")) == "http://proxy.invalid:1 (http_proxy)"
    for listed in ("models.invalid", ".invalid", "*", "a, invalid"):
        monkeypatch.setenv("no_proxy", listed)
        assert proxy_of(ELSEWHERE, "http") is proxy_of(ELSEWHERE, "grpc") is None
    monkeypatch.setenv("no_proxy", "10.0.0.0/8")
    assert proxy_of("10.1.2.3:8001", "grpc") is None
    assert proxy_of("11.1.2.3:8001", "grpc") is not None


def test_an_invalid_proxy_is_refused_without_showing_its_password(monkeypatch):
    monkeypatch.setenv("grpc_proxy", "socks5://me:secret@proxy.invalid:1")
    with pytest.raises(ServerUnreachable, match=r"grpc_proxy .* names no proxy .* models\.invalid") as caught:
        Connection(ELSEWHERE, 1)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST.", "127.0.0.1", "127.9.9.9", "127.1", "::1", "::ffff:127.0.0.1", "a.localhost"]
)
def test_every_spelling_of_loopback_is_recognised(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["localhost.example", "128.0.0.1", "10.0.0.1", "::2", "", "127.0.0.1.example"])
def test_names_that_only_look_like_loopback_are_not(host):
    assert not is_loopback(host)


def test_a_listener_that_never_answers_times_out(monkeypatch):
    monkeypatch.setattr("clipweld.exporter.serving.connection.CONNECT_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ServerUnreachable, match=json.dumps(f"127.0.0.1:{port}").strip('"')):
            ModelControl(f"127.0.0.1:{port}", "key", 60)
