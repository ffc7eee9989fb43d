"""One Triton server: what it serves, and tensors in and out. Every foreign error becomes ours.

Two kinds of one transport: the blocking one, whose coroutines never suspend, and asyncio's.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
from collections.abc import Callable
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

# gRPC's own limit of 4 MB a message is Triton's to set, and its pause before it connects again grows to two minutes.
_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
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
        timeout_s: how long a connection may take, in seconds.
    """

    def __init__(self, address: Address, timeout_s: float) -> None:
        self.address, self._timeout_s = address, timeout_s
        self._binding = self._import()

    async def close(self) -> None:
        """Close the connection."""
        raise NotImplementedError

    async def server(self, timeout_s: float) -> tuple[str, str, tuple[str, ...]]:
        """Name, version and extensions of the server."""
        found = await self._ask("server's metadata", "get_server_metadata", timeout_s)
        if isinstance(found, dict):
            return found["name"], found["version"], tuple(found["extensions"])
        return found.name, found.version, tuple(found.extensions)

    async def ready_versions(self, model: str, timeout_s: float) -> set[int]:
        """Those versions of a model that are ready, at least one.

        Raises:
            ModelNotFound: there is none.
        """
        metadata = await self._ask(f"metadata of {model}", "get_model_metadata", timeout_s, model)
        return {int(version) for version in (metadata["versions"] if isinstance(metadata, dict) else metadata.versions)}

    async def models(self, timeout_s: float) -> set[str] | None:
        """Every model in the server's repository; None where only an administrator is told."""
        try:
            index = await self._ask("list of models", "get_model_repository_index", timeout_s)
        except ClientError:
            return None
        return {row["name"] for row in index} if isinstance(index, list) else {row.name for row in index.models}

    async def max_batch_size(self, model: str, version: int, timeout_s: float) -> int:
        """The largest batch that a model takes in one request; 0 where it takes no batches."""
        what = f"configuration of {model} version {version}"
        config = await self._ask(what, "get_model_config", timeout_s, model, str(version))
        return int(config.get("max_batch_size", 0)) if isinstance(config, dict) else config.config.max_batch_size

    async def compute_ns(self, model: str, version: int, timeout_s: float) -> tuple[int, int]:
        """Requests that a version has answered, and the nanoseconds of pure compute time in them."""
        what = f"statistics of {model} version {version}"
        found = await self._ask(what, "get_inference_statistics", timeout_s, model, str(version))
        if isinstance(found, dict):
            compute = found["model_stats"][0]["inference_stats"]["compute_infer"]
            return int(compute["count"]), int(compute["ns"])
        compute = found.model_stats[0].inference_stats.compute_infer
        return compute.count, compute.ns

    async def infer(
        self, model: str, version: int, array: np.ndarray, input_name: str, output_name: str, timeout_s: float
    ) -> np.ndarray:
        """Send one named tensor (uint8 or int32) to one version of a model, and return one named tensor.

        Raises:
            ClientError: by the server's status.
        """
        sent = self._binding.InferInput(input_name, array.shape, _DATATYPES[array.dtype.name])
        sent.set_data_from_numpy(array)
        wanted = self._binding.InferRequestedOutput(output_name)
        result = await self._ask(
            f"{model} version {version}", "infer", timeout_s, model, [sent], str(version), outputs=[wanted]
        )
        answer: np.ndarray | None = result.as_numpy(output_name)
        if answer is None or len(answer) != len(array):
            raise ServerError(
                f"{model} version {version}: {self.address} answered no {output_name} for each of {len(array)} inputs; "
                "export the model again"
            )
        return answer

    async def _ask(self, what: str, method: str, timeout_s: float, *args: Any, **settings: Any) -> Any:
        """One request, with our errors for those of tritonclient and the libraries below it."""
        settings["headers"] = dict(self.address.headers)
        if self.address.protocol == "grpc":
            settings["client_timeout"] = timeout_s
        try:
            return await self._call(method, timeout_s, args, settings)
        except self._foreign_errors as exc:
            kind, said = _sorted(exc)
            if kind is ServerUnavailable:
                raise kind(await self._off_loop(self._why_unavailable)) from exc
            raise kind(self._words(kind, what, said, timeout_s)) from exc

    async def _call(self, method: str, timeout_s: float, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
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

    @functools.cached_property
    def _foreign_errors(self) -> tuple[type[Exception], ...]:
        from tritonclient.utils import InferenceServerException

        # Values and keys: what is not an answer at all, and tritonclient tries to read.
        ours = (InferenceServerException, OSError, asyncio.TimeoutError, ValueError, LookupError)
        if self.address.protocol == "grpc":
            return ours
        from aiohttp import ClientError as AiohttpError
        from geventhttpclient.response import HTTPParseError

        return (*ours, HTTPParseError, AiohttpError)

    def _words(self, kind: type[ClientError], what: str, said: str, timeout_s: float) -> str:
        if kind is RequestTimeout:
            return f"{what}: no answer from {self.address} within {timeout_s:g} s; allow more time, or retry"
        if kind is InvalidRequest:
            return f"{what}: the server at {self.address} refused the request: {said}"
        if kind is NotAllowed:
            return f"{what}: {self.address} wants to know who asks ({said}); give headers or a certificate"
        return f"{what}: the server at {self.address} failed: {said}"

    def _why_unavailable(self) -> str:
        """Try a bare connection, which says more clearly than gRPC does what is wrong."""
        address = self.address
        host = address.host.strip("[]")
        try:
            with socket.create_connection((host, address.port), timeout=self._timeout_s) as connection:
                if address.encrypted:
                    address.tls.context().wrap_socket(connection, server_hostname=host).close()
        except OSError as exc:
            reason = (exc.strerror or str(exc)).lower()
            return f"no server at {address}: {reason}; start one with: exporter serve"
        spoken, other = ("gRPC", "HTTP") if address.protocol == "grpc" else ("HTTP", "gRPC")
        return (
            f"what listens at {address} is no Triton that is ready and speaks {spoken}; "
            f"wait until it is ready, or see whether this is its port for {other}"
        )


class BlockingTransport(Transport):
    """Blocks. May be shared by threads: gRPC's client is safe, and over HTTP each thread gets one of its own."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        super().__init__(address, timeout_s)
        self._own = threading.local()
        self._clients: list[Any] = []
        self._shared = self._connect() if address.protocol == "grpc" else None

    async def close(self) -> None:
        for client in self._clients:
            client.close()

    async def _call(self, method: str, timeout_s: float, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        client = self._shared
        if client is not None:
            return getattr(client, method)(*args, **settings)
        if not hasattr(self._own, "client"):
            self._own.client = self._connect()
        import gevent

        with gevent.Timeout(timeout_s, TimeoutError):
            return getattr(self._own.client, method)(*args, **settings)

    async def _off_loop(self, function: Callable[[], _T]) -> _T:
        return function()

    def _connect(self) -> Any:
        client = self._grpc_client() if self.address.protocol == "grpc" else self._http_client()
        self._clients.append(client)
        return client

    def _http_client(self) -> Any:
        limits: dict[str, Any] = {"connection_timeout": self._timeout_s, "network_timeout": self._timeout_s}
        if self.address.encrypted:
            from gevent.ssl import create_default_context

            context = self.address.tls.context(create_default_context)
            # "Insecure" leaves out a second check of the host's name, in a way that newer Pythons don't have: the
            # context has checked it.
            limits |= {"ssl": True, "ssl_context_factory": lambda: context, "insecure": True}
        return self._binding.InferenceServerClient(str(self.address), **limits)

    def _import(self) -> Any:
        if self.address.protocol == "grpc":
            import tritonclient.grpc as binding
        else:
            import tritonclient.http as binding
        return binding


class AsyncioTransport(Transport):
    """Suspends, in the event loop that first uses it."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        super().__init__(address, timeout_s)
        self._client = self._grpc_client() if address.protocol == "grpc" else self._http_client()

    async def close(self) -> None:
        await self._client.close()

    async def _call(self, method: str, timeout_s: float, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        return await asyncio.wait_for(getattr(self._client, method)(*args, **settings), timeout_s)

    async def _off_loop(self, function: Callable[[], _T]) -> _T:
        return await asyncio.to_thread(function)

    def _http_client(self) -> Any:
        context = {"ssl": True, "ssl_context": self.address.tls.context()} if self.address.encrypted else {}
        return self._binding.InferenceServerClient(str(self.address), conn_timeout=None, **context)

    def _import(self) -> Any:
        if self.address.protocol == "grpc":
            import tritonclient.grpc.aio as binding
        else:
            import tritonclient.http.aio as binding
        return binding


def _sorted(exc: Exception) -> tuple[type[ClientError], str]:
    """Which of our errors it is, by type and status, never by text; and what it says."""
    from tritonclient.utils import InferenceServerException

    if isinstance(exc, InferenceServerException):
        return _ERROR_OF_STATUS.get(exc.status() or "", ServerError), " ".join(str(exc.message()).split())
    said = " ".join(str(exc).split()) or type(exc).__name__
    if isinstance(exc, (TimeoutError, asyncio.TimeoutError)):
        return RequestTimeout, said
    garbled = isinstance(exc, (ValueError, LookupError)) and not isinstance(exc, OSError)  # a bad certificate is both
    return (ServerError if garbled else ServerUnavailable), said
