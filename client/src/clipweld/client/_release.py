"""One version of a served CLIP: image tower, text tower and card, all of the same version number."""

from __future__ import annotations

import contextlib
import difflib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import numpy as np

from clipweld.client._asker import Asker
from clipweld.client._card import Card, check_card, read_card
from clipweld.client._tokenizer import default_tokenizer
from clipweld.client._transport import Transport
from clipweld.client.errors import (
    ClientError,
    ContractMismatch,
    ModelNotFound,
    RequestTimeout,
    ServerError,
    VersionGone,
)

_PARTS = ("image", "text", "card")
# How far the length of a feature may be from 1; normalising in float16 is that inexact.
UNIT_TOLERANCE = 1e-2


async def ready_versions(asker: Asker, model: str) -> list[int]:
    """Return the versions that are ready in all three parts, in rising order; there is at least one.

    Raises:
        ModelNotFound: a part is missing, or the parts have no ready version in common.
    """
    return await asker.ask(lambda timeout_s: _ready_versions(asker.transport, model, timeout_s))


async def _ready_versions(transport: Transport, model: str, timeout_s: float) -> list[int]:
    end = time.monotonic() + timeout_s
    served: dict[str, set[int]] = {}
    for name in (names := [f"{model}_{part}" for part in _PARTS]):
        with contextlib.suppress(ModelNotFound):
            served[name] = await transport.ready_versions(name, end - time.monotonic())
    if missing := [name for name in names if name not in served]:
        raise _no_model(transport, model, missing, await transport.models(end - time.monotonic()))
    versions = set.intersection(*served.values())
    if not versions:
        raise ModelNotFound(
            f"model {model!r} at {transport.address} has no version with {', '.join(_PARTS)} all ready; "
            f"wait until it is loaded, or see the server's log"
        )
    return sorted(versions)


@dataclass(frozen=True)
class Release:
    """One served version. Its methods never use another version.

    Attributes:
        model: name of the served model.
        version: number of the version.
        card: description of the version.
        card_text: the card as the server sent it.
        max_images: most images in one request.
        max_texts: most texts in one request.
    """

    model: str
    version: int
    card: Card
    card_text: bytes
    max_images: int
    max_texts: int

    async def image_features(self, asker: Asker, pixels: np.ndarray) -> np.ndarray:
        """Encode one request's worth of images.

        Args:
            pixels: uint8 (batch, size, size, 3), RGB, batch <= ``max_images``.

        Returns:
            float32 (batch, embed_dim), L2-normalised.

        Raises:
            ServerError: the answer is not of this form.
        """
        return await self._features(asker, "image", pixels)

    async def text_features(self, asker: Asker, tokens: np.ndarray) -> np.ndarray:
        """Encode one request's worth of texts.

        Args:
            tokens: int32 (batch, seq_len), batch <= ``max_texts``, seq_len <= context length.

        Returns:
            float32 (batch, embed_dim), L2-normalised.

        Raises:
            ServerError: the answer is not of this form.
        """
        return await self._features(asker, "text", tokens)

    async def is_served(self, asker: Asker) -> bool:
        """Return whether the server still serves this release: after a restart it may have other files of that number.

        Raises:
            VersionGone: the server has no version of that number.
        """
        return await _card_text(asker, self.model, self.version) == self.card_text

    async def _features(self, asker: Asker, part: str, array: np.ndarray) -> np.ndarray:
        features = await _infer(asker, self.model, self.version, part, array)
        if fault := _fault(features, (len(array), self.card.embed_dim)):
            raise ServerError(
                f"{self.model}_{part} version {self.version} at {asker.transport.address}: {fault}; go back with: "
                "exporter rollback, and export the version again"
            )
        return features


async def open_release(asker: Asker, model: str, version: int) -> Release:
    """Read a version's card and batch limits from the server.

    Raises:
        ModelNotFound: the model is not served.
        VersionGone: the version is not served.
        ContractMismatch: the version is served, but was made for another client.
    """
    where = f"model {model!r} version {version} at {asker.transport.address}"
    available = await ready_versions(asker, model)
    if version not in available:
        raise _version_gone(asker.transport, model, version, available)
    text = await _card_text(asker, model, version)
    card = read_card(text, where)
    if card.version != version:
        raise ContractMismatch(f"card of {where} says version {card.version}; export the version again")
    check_card(card, default_tokenizer().sha256, where)
    limits = []
    for part in ("image", "text"):
        size = await _max_batch_size(asker, model, version, part)
        if size < 1:
            raise ContractMismatch(f"{part} tower of {where} takes no batches; expected max_batch_size > 0")
        limits.append(size)
    return Release(model, version, card, text, *limits)


# part -> names of its input and output
_TENSORS = {"image": ("image", "image_features"), "text": ("tokens", "text_features"), "card": ("index", "card")}


async def _infer(asker: Asker, model: str, version: int, part: str, array: np.ndarray) -> np.ndarray:
    async def request(timeout_s: float) -> np.ndarray:
        async with _gone(asker.transport, model, version, timeout_s):
            return await asker.transport.infer(f"{model}_{part}", version, array, *_TENSORS[part], timeout_s)

    return await asker.ask(request)


async def _card_text(asker: Asker, model: str, version: int) -> bytes:
    answer = await _infer(asker, model, version, "card", np.zeros((1, 1), dtype=np.int32))
    text = answer.ravel()[0] if answer.size == 1 else None
    if not isinstance(text, bytes):
        raise ContractMismatch(
            f"card of model {model!r} version {version} at {asker.transport.address} is {answer.dtype} {answer.shape}; "
            "expected one string; export the model again"
        )
    return text


def _fault(features: np.ndarray, shape: tuple[int, int]) -> str | None:
    """Return what is wrong with features, in words; None if they are finite float32 unit vectors of this shape."""
    if features.dtype != np.float32 or features.shape != shape:
        return f"expected features float32 {shape}, got {features.dtype} {features.shape}"
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.sqrt(np.einsum("ij,ij->i", features, features))
        usable = np.abs(lengths - 1) <= UNIT_TOLERANCE  # false for NaN
    if usable.all():
        return None
    row = int(usable.argmin())
    return f"expected features of length 1, got {lengths[row]:g} for number {row} of {len(features)}"


async def _max_batch_size(asker: Asker, model: str, version: int, part: str) -> int:
    async def request(timeout_s: float) -> int:
        async with _gone(asker.transport, model, version, timeout_s):
            return await asker.transport.max_batch_size(f"{model}_{part}", version, timeout_s)

    return await asker.ask(request)


@contextlib.asynccontextmanager
async def _gone(transport: Transport, model: str, version: int, timeout_s: float) -> AsyncGenerator[None, None]:
    """If a request in the block fails, ask the server whether the version is still there.

    The error alone is ambiguous: Triton answers UNAVAILABLE for a version that was unloaded, and gRPC reports the same
    for a server that is gone.

    Raises:
        VersionGone: the version is not served.
    """
    end = time.monotonic() + timeout_s
    try:
        yield
    except RequestTimeout:
        raise
    except ClientError as exc:
        available = await _ready_versions(transport, model, end - time.monotonic())
        if version not in available:
            raise _version_gone(transport, model, version, available) from exc.__cause__
        raise


def _no_model(transport: Transport, model: str, missing: list[str], there: set[str]) -> ModelNotFound:
    names = sorted(name.removesuffix("_card") for name in there if name.endswith("_card"))
    near = difflib.get_close_matches(model, names)
    hint = f"did you mean {near[0]!r}? " if near else ""
    listed = f"it serves: {', '.join(names)}" if names else "it serves none: wait, or write one with: exporter merge"
    return ModelNotFound(f"no model {model!r} at {transport.address} (missing {', '.join(missing)}); {hint}{listed}")


def _version_gone(transport: Transport, model: str, version: int, available: list[int]) -> VersionGone:
    listed = ", ".join(map(str, available))
    return VersionGone(f"version {version} of model {model!r} is not served at {transport.address}; ready: {listed}")
