"""One Triton server over gRPC or HTTP: what it serves, and tensors in and out. Every foreign error becomes ours."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from client.errors import (
    ClientError,
    InvalidRequest,
    ModelNotFound,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
)

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
    "400": InvalidRequest,
    "404": ModelNotFound,
    "408": RequestTimeout,
    "413": InvalidRequest,
    "502": ServerUnavailable,
    "503": ServerUnavailable,
    "504": RequestTimeout,
}


@dataclass(frozen=True)
class Address:
    """Where a server listens, and which of its two protocols is spoken there."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse_url(url: str) -> Address:
    """Read ``host:port``, ``grpc://host:port`` (both gRPC) or ``http://host:port``.

    Raises:
        InvalidRequest: anything else.
    """
    expected = "expected host:port or grpc://host:port (gRPC), or http://host:port"
    try:
        parts = urlsplit(url if "://" in url else f"grpc://{url}")
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise InvalidRequest(f"url {url!r} cannot be read ({exc}); {expected}") from exc
    extra = parts.path.strip("/") or parts.query or parts.fragment or parts.username
    if parts.scheme not in ("grpc", "http") or not host or not port or extra:
        raise InvalidRequest(f"url {url!r} cannot be used; {expected}")
    return Address(parts.scheme, f"[{host}]" if ":" in host else host, port)


class Transport:
    """A connection to one server. Over gRPC it may be shared by threads, over HTTP it may not.

    Args:
        address: see `parse_url`.
        timeout_s: how long one request may take, in seconds.
    """

    def __init__(self, address: Address, timeout_s: float) -> None:
        self.address = address
        self.timeout_s = timeout_s
        if address.scheme == "grpc":
            import tritonclient.grpc as binding

            self._client = binding.InferenceServerClient(str(address), channel_args=_CHANNEL_OPTIONS)
            self._options: dict[str, Any] = {"client_timeout": timeout_s}
        else:
            import tritonclient.http as binding

            self._client = binding.InferenceServerClient(
                str(address), connection_timeout=timeout_s, network_timeout=timeout_s
            )
            self._options = {}
        self._binding = binding

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def ready_versions(self, model: str) -> set[int]:
        """Those versions of a model that are ready, at least one.

        Raises:
            ModelNotFound: there is none.
        """
        with self._our_errors(f"metadata of {model}"):
            metadata = self._client.get_model_metadata(model, **self._options)
        return {int(version) for version in (metadata["versions"] if isinstance(metadata, dict) else metadata.versions)}

    def models(self) -> set[str] | None:
        """Every model in the server's repository; None where only an administrator is told."""
        try:
            with self._our_errors("list of models"):
                index = self._client.get_model_repository_index(**self._options)
        except ClientError:
            return None
        return {row["name"] for row in index} if isinstance(index, list) else {row.name for row in index.models}

    def max_batch_size(self, model: str, version: int) -> int:
        """The largest batch that a model takes in one request; 0 where it takes no batches."""
        with self._our_errors(f"configuration of {model} version {version}"):
            config = self._client.get_model_config(model, str(version), **self._options)
        return int(config.get("max_batch_size", 0)) if isinstance(config, dict) else config.config.max_batch_size

    def infer(self, model: str, version: int, array: np.ndarray, input_name: str, output_name: str) -> np.ndarray:
        """Send one named tensor (uint8 or int32) to one version of a model, and return one named tensor.

        Raises:
            ServerUnavailable, RequestTimeout, ServerError, ModelNotFound, InvalidRequest: by the server's status.
        """
        sent = self._binding.InferInput(input_name, array.shape, _DATATYPES[array.dtype.name])
        sent.set_data_from_numpy(array)
        wanted = self._binding.InferRequestedOutput(output_name)
        with self._our_errors(f"{model} version {version}"):
            result = self._client.infer(model, [sent], str(version), outputs=[wanted], **self._options)
        return result.as_numpy(output_name)

    @contextlib.contextmanager
    def _our_errors(self, what: str) -> Iterator[None]:
        """Turn what tritonclient raises in the block into a ClientError, by type and status, never by text."""
        from tritonclient.utils import InferenceServerException

        try:
            yield
        except InferenceServerException as exc:
            raise self._error(_ERROR_OF_STATUS.get(exc.status() or "", ServerError), what, exc.message()) from exc
        except TimeoutError as exc:
            raise self._error(RequestTimeout, what, "") from exc
        except (OSError, *_http_protocol_errors(self.address)) as exc:
            raise self._error(ServerUnavailable, what, "") from exc

    def _error(self, kind: type[ClientError], what: str, message: str) -> ClientError:
        said = " ".join((message or "no message").split())
        if kind is ServerUnavailable:
            return kind(self._why_unavailable())
        if kind is RequestTimeout:
            return kind(f"{what}: no answer from {self.address} within {self.timeout_s:g} s; allow more time, or retry")
        if kind is InvalidRequest:
            return kind(f"{what}: the server at {self.address} refused the request: {said}")
        return kind(f"{what}: the server at {self.address} failed: {said}")

    def _why_unavailable(self) -> str:
        """Try a bare connection, which says more clearly than gRPC does what is wrong."""
        try:
            host = self.address.host.strip("[]")
            socket.create_connection((host, self.address.port), timeout=self.timeout_s).close()
        except OSError as exc:
            reason = (exc.strerror or str(exc)).lower()
            return f"no server at {self.address}: {reason}; start one with: exporter serve"
        spoken, other = ("gRPC", "HTTP") if self.address.scheme == "grpc" else ("HTTP", "gRPC")
        return (
            f"what listens at {self.address} is no Triton that is ready and speaks {spoken}; "
            f"wait until it is ready, or see whether this is its port for {other}"
        )


def _http_protocol_errors(address: Address) -> tuple[type[Exception], ...]:
    if address.scheme != "http":
        return ()
    from geventhttpclient.response import HTTPParseError

    return (HTTPParseError,)
