"""TLS, client certificates and headers, over both protocols and by both classifiers."""

import asyncio
import ssl
import threading
from contextlib import contextmanager

import grpc
import pytest
import trustme
from aiohttp import ClientSession, web
from tritonclient.grpc import service_pb2_grpc

from clipweld.client import TLS
from clipweld.client.errors import InvalidRequest, NotAllowed, ServerUnavailable

TOKEN = {"Authorization": "Bearer open-sesame"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """PEM files of a certificate authority, a server certificate for 127.0.0.1 and a client certificate."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, identity in (("server", "127.0.0.1"), ("client", "client@example.org")):
        issued = authority.issue_cert(identity)
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    trustme.CA().cert_pem.write_to_path(folder / "other.pem")
    return folder


@contextmanager
def grpc_front(fake, files):
    """Serve the fake server over TLS that requires a client certificate and a token."""

    class Guard(grpc.ServerInterceptor):
        def intercept_service(self, proceed, details):
            given = dict(details.invocation_metadata).get("authorization")
            refuse = grpc.unary_unary_rpc_method_handler(
                lambda request, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
            )
            return proceed(details) if given == TOKEN["Authorization"] else refuse

    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(4), interceptors=[Guard()])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
    credentials = grpc.ssl_server_credentials(
        [((files / "server.key").read_bytes(), (files / "server.pem").read_bytes())],
        (files / "ca.pem").read_bytes(),
        require_client_auth=True,
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"grpcs://127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


@contextmanager
def https_front(triton, files):
    """Serve a real Triton behind a TLS proxy that requires a client certificate and a token."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files / "ca.pem")
    context.load_cert_chain(files / "server.pem", files / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED
    loop, ready, port = asyncio.new_event_loop(), threading.Event(), []

    async def handle(request):
        if request.headers.get("authorization") != TOKEN["Authorization"]:
            return web.json_response({"error": "no token"}, status=401)
        kept = {k: v for k, v in request.headers.items() if k.lower().startswith(("content-type", "inference"))}
        async with (
            ClientSession(auto_decompress=False) as session,
            session.request(
                request.method,
                f"{triton}{request.path_qs}",
                data=await request.read(),
                headers=kept,
                skip_auto_headers=("Accept-Encoding",),
            ) as answer,
        ):
            back = {k: v for k, v in answer.headers.items() if k.lower().startswith(("content-type", "inference"))}
            return web.Response(status=answer.status, body=await answer.read(), headers=back)

    async def start():
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        port.append(site._server.sockets[0].getsockname()[1])
        ready.set()
        return runner

    runner = None

    def serve():
        nonlocal runner
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield f"https://127.0.0.1:{port[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@pytest.fixture(params=["grpcs", "https"])
def url(request, fake, files):
    if request.param == "grpcs":
        with grpc_front(fake, files) as url:
            yield url
    else:
        with https_front(request.getfixturevalue("server").http_url, files) as url:
            yield url


def mutual(files):
    return TLS(ca=files / "ca.pem", certificate=files / "client.pem", key=files / "client.key")


def test_certificates_and_a_token_give_access(url, files, connect, picture):
    with connect(url, headers=TOKEN, tls=mutual(files)) as clip:
        assert clip.versions() == [1, 2]
        (answer,) = clip.classify(picture, ["cat", "dog"])
        assert answer.version == 2


def test_a_missing_or_wrong_token_is_refused(url, files, connect):
    for headers in (None, {"authorization": "Bearer guess"}):
        with (
            connect(url, headers=headers, tls=mutual(files)) as clip,
            pytest.raises(NotAllowed, match=r"wants to know who asks \(no token\); give headers or a certificate"),
        ):
            clip.versions()


def test_a_server_certificate_for_another_host_is_refused(url, files, connect):
    elsewhere = url.replace("127.0.0.1", "localhost")
    with (
        connect(elsewhere, headers=TOKEN, tls=mutual(files), timeout_s=2, retries=0) as clip,
        pytest.raises(ServerUnavailable, match="certificate verify failed"),
    ):
        clip.versions()


@pytest.mark.parametrize("tls", ["no certificate", "another authority"])
def test_an_untrusted_server_and_a_missing_client_certificate_are_refused(url, files, connect, tls):
    settings = {
        "no certificate": TLS(ca=files / "ca.pem"),
        "another authority": TLS(files / "other.pem", files / "client.pem", files / "client.key"),
    }[tls]
    with (
        connect(url, headers=TOKEN, tls=settings, timeout_s=2, retries=0) as clip,
        pytest.raises(ServerUnavailable) as caught,
    ):
        clip.versions()
    if tls == "another authority":
        assert "certificate verify failed" in str(caught.value)


def test_certificates_are_checked_before_anything_is_sent(files, connect, tmp_path):
    with pytest.raises(InvalidRequest, match=r"missing\.pem is not a file"):
        TLS(ca=tmp_path / "missing.pem")
    with pytest.raises(InvalidRequest, match="needs its key"):
        TLS(certificate=files / "client.pem")
    with pytest.raises(InvalidRequest, match=r"has no TLS and certificates are given; expected grpcs:// or https://"):
        connect("localhost:8001", tls=TLS(ca=files / "ca.pem"))
    (tmp_path / "nonsense.pem").write_text("nonsense")
    for url in ("grpcs://127.0.0.1:1", "https://127.0.0.1:1"):
        with (
            connect(url, tls=TLS(ca=tmp_path / "nonsense.pem"), retries=0) as clip,
            pytest.raises(InvalidRequest, match="tls: certificates cannot be read"),
        ):
            clip.versions()


def test_headers_are_checked_and_never_shown(connect):
    with pytest.raises(InvalidRequest, match="header 'authorization' cannot be sent"):
        connect("localhost:8001", headers={"Authorization": "two\nlines"})
    from clipweld.client._address import parse_url

    assert "sesame" not in repr(parse_url("localhost:8001", headers=TOKEN))
