"""One version of a served CLIP: its image tower, text tower and card, always of the same number."""

from __future__ import annotations

import contextlib
import difflib

import numpy as np

from client._card import Card, check_card, read_card
from client._tokenizer import default_tokenizer
from client._transport import Transport
from client.errors import ClientError, ContractMismatch, ModelNotFound, RequestTimeout, VersionGone

_PARTS = ("image", "text", "card")


def ready_versions(transport: Transport, model: str) -> list[int]:
    """Versions of which all three parts are ready, in rising order, at least one.

    Raises:
        ModelNotFound: a part is missing, or the parts have no ready version in common.
    """
    served: dict[str, set[int]] = {}
    for name in (names := [f"{model}_{part}" for part in _PARTS]):
        with contextlib.suppress(ModelNotFound):
            served[name] = transport.ready_versions(name)
    if len(served) < len(names):
        there = transport.models()
        if missing := [name for name in names if name not in (served if there is None else there)]:
            raise _no_model(transport, model, missing, there)
    versions = set.intersection(*(served.get(name, set()) for name in names))
    if not versions:
        raise ModelNotFound(
            f"model {model!r} at {transport.address} has no version with {', '.join(_PARTS)} all ready; "
            f"wait until it is loaded, or see the server's log"
        )
    return sorted(versions)


class Release:
    """One served version, opened. Its methods never reach another version.

    Args:
        transport: the server.
        model: name that the three parts share.
        version: their version number.

    Raises:
        ModelNotFound, VersionGone: not served.
        ContractMismatch: served, but made for another client.

    Attributes:
        card: what the version is.
        max_images: images that go into one request.
        max_texts: texts that go into one request.
    """

    def __init__(self, transport: Transport, model: str, version: int) -> None:
        self._transport = transport
        self.model = model
        self.version = version
        available = ready_versions(transport, model)
        if version not in available:
            raise _version_gone(transport, model, version, available)
        index = np.zeros((1, 1), dtype=np.int32)
        self.card: Card = read_card(self._infer("card", index, "index", "card")[0, 0], str(self))
        if self.card.version != version:
            raise ContractMismatch(f"card of {self} says version {self.card.version}; export the version again")
        check_card(self.card, default_tokenizer().sha256, str(self))
        self.max_images = self._max_batch_size("image")
        self.max_texts = self._max_batch_size("text")

    def __str__(self) -> str:
        return f"model {self.model!r} version {self.version} at {self._transport.address}"

    def image_features(self, pixels: np.ndarray) -> np.ndarray:
        """Encode one request's worth of images.

        Args:
            pixels: uint8 (batch, size, size, 3), RGB, batch <= ``max_images``.

        Returns:
            float32 (batch, embed_dim), L2-normalised.
        """
        return self._infer("image", pixels, "image", "image_features")

    def text_features(self, tokens: np.ndarray) -> np.ndarray:
        """Encode one request's worth of texts.

        Args:
            tokens: int32 (batch, seq_len), batch <= ``max_texts``, seq_len <= context length.

        Returns:
            float32 (batch, embed_dim), L2-normalised.
        """
        return self._infer("text", tokens, "tokens", "text_features")

    def _infer(self, part: str, array: np.ndarray, input_name: str, output_name: str) -> np.ndarray:
        try:
            return self._transport.infer(f"{self.model}_{part}", self.version, array, input_name, output_name)
        except RequestTimeout:
            raise
        except ClientError as exc:
            self._raise_if_gone(exc)
            raise

    def _max_batch_size(self, part: str) -> int:
        try:
            size = self._transport.max_batch_size(f"{self.model}_{part}", self.version)
        except ClientError as exc:
            self._raise_if_gone(exc)
            raise
        if size < 1:
            raise ContractMismatch(f"{part} tower of {self} takes no batches; expected max_batch_size > 0")
        return size

    def _raise_if_gone(self, exc: ClientError) -> None:
        """A failed request has many reasons: ask the server whether the version is still there.

        Triton answers UNAVAILABLE for a version that was dropped, as gRPC does for a server that is.
        """
        available = ready_versions(self._transport, self.model)
        if self.version not in available:
            raise _version_gone(self._transport, self.model, self.version, available) from exc.__cause__


def _no_model(transport: Transport, model: str, missing: list[str], there: set[str] | None) -> ModelNotFound:
    hint, listed = "", "wait until it is loaded, or ask its administrator what it serves"
    if there is not None:
        names = sorted(name.removesuffix("_card") for name in there if name.endswith("_card"))
        near = difflib.get_close_matches(model, names)
        hint = f"did you mean {near[0]!r}? " if near else ""
        listed = f"it serves: {', '.join(names)}" if names else "it serves none; add one with: exporter merge"
    return ModelNotFound(f"no model {model!r} at {transport.address} (missing {', '.join(missing)}); {hint}{listed}")


def _version_gone(transport: Transport, model: str, version: int, available: list[int]) -> VersionGone:
    listed = ", ".join(map(str, available))
    return VersionGone(f"version {version} of model {model!r} is not served at {transport.address}; ready: {listed}")
