"""Health and model control of a Triton on this machine's loopback, over HTTP and through no proxy."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from contextlib import suppress
from typing import Any

from clipweld.exporter.errors import ModelNotLoaded
from clipweld.exporter.serving.admin import HEADER

DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy can't reach our loopback
HEALTH_TIMEOUT_S = 5.0


class Control:
    """A running Triton.

    Every method raises OSError if it doesn't answer.

    Args:
        http_url: ``http://127.0.0.1:PORT``.
        key: the administrator's.
        timeout_s: how long loading may take.
    """

    def __init__(self, http_url: str, key: str, timeout_s: float) -> None:
        self._url, self._key, self._timeout_s = http_url, key, timeout_s

    def is_ready(self) -> bool:
        """Whether all models present at the start are loaded."""
        return self._get("health/ready") is not None

    def ready_versions(self, model: str) -> list[str]:
        """Return the versions of a model that accept requests; empty if it is not loaded."""
        found = self._get(f"models/{model}")
        return found["versions"] if found else []

    def processes(self, model: str) -> int:
        """Return the number of processes per version of a loaded model; 0 if it runs in Triton's own process."""
        config = self._get(f"models/{model}/config")
        if not config or not (config["backend"] == "python" or config["runtime"].endswith(".py")):
            return 0
        return sum(group["count"] * max(1, len(group["gpus"])) for group in config["instance_group"])

    def load(self, model: str) -> None:
        """Make Triton rescan a model's folder.

        Raises:
            ModelNotLoaded: Triton's own reason.
        """
        self._post(f"repository/models/{model}/load")

    def unload(self, model: str) -> None:
        """Unload all versions of a model.

        Raises:
            ModelNotLoaded: Triton's own reason.
        """
        self._post(f"repository/models/{model}/unload")

    def _get(self, path: str) -> Any:
        """Return the answer, or None for an HTTP error."""
        try:
            with DIRECTLY.open(f"{self._url}/v2/{path}", timeout=HEALTH_TIMEOUT_S) as answer:
                body = answer.read()
        except urllib.error.HTTPError as exc:
            exc.close()
            return None
        return json.loads(body) if body else {}

    def _post(self, path: str) -> None:
        headers = {"Content-Type": "application/json", HEADER: self._key}
        request = urllib.request.Request(f"{self._url}/v2/{path}", b"{}", headers)
        try:
            DIRECTLY.open(request, timeout=self._timeout_s).close()
        except urllib.error.HTTPError as exc:
            with exc:
                raise ModelNotLoaded(_reason(exc.read())) from exc


def _reason(body: bytes) -> str:
    """Triton's words in one line."""
    text = body.decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"])
    return " ".join(text.split()).rstrip(";")
