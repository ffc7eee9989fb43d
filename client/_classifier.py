"""Zero-shot classification against a served CLIP."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

import numpy as np

from client._card import Card, Task
from client._images import ImageLike, as_image_list, name_of, preprocess
from client._release import Release, ready_versions
from client._results import Classification, Prediction
from client._tokenizer import default_tokenizer
from client._transport import Transport, parse_url
from client.errors import InvalidRequest, VersionGone

DEFAULT_URL = "localhost:8001"
DEFAULT_TEMPLATES = ("a photo of a {}",)
_LABEL_SETS_KEPT = 64

_T = TypeVar("_T")


class ZeroShotClassifier:
    """A served CLIP that names what is on an image, among labels given in words.

    One object holds to one version: image and text features always come from the same. Over gRPC it may be shared by
    threads; over HTTP each thread needs its own.

    Args:
        url: ``host:port`` or ``grpc://host:port`` for gRPC, ``http://host:port`` for HTTP.
        model: name of the served model.
        version: which version to use. None: the newest that is ready at the first call; when the server drops it
            later, the next call moves to the newest then ready.
        timeout_s: how long one request to the server may take, in seconds.

    Raises:
        InvalidRequest: the arguments are wrong. The server is first asked by the first call.

    Example:
        >>> with ZeroShotClassifier("localhost:8001") as clip:  # doctest: +SKIP
        ...     print(clip.classify("cat.jpg", labels=["cat", "dog"])[0])
        cat 98.1%, dog 1.9%
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        model: str = "clip",
        version: int | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        if timeout_s <= 0:
            raise InvalidRequest(f"timeout_s is {timeout_s}; expected more than 0 seconds")
        if version is not None and version < 1:
            raise InvalidRequest(f"version is {version}; expected 1 or more, or None for the newest")
        self._address = parse_url(url)
        self._model = model
        self._wanted_version = version
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._transport: Transport | None = None
        self._release: Release | None = None
        self._label_features = functools.lru_cache(maxsize=_LABEL_SETS_KEPT)(_encode_labels)

    def __enter__(self) -> ZeroShotClassifier:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. A later call opens a new one."""
        with self._lock:
            if self._transport is not None:
                self._transport.close()
            self._transport = self._release = None
            self._label_features.cache_clear()

    @property
    def card(self) -> Card:
        """What the version in use is: sizes, lineage, tasks."""
        return self._on_one_version(lambda release: release.card)

    def tasks(self) -> tuple[Task, ...]:
        """The tasks that the version in use has learned; none for the base model."""
        return self.card.tasks

    def versions(self) -> list[int]:
        """The versions that are ready now, in rising order.

        Raises:
            ServerUnavailable, RequestTimeout, ModelNotFound: see `client.errors`.
        """
        with self._lock:
            return ready_versions(self._connected(), self._model)

    def classify(
        self,
        images: ImageLike | Iterable[ImageLike],
        labels: Sequence[str] | None = None,
        task: str | None = None,
        templates: Sequence[str] | None = None,
        top_k: int = 5,
    ) -> list[Classification]:
        """Rank labels for each image.

        Args:
            images: one or several, each a path, the bytes of an image file, a PIL image, or a uint8 array
                (height, width, 3) in RGB or (height, width) in grey.
            labels: what the images may show. Exactly one of ``labels`` and ``task`` is given.
            task: a task of the served version: its class names are the labels, its templates the prompts.
            templates: prompts with ``{}`` where the label goes, averaged as CLIP does. None: those of the task, or
                "a photo of a {}".
            top_k: how many labels an image gets at most.

        Returns:
            One `Classification` an image, in the order given; a list also for a single image.

        Raises:
            BadImage: names the image; nothing is answered for the others.
            UnknownTask, InvalidRequest: the arguments are wrong.
            VersionGone: the version that the caller named is no longer served.
            ServerUnavailable, RequestTimeout, ServerError, ModelNotFound, ContractMismatch: see `client.errors`.
        """
        if (labels is None) == (task is None):
            raise InvalidRequest("give exactly one of labels and task")
        if top_k < 1:
            raise InvalidRequest(f"top_k is {top_k}; expected 1 or more")
        if labels is not None:
            labels = _checked_labels(labels)
        if templates is not None:
            templates = _checked_templates(templates)
        listed = as_image_list(images)

        def work(release: Release) -> list[Classification]:
            learned = release.card.task(task) if task is not None else None
            names = learned.class_names if learned else labels
            prompts = templates or (learned.templates if learned else DEFAULT_TEMPLATES)
            text = self._label_features(release, names, prompts)
            scores = _encode_images(release, listed) @ text.T
            return [_ranked(row, names, release, top_k) for row in scores]

        return self._on_one_version(work)

    def image_features(self, images: ImageLike | Iterable[ImageLike]) -> np.ndarray:
        """Encode images.

        Args:
            images: as in `classify`.

        Returns:
            float32 (num_images, embed_dim), L2-normalised.

        Raises:
            BadImage: names the image. Others as in `classify`.
        """
        listed = as_image_list(images)
        return self._on_one_version(lambda release: _encode_images(release, listed))

    def text_features(self, texts: str | Sequence[str]) -> np.ndarray:
        """Encode texts as they are, without templates.

        Args:
            texts: one or several. What is longer than the context is cut, as in CLIP.

        Returns:
            float32 (num_texts, embed_dim), L2-normalised.

        Raises:
            As in `classify`.
        """
        listed = [texts] if isinstance(texts, str) else list(texts)
        return self._on_one_version(lambda release: _encode_texts(release, listed))

    def _on_one_version(self, work: Callable[[Release], _T]) -> _T:
        """Do all of a call on one version; once more on the newest if the version vanished and nobody asked for it."""
        try:
            return work(self._opened())
        except VersionGone:
            if self._wanted_version is not None:
                raise
        with self._lock:
            self._release = None
        return work(self._opened())

    def _opened(self) -> Release:
        """The release in use, opened if there is none yet."""
        with self._lock:
            if self._release is None:
                transport = self._connected()
                version = self._wanted_version or ready_versions(transport, self._model)[-1]
                self._release = Release(transport, self._model, version)
            return self._release

    def _connected(self) -> Transport:
        if self._transport is None:
            self._transport = Transport(self._address, self._timeout_s)
        return self._transport


def _encode_images(release: Release, images: list[ImageLike]) -> np.ndarray:
    card = release.card
    features = np.empty((len(images), card.embed_dim), dtype=np.float32)
    for rows in _batches(len(images), release.max_images):
        pixels = [
            preprocess(
                images[row],
                name_of(images[row], row),
                size=card.image_size,
                resize_mode=card.resize_mode,
                interpolation=card.interpolation,
            )
            for row in rows
        ]
        features[rows] = release.image_features(np.stack(pixels))
    return features


def _encode_texts(release: Release, texts: Sequence[str]) -> np.ndarray:
    features = np.empty((len(texts), release.card.embed_dim), dtype=np.float32)
    for rows in _batches(len(texts), release.max_texts):
        tokens = default_tokenizer()([texts[row] for row in rows], release.card.context_length)
        features[rows] = release.text_features(tokens)
    return features


def _encode_labels(release: Release, labels: tuple[str, ...], templates: tuple[str, ...]) -> np.ndarray:
    """One feature a label: the mean over its prompts, normalised again; float32 (num_labels, embed_dim)."""
    prompts = [template.replace("{}", label) for label in labels for template in templates]
    features = _encode_texts(release, prompts).reshape(len(labels), len(templates), -1).mean(axis=1)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _ranked(scores: np.ndarray, labels: Sequence[str], release: Release, top_k: int) -> Classification:
    # logit_bias, where a model has one, is the same for all labels and cancels out in the softmax.
    logits = release.card.logit_scale * scores.astype(np.float64)
    odds = np.exp(logits - logits.max())
    probabilities = odds / odds.sum()
    best = np.argsort(-scores, kind="stable")[:top_k]
    predictions = (Prediction(labels[i], float(probabilities[i]), float(scores[i])) for i in best)
    return Classification(tuple(predictions), release.version)


def _batches(total: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, total)) for start in range(0, total, size))


def _checked_labels(labels: Sequence[str]) -> tuple[str, ...]:
    if isinstance(labels, str):
        raise InvalidRequest(f"labels is one string, {labels!r}; expected a list of strings")
    checked = tuple(labels)
    if not checked:
        raise InvalidRequest("labels is empty; expected at least one")
    for label in checked:
        if not isinstance(label, str) or not label.strip():
            raise InvalidRequest(f"label {label!r} is not text; expected a word or more")
    if len(set(checked)) < len(checked):
        twice = next(label for label in checked if checked.count(label) > 1)
        raise InvalidRequest(f"label {twice!r} is given twice; expected each label once")
    return checked


def _checked_templates(templates: Sequence[str]) -> tuple[str, ...]:
    if isinstance(templates, str):
        raise InvalidRequest(f"templates is one string, {templates!r}; expected a list of strings")
    checked = tuple(templates)
    if not checked:
        raise InvalidRequest("templates is empty; expected at least one, or None for the default")
    for template in checked:
        if not isinstance(template, str) or "{}" not in template:
            raise InvalidRequest(f"template {template!r} has no {{}}; expected {{}} where the label goes")
    return checked
