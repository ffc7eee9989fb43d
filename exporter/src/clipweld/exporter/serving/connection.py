"""Connections to a running Triton: queries for anyone, and model control for the administrator."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import tritonclient.grpc
import tritonclient.http
from geventhttpclient import HTTPClient

from clipweld.exporter.config import UNIT_TOLERANCE
from clipweld.exporter.errors import ExporterError, PromotionFailed, RepositoryError, ServerUnreachable
from clipweld.exporter.serving.admin import HEADER, KEY_VARIABLE
from clipweld.exporter.serving.proxy import Proxy, proxy_of
from clipweld.exporter.store.card import read_card
from clipweld.exporter.store.repository import KINDS, MODEL_FILE, Repository

POLL_S = 0.02
CONNECT_TIMEOUT_S = 10.0
EXPECTED = "expected host:port or grpc://host:port (gRPC), or http://host:port"


class Connection:
    """A connection to a Triton, without a proxy if it is on this machine.

    Args:
        url: ``http://host:port``, or ``host:port`` or ``grpc://host:port`` for gRPC.
        timeout_s: limit for each answer.

    Raises:
        ServerUnreachable: an invalid address or proxy.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url, self._timeout_s = url, timeout_s
        scheme, address = _parse(url)
        self._triton: ModuleType = tritonclient.http if scheme == "http" else tritonclient.grpc
        proxy = proxy_of(address, scheme)
        self._where = f"server {url}" if proxy is None else f"server {url} through the proxy {proxy}"
        if scheme == "http":
            self._limits: dict[str, Any] = {}
            self._client = tritonclient.http.InferenceServerClient(address, network_timeout=timeout_s)
            if proxy is not None:
                self._client._client_stub = _through(proxy, address, timeout_s)
        else:
            self._limits = {"client_timeout": timeout_s}
            through = ("grpc.enable_http_proxy", 0) if proxy is None else ("grpc.http_proxy", proxy.url)
            lengths = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
            self._client = tritonclient.grpc.InferenceServerClient(
                address, channel_args=[*lengths, ("grpc.use_local_subchannel_pool", 1), through]
            )

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def loaded(self, repository: Repository) -> list[int]:
        """Return the loaded versions, oldest first; the last answers requests that name none.

        Raises:
            ServerUnreachable: no Triton answers.
        """
        with self._errors(ServerUnreachable, "is there a Triton?"):
            self._client.is_server_live(**self._limits)
        found = [self._ready_versions(repository.model(kind)) for kind in KINDS]
        return sorted(set.intersection(*found))

    def serves(self, repository: Repository) -> bool:
        """Whether the card of a loaded version equals the one in the repository.

        Raises:
            ServerUnreachable: no Triton answers.
        """
        active = repository.model("card")
        for version in reversed(self.loaded(repository)):
            for file in (repository.file("card", version), active / str(version) / MODEL_FILE):
                with suppress(RepositoryError, PromotionFailed, OSError):
                    return self.card(repository, version) == read_card(file)
        return False

    def card(self, repository: Repository, version: int) -> object:
        """Return the card that the server answers.

        Raises:
            PromotionFailed: it does not answer one.
        """
        answer = self._infer(repository.model("card"), version, "index", np.zeros((1, 1), np.int32)).as_numpy("card")
        return json.loads(answer[0, 0])

    def _ready_versions(self, model: Path) -> set[int]:
        try:
            found = self._client.get_model_metadata(model.name, **self._limits)
        except tritonclient.grpc.InferenceServerException:  # not loaded, or not known
            return set()
        return {int(version) for version in (found["versions"] if isinstance(found, dict) else found.versions)}

    def _infer(self, model: Path, version: int, name: str, array: np.ndarray) -> Any:
        value = self._triton.InferInput(name, array.shape, {"uint8": "UINT8", "int32": "INT32"}[array.dtype.name])
        value.set_data_from_numpy(array)
        with self._errors(PromotionFailed, "see the server's log"):
            return self._client.infer(model.name, [value], model_version=str(version), **self._limits)

    @contextmanager
    def _errors(self, kind: type[ExporterError], step: str) -> Iterator[None]:
        """Turn errors of tritonclient and the libraries below it into one of ours, in one line."""
        try:
            yield
        except (tritonclient.grpc.InferenceServerException, OSError) as exc:
            reason = shorten(str(exc), 300, placeholder=" ...")
            raise kind(f"{self._where}: {reason}; {step}") from exc


class ModelControl(Connection):
    """A connection with model control: it can load and unload versions.

    Args:
        url: as of a connection.
        key: the administrator's, if there is one.
        timeout_s: how long a model may take to load, and a request to be answered.

    Raises:
        ServerUnreachable: no server answers, or it refuses model control.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float) -> None:
        super().__init__(url, timeout_s)
        prefix = "triton-grpc-protocol-" if self._limits else ""
        self._headers = {f"{prefix}{HEADER}": key} if key else {}
        limits = {name: min(timeout_s, CONNECT_TIMEOUT_S) for name in self._limits}
        step = f"is there an exporter serve of this very repository, another --url, or a {KEY_VARIABLE}?"
        with self._errors(ServerUnreachable, step):
            self._client.get_model_repository_index(headers=self._headers, **limits)

    def load(self, model: Path) -> None:
        """Make Triton rescan a model's folder: new versions are loaded, removed ones unloaded."""
        with self._errors(PromotionFailed, "see the server's log"):
            self._client.load_model(model.name, headers=self._headers, **self._limits)

    def wait(self, model: Path, version: int) -> None:
        """Return once a version is ready: loaded, and warmed up as its config.pbtxt says."""
        deadline = time.monotonic() + self._timeout_s
        with self._errors(PromotionFailed, "see the server's log"):
            while not self._client.is_model_ready(model.name, str(version)):
                if time.monotonic() > deadline:
                    raise PromotionFailed(
                        f"{model.name} version {version} was not ready at {self.url} within {self._timeout_s:g} s; is "
                        f"{model.parent} what it serves? or give it longer with --timeout"
                    )
                time.sleep(POLL_S)

    def check_card(self, repository: Repository, version: int) -> None:
        """Compare the served card with the one in the store.

        Raises:
            PromotionFailed: this server serves another repository.
        """
        if self.card(repository, version) != repository.card(version):
            raise PromotionFailed(
                f"{repository.model('card').name} version {version} at {self.url} has another card than "
                f"{repository.store}; does it serve "
                "another repository?"
            )

    def check_answers(self, repository: Repository, version: int) -> None:
        """Query both towers once: a version that passed every check on one machine may overflow on another.

        Raises:
            PromotionFailed: an answer is not a unit vector, or NaN.
        """
        card = repository.card(version)
        size, length = card["image"]["size"], card["text"]["context_length"]
        for kind, name, array in (
            ("image", "image", np.zeros((1, size, size, 3), np.uint8)),
            ("text", "tokens", np.zeros((1, length), np.int32)),
        ):
            model = repository.model(kind)
            features = self._infer(model, version, name, array).as_numpy(f"{kind}_features")
            norm = float(np.linalg.norm(features))
            if not abs(norm - 1) <= UNIT_TOLERANCE:  # NaN fails
                raise PromotionFailed(
                    f"{model.name} version {version} at {self.url} answers features of length {norm:g}, expected 1; "
                    "promote one merged with --precision fp32"
                )


def _through(proxy: Proxy, address: str, timeout_s: float) -> HTTPClient:
    """Return an HTTP client for tritonclient, which has no proxy option; geventhttpclient's sends no credentials."""
    sending = HTTPClient(proxy.host.strip("[]"), proxy.port, headers=proxy.headers, network_timeout=timeout_s)
    target = urlsplit(f"//{address}")
    sending.host, sending.port, sending.use_proxy = str(target.hostname), target.port, True
    sending._base_url_string = f"http://{address}/"
    return sending


def _parse(url: str) -> tuple[str, str]:
    """Scheme and ``host:port``."""
    if "@" in url:  # not shown: the part before it may be a password
        raise ServerUnreachable(f"server address: has a user's name in it; {EXPECTED}")
    try:
        parts = urlsplit(url if "://" in url else f"grpc://{url}")
        if parts.scheme in ("grpc", "http") and parts.hostname and parts.port and not parts.path.strip("/"):
            return parts.scheme, parts.netloc
    except ValueError:
        pass
    raise ServerUnreachable(f"server address {url!r}: can't be used; {EXPECTED}")
