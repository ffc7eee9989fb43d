"""Requests on the wire, by gRPC or HTTP. Each is a future that any thread and any event loop can wait for.

A wire belongs to no thread and no event loop, and closing it ends its requests. So the modules above this one need not
care about threads, event loops or the end of the process.
"""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import numpy as np

from clipweld.client._address import Address
from clipweld.client._fork import at_fork, never_free
from clipweld.client._proxy import Proxy
from clipweld.client._runtime import aside, in_background, settle
from clipweld.client.errors import InvalidRequest

# Message sizes are limited by Triton, not by gRPC's default of 4 MB. By default, gRPC's pauses before it reconnects
# grow to two minutes. Without a separate pool, a newly opened client would get the connection of the previous one.
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
)
# gRPC reads this variable when it is imported, and does not prepare for forks if it is not set.
_FORKS_SAFELY = "grpc" not in sys.modules or bool(os.environ.get("GRPC_ENABLE_FORK_SUPPORT"))
_FORKS_AT_ALL = os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1").lower() not in ("0", "false", "no")
_broken_by_fork = False  # whether gRPC is unusable in this process
# Held during calls into gRPC, but never while waiting for an answer: a fork in the middle of a call would leave gRPC's
# locks held in the child. Reentrant, because a caller's finalizers may run in the middle of a call and make calls too.
_calling_grpc = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_calling_grpc.acquire, after_in_parent=_calling_grpc.release, after_in_child=_calling_grpc.release
    )
_DATATYPES = {"uint8": "UINT8", "int32": "INT32"}
_FOREVER_S = 1e8  # three years: gRPC's deadlines don't reach much further
_CLOSING_S = 2.0  # for an orderly close, although the server may be gone


class Wire:
    """Connections to one server.

    Args:
        address: the server.
        proxy: the proxy in between.
    """

    def __init__(self, address: Address, proxy: Proxy | None) -> None:
        self._address, self._proxy = address, proxy
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._pending: set[Future[Any]] = set()
        self._retired = False
        at_fork(self)

    def ask(self, method: str, timeout_s: float, *names: str) -> Future[Any]:
        """Call a method of tritonclient that describes the server, or a model given by its name and version."""
        raise NotImplementedError

    def infer(
        self, model: str, version: int, array: np.ndarray, input_name: str, output_name: str, timeout_s: float, id: str
    ) -> Future[Any]:
        """Send one tensor and request one; the future's result is tritonclient's ``InferResult``."""
        raise NotImplementedError

    def retire(self) -> None:
        """Close this wire once its pending requests have ended."""
        with self._lock:
            self._retired = True
            idle = not self._pending
        if idle:
            self.close()

    def close(self) -> None:
        """End the pending requests and close the connections, unless they are those of a parent process."""
        if os.getpid() == self._pid:
            self._close()

    def after_fork(self) -> None:
        """Leave the parent's connections alone, which finalizers would close."""
        never_free(self)

    def _close(self) -> None:
        raise NotImplementedError

    def _tracked(self, future: Future[Any]) -> Future[Any]:
        with self._lock:
            self._pending.add(future)
        future.add_done_callback(self._ended)
        return future

    def _ended(self, future: Future[Any]) -> None:
        with self._lock:
            self._pending.discard(future)
            idle = self._retired and not self._pending
        if idle:  # in another thread: this may be gRPC's, which delivers answers and must not wait
            aside(self.close)


class GrpcWire(Wire):
    """A gRPC channel.

    Requests are always made as futures: a fork during a blocking request would break gRPC in the child.
    """

    def __init__(self, address: Address, proxy: Proxy | None) -> None:
        super().__init__(address, proxy)
        if _broken_by_fork:
            raise InvalidRequest(
                "gRPC does not work in this process: it was forked while its parent was at work with gRPC; import "
                "client before grpc, leave GRPC_ENABLE_FORK_SUPPORT unset or at 1, or give a url with http://"
            )
        import grpc  # type: ignore[import-untyped]
        from tritonclient.grpc import service_pb2_grpc

        through = ("grpc.enable_http_proxy", 0) if proxy is None else ("grpc.http_proxy", _with_credentials(proxy))
        options = (*_CHANNEL_OPTIONS, through)
        if address.encrypted:
            address.tls.context()  # reads the files, and reports what is wrong with them more clearly than gRPC
        with _calling_grpc:
            if address.encrypted:
                credentials = grpc.ssl_channel_credentials(*address.tls.contents())
                self._channel = grpc.secure_channel(str(address), credentials, options)
            else:
                self._channel = grpc.insecure_channel(str(address), options)
            self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def ask(self, method: str, timeout_s: float, *names: str) -> Future[Any]:
        from tritonclient.grpc import service_pb2

        rpc = _RPCS[method]
        request = getattr(service_pb2, f"{rpc}Request")(**dict(zip(("name", "version"), names, strict=False)))
        return self._send(rpc, request, timeout_s, lambda answer: answer)

    def infer(
        self, model: str, version: int, array: np.ndarray, input_name: str, output_name: str, timeout_s: float, id: str
    ) -> Future[Any]:
        from tritonclient.grpc import InferResult, service_pb2

        request = service_pb2.ModelInferRequest(model_name=model, model_version=str(version), id=id)
        request.inputs.add(name=input_name, datatype=_DATATYPES[array.dtype.name], shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
        request.outputs.add(name=output_name)
        return self._send("ModelInfer", request, timeout_s, InferResult)

    def after_fork(self) -> None:
        super().after_fork()
        global _broken_by_fork
        _broken_by_fork = _broken_by_fork or not _FORKS_AT_ALL or bool(self._pending and not _FORKS_SAFELY)

    def _send(self, rpc: str, request: Any, timeout_s: float, read: Callable[[Any], Any]) -> Future[Any]:
        timeout = None if timeout_s > _FOREVER_S else timeout_s
        metadata = tuple(self._address.headers.items())
        answered: Future[Any] = Future()
        try:
            with _calling_grpc:
                call = getattr(self._stub, rpc).future(request, timeout=timeout, metadata=metadata)
                call.add_done_callback(lambda call: settle(answered, lambda: read(call.result())))
        except ValueError as exc:
            raise ConnectionAbortedError("closed") from exc

        def give_up(future: Future[Any]) -> None:
            if future.cancelled():
                with _calling_grpc:
                    call.cancel()

        answered.add_done_callback(give_up)
        return self._tracked(answered)

    def _close(self) -> None:
        with _calling_grpc:
            self._channel.close()


class HttpWire(Wire):
    """tritonclient's asyncio client, with its own event loop in its own thread."""

    def __init__(self, address: Address, proxy: Proxy | None) -> None:
        super().__init__(address, proxy)
        self._tls = {"ssl": True, "ssl_context": address.tls.context()} if address.encrypted else {}
        self._loop, self._closing, self._closed = _Loop(), asyncio.Event(), False
        began: Future[None] = Future()
        self._thread = threading.Thread(
            target=_live, args=(self._loop, self._connected(began)), name="clipweld-http", daemon=True
        )
        self._thread.start()
        began.result()

    def ask(self, method: str, timeout_s: float, *names: str) -> Future[Any]:
        return self._send(lambda client, headers: getattr(client, method)(*names, headers=headers), timeout_s)

    def infer(
        self, model: str, version: int, array: np.ndarray, input_name: str, output_name: str, timeout_s: float, id: str
    ) -> Future[Any]:
        from tritonclient.http import InferInput, InferRequestedOutput

        sent = InferInput(input_name, array.shape, _DATATYPES[array.dtype.name])
        sent.set_data_from_numpy(array)
        outputs = [InferRequestedOutput(output_name)]
        return self._send(
            lambda client, headers: client.infer(
                model, [sent], str(version), outputs=outputs, request_id=id, headers=headers
            ),
            timeout_s,
        )

    def _send(self, request: Callable[[Any, dict[str, str]], Awaitable[Any]], timeout_s: float) -> Future[Any]:
        timeout = None if timeout_s > _FOREVER_S else timeout_s
        answered: Future[Any] = Future()

        def begin() -> None:
            headers = dict(self._address.headers)
            task = self._loop.create_task(asyncio.wait_for(request(self._client, headers), timeout))
            task.add_done_callback(lambda task: settle(answered, lambda: _result(task)))
            answered.add_done_callback(lambda future: self._call(task.cancel) if future.cancelled() else None)

        with self._lock:  # so that closing also ends a request that is just being sent
            if self._closed:
                raise ConnectionAbortedError("closed")
            self._call(begin)
        return self._tracked(answered)

    def _call(self, function: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it all requests
            self._loop.call_soon_threadsafe(function)

    def _close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._call(self._closing.set)
        if threading.current_thread() is not self._thread:  # that thread may be the one that collects garbage
            self._thread.join(_CLOSING_S)

    async def _connected(self, began: Future[None]) -> None:
        try:
            import tritonclient.http.aio as binding

            self._client = binding.InferenceServerClient(str(self._address), conn_timeout=None, **self._tls)
            if self._proxy is not None:
                self._client._stub = _Proxied(self._client._stub, self._proxy, self._address.encrypted)
        except BaseException as exc:
            began.set_exception(exc)
            return
        began.set_result(None)
        await self._closing.wait()
        underway = asyncio.all_tasks() - {asyncio.current_task()}
        for task in underway:
            task.cancel()
        await asyncio.gather(*underway, return_exceptions=True)
        await self._client.close()


class _Proxied:
    """The session of tritonclient, routed through a proxy, for which tritonclient has no setting."""

    def __init__(self, session: Any, proxy: Proxy, encrypted: bool) -> None:
        who = {}
        if proxy.user is not None:
            credentials = base64.b64encode(f"{proxy.user}:{proxy.password}".encode()).decode()
            who = {"Proxy-Authorization": f"Basic {credentials}"}
        self._through = {"proxy": proxy.url, "proxy_headers": who if encrypted else None}
        self._headers = {} if encrypted else who  # without TLS, the proxy reads the headers of the request itself
        self._session = session
        self.close = session.close

    def get(self, headers: dict[str, str], **request: Any) -> Any:
        return self._session.get(headers=headers | self._headers, **request, **self._through)

    def post(self, headers: dict[str, str], **request: Any) -> Any:
        return self._session.post(headers=headers | self._headers, **request, **self._through)


class _Loop(asyncio.SelectorEventLoop):
    """Looks up names in threads that don't delay the interpreter's exit: a look-up can take minutes."""

    async def getaddrinfo(self, *args: Any, **settings: Any) -> Any:
        return await asyncio.wrap_future(in_background(lambda: socket.getaddrinfo(*args, **settings)))


def _live(loop: asyncio.AbstractEventLoop, main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine as `asyncio.run` does, but in a given loop."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(main)
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _result(task: asyncio.Task[Any]) -> Any:
    if task.cancelled():
        raise ConnectionAbortedError("closed")
    return task.result()


def _with_credentials(proxy: Proxy) -> str:
    if proxy.user is None:
        return proxy.url
    return proxy.url.replace("//", f"//{quote(proxy.user, '')}:{quote(proxy.password, '')}@")


# tritonclient's names -> those of the protocol
_RPCS = {
    "get_server_metadata": "ServerMetadata",
    "get_model_metadata": "ModelMetadata",
    "get_model_config": "ModelConfig",
    "get_inference_statistics": "ModelStatistics",
}
