"""The core of both classifiers: versions, labels and images, over any runtime and transport."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from cachetools import LRUCache

from clipweld.client._address import Address
from clipweld.client._asker import Asker
from clipweld.client._card import Card
from clipweld.client._folders import LeftOut
from clipweld.client._fork import at_fork
from clipweld.client._images import ImageLike, Reading, as_images, name_of, preprocess
from clipweld.client._labels import Wording
from clipweld.client._release import Release, open_release, ready_versions
from clipweld.client._results import Classification, Prediction, ServerInfo
from clipweld.client._runtime import Runtime
from clipweld.client._streams import InOrder, Supply, in_batches
from clipweld.client._tokenizer import default_tokenizer
from clipweld.client._transport import Transport
from clipweld.client.errors import BadImage, ServerError, VersionGone

# Images per request. On CPUs large batches are slower (ViT-B-16 in batches of 32: 0.8 times the images per second of
# batches of 8).
BATCH = 8
FEATURES_BYTES = 256 * 2**20  # size of the cache of label features
LOOK_AGAIN_S = 1.0  # how long what was read about served versions counts as current, in seconds
# A version may be unloaded during a request, which then moves to the next one. More moves than this are no accident.
MOVES = 8

_T = TypeVar("_T")


@dataclass(frozen=True)
class Question:
    """The question about each image: its labels, or a task.

    Attributes:
        labels: the caller's labels and prompts; None: the class names of ``task``.
        task: name of a learned task; None: the caller gives labels.
        templates: prompts for the class names; None: those of the task.
        top_k: maximum number of labels per image.
    """

    labels: Wording | None
    task: str | None
    templates: tuple[str, ...] | None
    top_k: int

    def on(self, card: Card) -> Wording:
        """Return the labels and their prompts for one version."""
        if self.labels is not None:
            return self.labels
        task = card.task(self.task or "")
        return Wording(task.class_names, self.templates or task.templates, learned=True)


@dataclass
class _Call:
    """One call by a user.

    Attributes:
        asker: its requests.
        release: the version that it uses.
        seen: when the server was last seen to serve that very version, on `time.monotonic`'s clock.
    """

    asker: Asker
    release: Release
    seen: float


@dataclass(frozen=True)
class Settings:
    """A classifier's settings.

    Attributes:
        address: the server.
        model: name of the served model.
        version: the version that the caller named; None: the newest at the start of each call.
        timeout_s: limit on one request, in seconds.
        retries: how often a request without an answer is retried.
        reading: how images are read.
    """

    address: Address
    model: str
    version: int | None
    timeout_s: float
    retries: int
    reading: Reading


class Core:
    """A served CLIP, for classifiers of any runtime."""

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self._settings, self._runtime = settings, runtime
        self._begin_anew()
        at_fork(self)

    def after_fork(self) -> None:
        """Begin anew in the child, with new locks: another thread of the parent may have held the old ones."""
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._connecting, self._remembering = threading.Lock(), threading.Lock()
        self._opening, self._encoding = self._runtime.lock(), self._runtime.lock()
        self._transport: Transport | None = None
        self._release: Release | None = None
        self._looked = 0.0
        self._forget()

    def close(self) -> None:
        with self._connecting:
            transport, self._transport, self._release = self._transport, None, None
            self._forget()
        if transport is not None:
            transport.close()

    async def server_info(self, deadline_s: float | None) -> ServerInfo:
        asker = self._asker(deadline_s)
        return ServerInfo(*await asker.ask(asker.transport.server))

    async def versions(self, deadline_s: float | None) -> list[int]:
        return await ready_versions(self._asker(deadline_s), self._settings.model)

    async def card(self, deadline_s: float | None) -> Card:
        return (await self._begin(deadline_s)).release.card

    async def classify(
        self,
        images: ImageLike | Iterable[ImageLike],
        question: Question,
        unreadable: Callable[[BadImage], object] | None,
        left_out: Callable[[LeftOut], object] | None,
        deadline_s: float | None,
    ) -> AsyncGenerator[Classification, None]:
        """Yield answers in the order of the images, of which only a few are held in memory at a time."""
        call = await self._begin(deadline_s)
        question.on(call.release.card)  # an unknown task is refused before an image is read
        supply = Supply(_named(images, left_out))

        async def work(batch: list[tuple[str, ImageLike]], turn: Any) -> list[Classification | BadImage]:
            return await self._on_one_version(call, lambda release: self._answers(call, release, batch, question, turn))

        async with aclosing(InOrder(self._runtime, in_batches(supply, self._size(call)), work)) as answered:
            async for answers in answered:
                for answer in answers:
                    if isinstance(answer, Classification):
                        yield answer
                    elif unreadable is None:
                        raise answer
                    else:
                        unreadable(answer)
        if supply.raised is not None:
            raise supply.raised

    async def image_features(self, images: ImageLike | Iterable[ImageLike], deadline_s: float | None) -> np.ndarray:
        call = await self._begin(deadline_s)
        listed = list(_named(images))
        return await self._on_one_version(call, lambda release: self._image_features(call, release, listed))

    async def text_features(self, texts: Sequence[str], deadline_s: float | None) -> np.ndarray:
        call = await self._begin(deadline_s)
        return await self._on_one_version(call, lambda release: self._text_features(call.asker, release, texts))

    async def _image_features(self, call: _Call, release: Release, images: list[tuple[str, ImageLike]]) -> np.ndarray:
        async def work(batch: list[tuple[str, ImageLike]], turn: Any) -> np.ndarray:
            pixels = await self._runtime.in_thread(_prepared, batch, release.card, self._settings.reading)
            good = [found for found in pixels if not isinstance(found, BadImage)]
            for found in pixels:
                if isinstance(found, BadImage):
                    raise found
            async with call.asker.holding(turn):
                return await release.image_features(call.asker, np.stack(good))

        parts = [np.empty((0, release.card.embed_dim), np.float32)]
        async with aclosing(InOrder(self._runtime, in_batches(iter(images), self._size(call)), work)) as encoded:
            parts += [features async for features in encoded]
        return np.concatenate(parts)

    async def _answers(
        self, call: _Call, release: Release, batch: list[tuple[str, ImageLike]], question: Question, turn: Any
    ) -> list[Classification | BadImage]:
        """Answer one request's worth of images with one version."""
        wording = question.on(release.card)
        text = await self._of_labels(call.asker, release, wording)
        pixels = await self._runtime.in_thread(_prepared, batch, release.card, self._settings.reading)
        good = [found for found in pixels if not isinstance(found, BadImage)]
        scores = iter(())
        if good:
            async with call.asker.holding(turn):
                image = await release.image_features(call.asker, np.stack(good))
            scores = iter(image @ text.T)
        return [
            found
            if isinstance(found, BadImage)
            else ranked(name, next(scores), wording.labels, release.card.logit_scale, release.version, question.top_k)
            for (name, _), found in zip(batch, pixels, strict=True)
        ]

    async def _of_labels(self, asker: Asker, release: Release, wording: Wording) -> np.ndarray:
        """Return one feature per label, float32 (num_labels, embed_dim), encoded once per version.

        It is the mean of the features of the label's prompts, normalised again, as in CLIP.

        Raises:
            InvalidRequest: the model can't tell two labels apart.
        """
        key = (release.card, wording)
        async with asker.holding(self._encoding):  # another call with the same labels waits here, then finds them
            with self._remembering:  # the cache is shared by event loops in several threads, `_encoding` is not
                features = self._label_features.get(key)
            if features is None:
                prompts = wording.prompts()
                tokens = await self._tokens(release, [prompt for own in prompts for prompt in own])
                ends = np.cumsum([len(own) for own in prompts])[:-1]
                wording.check_told_apart(np.split(tokens, ends), release.card.context_length)
                encoded = await self._encoded(asker, release, tokens)
                features = np.stack([own.mean(axis=0) for own in np.split(encoded, ends)])
                lengths = np.linalg.norm(features, axis=1, keepdims=True)
                if not lengths.all():
                    label = wording.labels[int(lengths.argmin())]
                    raise ServerError(
                        f"model {release.model!r} version {release.version}: the features of the prompts for label "
                        f"{label!r} cancel each other out; give other templates, or one alone"
                    )
                features /= lengths
                if features.nbytes <= FEATURES_BYTES:
                    with self._remembering:
                        self._label_features[key] = features
        return features

    async def _text_features(self, asker: Asker, release: Release, texts: Sequence[str]) -> np.ndarray:
        return await self._encoded(asker, release, await self._tokens(release, texts))

    async def _tokens(self, release: Release, texts: Sequence[str]) -> np.ndarray:
        return await self._runtime.in_thread(default_tokenizer(), texts, release.card.context_length)

    async def _encoded(self, asker: Asker, release: Release, tokens: np.ndarray) -> np.ndarray:
        """Encode tokenised texts, sorted by length so that each request is only as wide as its longest text."""
        lengths = tokens.argmax(axis=1) + 1 if len(tokens) else np.empty(0, int)
        order = np.argsort(-lengths, kind="stable")

        async def work(rows: list[int], turn: Any) -> np.ndarray:
            async with asker.holding(turn):
                return await release.text_features(asker, tokens[rows, : lengths[rows].max()])

        features, done = np.empty((len(tokens), release.card.embed_dim), np.float32), 0
        batches = in_batches(iter(order.tolist()), release.max_texts)
        async with aclosing(InOrder(self._runtime, batches, work)) as encoded:
            async for part in encoded:
                features[order[done : done + len(part)]] = part
                done += len(part)
        return features

    async def _on_one_version(self, call: _Call, work: Callable[[Release], Awaitable[_T]]) -> _T:
        """Do work with the call's version, and repeat it with the next one if the version vanished in the meantime.

        Raises:
            VersionGone: the caller named the version, or versions keep vanishing.
        """
        for _ in range(1 + MOVES):
            release = call.release
            try:
                done = await work(release)
                if await self._still(call, release):
                    return done
            except VersionGone:
                if self._settings.version is not None:
                    raise
            call.release, call.seen = await self._opened(call.asker, gone=release)
        raise VersionGone(
            f"model {self._settings.model!r} at {self._settings.address} changed {1 + MOVES} times during one request; "
            "is somebody rewriting its repository?"
        )

    async def _still(self, call: _Call, release: Release) -> bool:
        """Return whether the last answers came from this release, and not from another one of the same number.

        A server that is restarted, for example on a backup, may serve something else under the same number, and
        connections are restored without notice. So a call reads the card again after an interruption, and whenever the
        last look at it is older than ``LOOK_AGAIN_S``.
        """
        if call.release is not release:
            return False
        if self._fresh(call.asker, call.seen):
            return True
        began = time.monotonic()
        if not await self._is_served(call.asker, release):
            return False
        call.seen = began
        return True

    def _fresh(self, asker: Asker, seen: float) -> bool:
        return asker.transport.lost < seen and time.monotonic() - seen < LOOK_AGAIN_S

    async def _is_served(self, asker: Asker, release: Release) -> bool:
        served = await release.is_served(asker)
        if not served:
            self._forget()  # some cached features may be those of the other release
        return served

    def _forget(self) -> None:
        self._label_features: LRUCache[Any, np.ndarray] = LRUCache(FEATURES_BYTES, getsizeof=lambda array: array.nbytes)

    async def _begin(self, deadline_s: float | None) -> _Call:
        asker = self._asker(deadline_s)
        return _Call(asker, *await self._opened(asker))

    async def _opened(self, asker: Asker, gone: Release | None = None) -> tuple[Release, float]:
        """Return the release in use, and when it was last checked; check it again if that is too long ago."""
        async with asker.holding(self._opening):
            current = None if self._release is gone else self._release
            if current is None or not self._fresh(asker, self._looked):
                began = time.monotonic()
                current = await self._newest(asker, current)
                self._release, self._looked = current, began
            return current, self._looked

    async def _newest(self, asker: Asker, current: Release | None) -> Release:
        """Return the named release, or the newest ready one; ``current`` if it is still that one."""
        for attempt in range(MOVES):
            version = self._settings.version or (await ready_versions(asker, self._settings.model))[-1]
            try:
                if current is not None and current.version == version and await self._is_served(asker, current):
                    return current
                return await open_release(asker, self._settings.model, version)
            except VersionGone:  # it was unloaded between the two requests
                if self._settings.version or attempt == MOVES - 1:
                    raise
        raise AssertionError("unreachable")

    def _asker(self, deadline_s: float | None) -> Asker:
        with self._connecting:
            if self._transport is None:
                self._transport = Transport(self._settings.address, self._runtime)
            return Asker(self._transport, self._runtime, self._settings.timeout_s, self._settings.retries, deadline_s)

    @staticmethod
    def _size(call: _Call) -> int:
        return min(BATCH, call.release.max_images)


def ranked(
    name: str, scores: np.ndarray, labels: Sequence[str], logit_scale: float, version: int, top_k: int
) -> Classification:
    """Rank the labels of one image and return the best.

    Args:
        name: what the answer calls the image.
        scores: cosines (num_labels,), finite; those that rounding took beyond 1 are reported as 1.
        labels: the labels, in the order of ``scores``.
        logit_scale: factor by which cosines are multiplied before the softmax. A model's logit_bias, if it has one, is
            the same for all labels and cancels out.
        version: the version that the features come from.
        top_k: maximum number of labels to return.
    """
    wide = scores.astype(np.float64)
    odds = np.exp(logit_scale * (wide - wide.max()))
    probabilities = odds / odds.sum()
    best = np.argsort(-scores, kind="stable")[:top_k]
    cosines = scores.clip(-1, 1)
    return Classification(
        name, tuple(Prediction(labels[i], float(probabilities[i]), float(cosines[i])) for i in best), version
    )


def _named(
    images: ImageLike | Iterable[ImageLike], left_out: Callable[[LeftOut], object] | None = None
) -> Iterator[tuple[str, ImageLike]]:
    return ((name_of(image, index), image) for index, image in enumerate(as_images(images, left_out)))


def _prepared(batch: list[tuple[str, ImageLike]], card: Card, reading: Reading) -> list[np.ndarray | BadImage]:
    """Return the pixels of each image, uint8 (size, size, 3), or the error that says why there are none."""
    found: list[np.ndarray | BadImage] = []
    for name, image in batch:
        try:
            found.append(
                preprocess(
                    image,
                    name,
                    size=card.image_size,
                    resize_mode=card.resize_mode,
                    interpolation=card.interpolation,
                    reading=reading,
                )
            )
        except BadImage as exc:
            exc.image = name
            found.append(exc)
    return found
