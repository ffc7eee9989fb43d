"""One Triton server: what it serves, and tensors in and out. Every foreign error becomes ours.

Two kinds of one transport: the blocking one, whose coroutines never suspend, and asyncio's.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from textwrap import shorten
from typing import Any, TypeVar

import numpy as np

from client._address import Address
from client.errors import (
    ClientError,
    InvalidRequest,
    ModelNotFound,
    NotAllowed,
    RequestTimeout,
    ServerBusy,
    ServerError,
    ServerUnavailable,
)

_T = TypeVar("_T")

# gRPC's own limit of 4 MB a message is Triton's to set, and its pause before it connects again grows to two minutes. A
# pool of its own: a client that is opened anew would else be given the connection of the one before it.
_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
]
_LEAST_S = 0.1  # for a look at why a server is not there, where a request has used up its time
_DATATYPES = {"uint8": "UINT8", "int32": "INT32"}

# Statuses as tritonclient reports them: gRPC code names and HTTP numbers. Any other is a ServerError.
_ERROR_OF_STATUS: dict[str, type[ClientError]] = {
    "StatusCode.UNAVAILABLE": ServerUnavailable,
    "StatusCode.UNIMPLEMENTED": ServerUnavailable,
    "StatusCode.DEADLINE_EXCEEDED": RequestTimeout,
    "StatusCode.NOT_FOUND": ModelNotFound,
    "StatusCode.INVALID_ARGUMENT": InvalidRequest,
    "StatusCode.OUT_OF_RANGE": InvalidRequest,
    "StatusCode.UNAUTHENTICATED": NotAllowed,
    "StatusCode.PERMISSION_DENIED": NotAllowed,
    "StatusCode.RESOURCE_EXHAUSTED": ServerBusy,
    "400": InvalidRequest,
    "401": NotAllowed,
    "403": NotAllowed,
    "404": ModelNotFound,
    "408": RequestTimeout,
    "413": InvalidRequest,
    "429": ServerBusy,
    "502": ServerUnavailable,
    "503": ServerUnavailable,
    "504": RequestTimeout,
}


class Transport:
    """Requests to one server; each is tried once.

    Args:
        address: see `parse_url`.

    Attributes:
        lost: when a request last got no answer, on `time.monotonic`'s clock: another server may answer since.
    """

    def __init__(self, address: Address) -> None:
        self.address, self.lost = address, float("-inf")
        self._heard = float("-inf")
        self._binding = self._import()

    async def close(self) -> None:
        """Close the connection."""
        raise NotImplementedError

    async def server(self, timeout_s: float) -> tuple[str, str, tuple[str, ...]]:
        """Name, version and extensions of the server."""

        def read(found: Any) -> tuple[str, str, tuple[str, ...]]:
            if isinstance(found, dict):
                return found["name"], found["version"], tuple(found["extensions"])
            return found.name, found.version, tuple(found.extensions)

        return await self._ask("server's metadata", "get_server_metadata", timeout_s, read)

    async def ready_versions(self, model: str, timeout_s: float) -> set[int]:
        """Those versions of a model that are ready, at least one.

        Raises:
            ModelNotFound: there is none.
        """

        def read(found: Any) -> set[int]:
            return {int(version) for version in (found["versions"] if isinstance(found, dict) else found.versions)}

        return await self._ask(f"metadata of {model}", "get_model_metadata", timeout_s, read, model)

    async def models(self, timeout_s: float) -> set[str]:
        """Every model that is loaded. From the statistics: the list itself is for administrators."""

        def read(found: Any) -> set[str]:
            if isinstance(found, dict):
                return {row["name"] for row in found["model_stats"]}
            return {row.name for row in found.model_stats}

        return await self._ask("statistics of all models", "get_inference_statistics", timeout_s, read)

    async def max_batch_size(self, model: str, version: int, timeout_s: float) -> int:
        """The largest batch that a model takes in one request; 0 where it takes no batches."""

        def read(found: Any) -> int:
            return int(found.get("max_batch_size", 0) if isinstance(found, dict) else found.config.max_batch_size)

        what = f"configuration of {model} version {version}"
        return await self._ask(what, "get_model_config", timeout_s, read, model, str(version))

    async def compute_ns(self, model: str, version: int, timeout_s: float) -> tuple[int, int]:
        """Requests that a version has answered, and the nanoseconds of pure compute time in them."""

        def read(found: Any) -> tuple[int, int]:
            if isinstance(found, dict):
                compute = found["model_stats"][0]["inference_stats"]["compute_infer"]
                return int(compute["count"]), int(compute["ns"])
            compute = found.model_stats[0].inference_stats.compute_infer
            return compute.count, compute.ns

        what = f"statistics of {model} version {version}"
        return await self._ask(what, "get_inference_statistics", timeout_s, read, model, str(version))

    async def infer(
        self, model: str, version: int, array: np.ndarray, input_name: str, output_name: str, timeout_s: float
    ) -> np.ndarray:
        """Send one named tensor (uint8 or int32) to one version of a model, and return one named tensor.

        Raises:
            ClientError: by the server's status.
            ServerError: the answer is to another request, or not one that can be read.
        """
        sent = self._binding.InferInput(input_name, array.shape, _DATATYPES[array.dtype.name])
        sent.set_data_from_numpy(array)
        what, request_id = f"{model} version {version}", uuid.uuid4().hex

        def read(result: Any) -> np.ndarray:
            response = result.get_response()
            answered = response.get("id") if isinstance(response, dict) else response.id
            if answered != request_id:
                raise _OtherAnswer("what came is the answer to another request")
            answer: np.ndarray | None = result.as_numpy(output_name)
            if answer is None or len(answer) != len(array):
                raise ServerError(
                    f"{what}: {self.address} answered no {output_name} for each of {len(array)} inputs; "
                    "export the model again"
                )
            return answer

        wanted = self._binding.InferRequestedOutput(output_name)
        settings = {"outputs": [wanted], "request_id": request_id}
        return await self._ask(what, "infer", timeout_s, read, model, [sent], str(version), **settings)

    async def _ask(
        self, what: str, method: str, timeout_s: float, read: Callable[[Any], _T], *args: Any, **settings: Any
    ) -> _T:
        """One request and what is read from its answer.

        Its arguments are ours, so whatever tritonclient and the libraries below it raise is the server's or the
        network's doing: a foreign error becomes one of ours.
        """
        settings["headers"] = dict(self.address.headers)
        if self.address.protocol == "grpc":
            settings["client_timeout"] = timeout_s
        began = time.monotonic()
        try:
            found = read(await self._call(method, timeout_s, args, settings))
        except ClientError:
            raise
        except Exception as exc:
            kind, said = _sorted(exc)
            if kind in (ServerUnavailable, RequestTimeout):
                self.lost = time.monotonic()
            silent = kind is RequestTimeout and self._heard < began
            if isinstance(exc, _OtherAnswer) or (silent and self.address.protocol == "grpc"):  # HTTP's is closed by now
                await self._reconnect()
            if kind is ServerUnavailable:
                left_s = max(timeout_s - (time.monotonic() - began), _LEAST_S)
                raise kind(await self._off_loop(lambda: self._why_unavailable(said, left_s))) from exc
            raise kind(self._words(kind, what, said, timeout_s)) from exc
        self._heard = time.monotonic()
        return found

    async def _call(self, method: str, timeout_s: float, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        raise NotImplementedError

    async def _reconnect(self) -> None:
        """Open a new connection: the one there is may be dead for good without anybody having said so, or mixed up."""
        raise NotImplementedError

    async def _off_loop(self, function: Callable[[], _T]) -> _T:
        """Call what blocks."""
        raise NotImplementedError

    def _import(self) -> Any:
        raise NotImplementedError

    def _grpc_client(self) -> Any:
        tls, encrypted = self.address.tls, self.address.encrypted
        files = {"root_certificates": tls.ca, "private_key": tls.key, "certificate_chain": tls.certificate}
        named = {name: None if file is None else str(file) for name, file in files.items()} if encrypted else {}
        if encrypted:
            tls.context()  # reads the files, and says more clearly than gRPC what is wrong with them
        return self._binding.InferenceServerClient(
            str(self.address), channel_args=_CHANNEL_OPTIONS, ssl=encrypted, **named
        )

    def _words(self, kind: type[ClientError], what: str, said: str, timeout_s: float) -> str:
        if kind is RequestTimeout:
            return f"{what}: no answer from {self.address} within {max(timeout_s, 0):.3g} s; allow more time, or retry"
        if kind is InvalidRequest:
            return f"{what}: the server at {self.address} refused the request: {said}"
        if kind is NotAllowed:
            return f"{what}: {self.address} wants to know who asks ({said}); give headers or a certificate"
        return f"{what}: the server at {self.address} failed: {said}"

    def _why_unavailable(self, said: str, timeout_s: float) -> str:
        """Try a bare connection, which says more clearly than gRPC does what is wrong."""
        address = self.address
        host = address.host.strip("[]")
        try:
            with socket.create_connection((host, address.port), timeout=timeout_s) as connection:
                if address.encrypted:
                    address.tls.context().wrap_socket(connection, server_hostname=host).close()
        except OSError as exc:
            reason = (exc.strerror or str(exc)).lower()
            return f"no server at {address}: {reason}; start one with: exporter serve"
        spoken, other = ("gRPC", "HTTP") if address.protocol == "grpc" else ("HTTP", "gRPC")
        return (
            f"what listens at {address} is no Triton that speaks {spoken} and is ready for more "
            f"({shorten(said, 200)}); try again later, or see whether this is its port for {other}"
        )


class BlockingTransport(Transport):
    """Blocks. May be shared by threads: gRPC's client is safe, and HTTP's is in a thread of its own."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._aside = None if address.protocol == "grpc" else _Aside(address)
        self._client: Any = self._grpc_client() if self._aside is None else None
        if self._aside is not None:
            weakref.finalize(self, self._aside.end)

    async def close(self) -> None:
        if self._aside is None:
            self._client.close()
        else:
            self._aside.end()

    async def _call(self, method: str, timeout_s: float, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        if self._aside is None:
            return getattr(self._client, method)(*args, **settings)
        return self._aside.run(self._aside.transport._call(method, timeout_s, args, settings))

    async def _reconnect(self) -> None:
        if self._aside is None:
            self._client = self._grpc_client()  # the old one closes when the requests that are on it have ended
        else:
            self._aside.run(self._aside.transport._reconnect())

    async def _off_loop(self, function: Callable[[], _T]) -> _T:
        return function()

    def _import(self) -> Any:
        if self.address.protocol == "grpc":
            import tritonclient.grpc as binding
        else:
            import tritonclient.http.aio as binding
        return binding


class AsyncioTransport(Transport):
    """Suspends, in the event loop that first uses it."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._client = self._connect()

    async def close(self) -> None:
        await self._client.close()

    async def _call(self, method: str, timeout_s: float, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        return await asyncio.wait_for(getattr(self._client, method)(*args, **settings), timeout_s)

    async def _reconnect(self) -> None:
        old, self._client = self._client, self._connect()
        if self.address.protocol == "http":
            await old.close()  # gRPC's closes by itself, when the requests that are on it have ended

    async def _off_loop(self, function: Callable[[], _T]) -> _T:
        return await asyncio.to_thread(function)

    def _connect(self) -> Any:
        if self.address.protocol == "grpc":
            return self._grpc_client()
        context = {"ssl": True, "ssl_context": self.address.tls.context()} if self.address.encrypted else {}
        return self._binding.InferenceServerClient(str(self.address), conn_timeout=None, **context)

    def _import(self) -> Any:
        if self.address.protocol == "grpc":
            import tritonclient.grpc.aio as binding
        else:
            import tritonclient.http.aio as binding
        return binding


class _Aside:
    """asyncio's transport for callers without an event loop: in one of its own, in a thread of its own."""

    def __init__(self, address: Address) -> None:
        self._began: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._live(address)), name="clipweld-http", daemon=True
        )
        self._thread.start()
        self._loop, self._ended = self._began.result()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine there, and wait for it."""
        try:
            running = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # it has ended
            coroutine.close()
            raise
        try:
            return running.result()
        except BaseException:
            running.cancel()  # where it was the waiting that was broken off
            raise

    def end(self) -> None:
        """Close the connections and end the thread."""
        with suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._ended.set)
        if threading.current_thread() is not self._thread:  # which may be the one that collects garbage
            self._thread.join()

    async def _live(self, address: Address) -> None:
        try:
            self.transport = AsyncioTransport(address)
        except BaseException as exc:
            self._began.set_exception(exc)
            return
        ended = asyncio.Event()
        self._began.set_result((asyncio.get_running_loop(), ended))
        await ended.wait()
        await self.transport.close()


class _OtherAnswer(Exception):
    """What came is the answer to another request."""


def _sorted(exc: Exception) -> tuple[type[ClientError], str]:
    """Which of our errors it is, by type and status, never by text; and what it says."""
    from tritonclient.utils import InferenceServerException

    if isinstance(exc, InferenceServerException):
        return _ERROR_OF_STATUS.get(exc.status() or "", ServerError), " ".join(str(exc.message()).split())
    said = " ".join(str(exc).split()) or type(exc).__name__
    if isinstance(exc, (TimeoutError, asyncio.TimeoutError)):
        return RequestTimeout, said
    from aiohttp import ClientError as AiohttpError

    return (ServerUnavailable if isinstance(exc, (OSError, AiohttpError)) else ServerError), said
