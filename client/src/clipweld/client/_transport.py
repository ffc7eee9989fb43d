"""Requests to one Triton server: what it serves, and tensors in and out. Foreign errors become ours."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from textwrap import shorten
from typing import Any, TypeVar

import numpy as np

from clipweld.client._address import Address
from clipweld.client._proxy import proxy_of
from clipweld.client._runtime import BEFORE_FORK, Runtime, aside, in_background
from clipweld.client._wire import GrpcWire, HttpWire, Wire
from clipweld.client.errors import (
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

_LEAST_S = 0.1  # for finding out why a server is unavailable, if the request has used up its time
_LONGEST_S = 1e6  # for the timeout of a socket

# Statuses as tritonclient reports them: names of gRPC codes, and HTTP numbers. Any other becomes a ServerError.
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
    "407": NotAllowed,
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
        runtime: how to wait for the answers.

    Attributes:
        address: the server's address.
        lost: when a request last got no answer, on `time.monotonic`'s clock. Another server may have taken its place
            since then.

    Raises:
        InvalidRequest: the proxy or the certificates can't be used.
    """

    def __init__(self, address: Address, runtime: Runtime) -> None:
        self.address, self.lost = address, float("-inf")
        self._runtime, self._proxy = runtime, proxy_of(address)
        self._where = f"{address}" if self._proxy is None else f"{address} through the proxy {self._proxy}"
        self._heard = float("-inf")
        self._pid, self._closed, self._replacing = os.getpid(), False, threading.Lock()
        self._open()

    def close(self) -> None:
        """Close the connections, and end the requests on them."""
        with self._replacing:
            self._closed = True
            self._end.detach()
        self._wire.close()

    async def server(self, timeout_s: float) -> tuple[str, str, tuple[str, ...]]:
        """Return the name, version and extensions of the server."""

        def read(found: Any) -> tuple[str, str, tuple[str, ...]]:
            if isinstance(found, dict):
                return found["name"], found["version"], tuple(found["extensions"])
            return found.name, found.version, tuple(found.extensions)

        return await self._ask("server's metadata", "get_server_metadata", timeout_s, read)

    async def ready_versions(self, model: str, timeout_s: float) -> set[int]:
        """Return the ready versions of a model; there is at least one.

        Raises:
            ModelNotFound: no version is ready.
        """

        def read(found: Any) -> set[int]:
            return {int(version) for version in (found["versions"] if isinstance(found, dict) else found.versions)}

        return await self._ask(f"metadata of {model}", "get_model_metadata", timeout_s, read, model)

    async def models(self, timeout_s: float) -> set[str]:
        """Return all loaded models, from the statistics: Triton's list of models is reserved for administrators."""

        def read(found: Any) -> set[str]:
            if isinstance(found, dict):
                return {row["name"] for row in found["model_stats"]}
            return {row.name for row in found.model_stats}

        return await self._ask("statistics of all models", "get_inference_statistics", timeout_s, read)

    async def max_batch_size(self, model: str, version: int, timeout_s: float) -> int:
        """Return the largest batch that a model accepts in one request; 0 if it accepts no batches."""

        def read(found: Any) -> int:
            return int(found.get("max_batch_size", 0) if isinstance(found, dict) else found.config.max_batch_size)

        what = f"configuration of {model} version {version}"
        return await self._ask(what, "get_model_config", timeout_s, read, model, str(version))

    async def compute_ns(self, model: str, version: int, timeout_s: float) -> tuple[int, int]:
        """Return how many requests a version has answered, and their pure compute time in nanoseconds."""

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
        """Send one tensor to one version of a model, and return one tensor of its answer.

        Args:
            model: name of the model.
            version: number of its version.
            array: the input, uint8 or int32, with the batch as its first dimension.
            input_name: name of the input.
            output_name: name of the output to return, which has one row per row of the input.
            timeout_s: limit on the request, in seconds.

        Raises:
            ClientError: the kind of error that belongs to the server's status.
            ServerError: the answer belongs to another request, or can't be read.
        """
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

        def send(wire: Wire) -> Future[Any]:
            return wire.infer(model, version, array, input_name, output_name, timeout_s, request_id)

        return await self._sent(what, send, timeout_s, read)

    async def _ask(self, what: str, method: str, timeout_s: float, read: Callable[[Any], _T], *names: str) -> _T:
        return await self._sent(what, lambda wire: wire.ask(method, timeout_s, *names), timeout_s, read)

    async def _sent(
        self, what: str, send: Callable[[Wire], Future[Any]], timeout_s: float, read: Callable[[Any], _T]
    ) -> _T:
        """Send one request and return what is read from its answer.

        The request's arguments are ours, so whatever tritonclient and the libraries below it raise is caused by the
        server or the network, and becomes one of our errors.
        """
        if self._pid != os.getpid():
            raise InvalidRequest(BEFORE_FORK)
        began, wire = time.monotonic(), self._wire
        try:
            found = read(await self._runtime.result(send(wire)))
        except ClientError:
            raise
        except Exception as exc:
            if self._closed:
                raise InvalidRequest(f"{what}: the classifier was closed during the call; call it again") from exc
            kind, said = _sorted(exc)
            if kind in (ServerUnavailable, RequestTimeout):
                self.lost = time.monotonic()
            silent = kind is RequestTimeout and self._heard < began
            # Over HTTP, a request that times out has closed its connection by now.
            if isinstance(exc, _OtherAnswer) or (silent and self.address.protocol == "grpc"):
                self._reopen(wire)
            if kind is ServerUnavailable:
                left_s = max(timeout_s - (time.monotonic() - began), _LEAST_S)
                why: str = await self._runtime.result(in_background(lambda: self._why_unavailable(said, left_s)))
                raise ServerUnavailable(why) from exc
            raise kind(self._words(kind, what, said, timeout_s)) from exc
        self._heard = time.monotonic()
        return found

    def _open(self) -> None:
        self._wire: Wire = (GrpcWire if self.address.protocol == "grpc" else HttpWire)(self.address, self._proxy)
        self._end = weakref.finalize(self, aside, self._wire.close)
        self._end.atexit = False  # at exit it would fail the requests that the caller's daemon threads wait for

    def _reopen(self, wire: Wire) -> None:
        """Open new connections: the old ones may be dead without any sign of it, or mix up answers."""
        with self._replacing:
            if self._wire is wire and not self._closed:
                self._end.detach()
                self._open()
                wire.retire()

    def _words(self, kind: type[ClientError], what: str, said: str, timeout_s: float) -> str:
        if kind is RequestTimeout:
            return f"{what}: no answer from {self._where} within {max(timeout_s, 0):.3g} s; allow more time, or retry"
        if kind is InvalidRequest:
            return f"{what}: the server at {self._where} refused the request: {said}"
        if kind is NotAllowed:
            hint = "" if self._proxy is None else ", or list the host in no_proxy"
            return f"{what}: {self._where} wants to know who asks ({said}); give headers or a certificate{hint}"
        return f"{what}: the server at {self._where} failed: {said}"

    def _why_unavailable(self, said: str, timeout_s: float) -> str:
        """Return why a server is unavailable, from trying a plain connection: its errors are clearer than gRPC's."""
        address = self.address
        host, port = (address.host.strip("[]"), address.port) if self._proxy is None else self._proxy.place
        try:
            with socket.create_connection((host, port), timeout=min(timeout_s, _LONGEST_S)) as connection:
                if address.encrypted and self._proxy is None:
                    address.tls.context().wrap_socket(connection, server_hostname=host).close()
        except (OSError, UnicodeError) as exc:
            reason = (getattr(exc, "strerror", None) or str(exc)).lower()
            if self._proxy is not None:
                return (
                    f"no way to {self._where}: {reason}; correct {self._proxy.variable}, or list the host in no_proxy"
                )
            return f"no server at {address}: {reason}; start one with: exporter serve"
        if self._proxy is not None:
            said = shorten(said, 200)
            return f"no server at {self._where}, which says: {said}; list the host in no_proxy to go without it"
        spoken, other = ("gRPC", "HTTP") if address.protocol == "grpc" else ("HTTP", "gRPC")
        return (
            f"what listens at {address} is no Triton that speaks {spoken} and is ready for more "
            f"({shorten(said, 200)}); try again later, or see whether this is its port for {other}"
        )


class _OtherAnswer(Exception):
    """The answer belongs to another request."""


def _sorted(exc: Exception) -> tuple[type[ClientError], str]:
    """Return which of our errors a foreign one becomes, by its type and status, never by its text; and its message."""
    import grpc  # type: ignore[import-untyped]
    from tritonclient.utils import InferenceServerException

    if isinstance(exc, grpc.RpcError):
        return _ERROR_OF_STATUS.get(str(exc.code()), ServerError), " ".join(str(exc.details()).split())
    if isinstance(exc, InferenceServerException):
        return _ERROR_OF_STATUS.get(exc.status() or "", ServerError), " ".join(str(exc.message()).split())
    said = " ".join(str(exc).split()) or type(exc).__name__
    if isinstance(exc, (TimeoutError, asyncio.TimeoutError)):
        return RequestTimeout, said
    from aiohttp import ClientError as AiohttpError

    return (ServerUnavailable if isinstance(exc, (OSError, AiohttpError)) else ServerError), said
