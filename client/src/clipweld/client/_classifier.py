"""Zero-shot classification against a served CLIP: two faces of one core."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import numpy as np

from clipweld.client._address import TLS, parse_url
from clipweld.client._arguments import count, model_name, seconds, shown, text, version_number
from clipweld.client._card import Card, Task
from clipweld.client._core import Core, Question, Settings
from clipweld.client._folders import LeftOut
from clipweld.client._images import ImageLike, Reading
from clipweld.client._labels import Labels, checked_labels, checked_templates
from clipweld.client._results import Classification, ServerInfo
from clipweld.client._runtime import AsyncioRuntime, BlockingRuntime, Runtime, iterate, run
from clipweld.client.errors import BadImage, InvalidRequest

DEFAULT_URL = "localhost:8001"


class _Classifier:
    """What both faces are made of."""

    _runtime_type: type[Runtime]

    def __init__(
        self,
        url: str = DEFAULT_URL,
        model: str = "clip",
        version: int | Literal["latest"] | None = "latest",
        *,
        timeout_s: float | None = 30.0,
        retries: int = 3,
        headers: Mapping[str, str] | None = None,
        tls: TLS | None = None,
        exif_orientation: bool = True,
        allow_urls: bool = False,
    ) -> None:
        self._settings = Settings(
            address=parse_url(url, tls, headers),
            model=model_name(model),
            version=None if version is None or version == "latest" else version_number(version),
            timeout_s=seconds("timeout_s", timeout_s),
            retries=count("retries", retries, 0),
            reading=Reading(exif_orientation=exif_orientation, allow_urls=allow_urls),
        )
        self._connect()

    def _connect(self) -> None:
        self._runtime = self._runtime_type()
        self._core = Core(self._settings, self._runtime)

    def __getstate__(self) -> dict[str, Any]:
        """Address and settings, headers among them; a copy has connections of its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_runtime", "_core")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._connect()


class ZeroShotClassifier(_Classifier):
    """A served CLIP that names what is on images, among labels given in words.

    Image and text features of an answer always come from one version. May be shared by threads. In a forked child it
    connects anew; pickled and copied, it is its address and settings, headers included. Nothing of it keeps the
    interpreter from ending.

    Args:
        url: ``host:port`` or ``grpc://host:port`` for gRPC, ``http://host:port`` for HTTP; ``grpcs://`` and
            ``https://`` with TLS.
        model: name of the served model.
        version: which one to use. "latest": the newest that is ready, for each call as a whole; a server that switches
            is followed within a second. Where it unloads a version during a call, or comes back with another version
            of the same number, the remaining images are classified by the new one.
        timeout_s: limit on one request to the server, in seconds; None: no limit.
        retries: how often a request without an answer is retried, after pauses that grow and vary.
        headers: sent with every request, such as ``{"authorization": "Bearer ..."}``.
        tls: certificates.
        exif_orientation: turn and mirror an image as its Exif orientation says, as in training, so that the model sees
            what a person sees. False: pixels exactly as open_clip's transform gives them.
        allow_urls: fetch images that are named by an http:// or https:// address: at most 50 MB in 30 s, and never from
            loopback, private or link-local addresses.

    Numbers may be of any numeric type, or text that spells one. A server on loopback is contacted directly; for any
    other, http_proxy, https_proxy, grpc_proxy and no_proxy count.

    Raises:
        InvalidRequest: the arguments are wrong. The server is not contacted before the first call.

    Example:
        >>> clip = ZeroShotClassifier(url)
        >>> for answer in clip.classify("samples/seven.png", labels=["the number seven", "a shoe"]):
        ...     print(answer.best.label)
        the number seven
        >>> clip.close()
    """

    _runtime_type = BlockingRuntime

    def __enter__(self) -> ZeroShotClassifier:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. A later call opens a new one."""
        self._core.close()

    def classify(
        self,
        images: ImageLike | Iterable[ImageLike],
        labels: Labels | None = None,
        task: str | None = None,
        templates: Sequence[str] | None = None,
        top_k: int = 5,
        *,
        unreadable: Callable[[BadImage], object] | None = None,
        left_out: Callable[[LeftOut], object] | None = None,
        deadline_s: float | None = None,
    ) -> Generator[Classification, None, None]:
        """Rank labels for each image.

        Several requests are on their way at a time, and a few images are read ahead; never all of them, so there may
        be millions.

        Args:
            images: one or several, each a path, the bytes of an image file, an open binary file, a PIL image, or an
                array or tensor (height, width[, channels]) or (channels, height, width), grey, RGB or RGBA, of uint8,
                uint16, bool, or floats in [0, 1]; a batch of such arrays; or a folder, for all image files below it.
                What an iterator raises comes out when all that it gave before has been answered.
            labels: what the images may show, or a mapping of that to the prompt or prompts of each. Exactly one of
                ``labels`` and ``task`` is given.
            task: a task of the served version: its class names are the labels, its templates the prompts.
            templates: prompts with ``{}`` where the label goes, averaged as CLIP does. None: those of the task, or
                "a photo of a {}". The article before ``{}`` goes where a label brings its own.
            top_k: how many labels an image gets at most.
            unreadable: called with the error of each image that cannot be read, which is then left out; None: the
                first one is raised.
            left_out: called with a `LeftOut` for whatever a folder has besides image files: other files, hidden ones,
                links to folders, folders that cannot be read; None: a warning says how much that is, once the folder is
                through.
            deadline_s: limit on the whole call, in seconds; None: no limit.

        Returns:
            One `Classification` per image, in the order given, as they arrive; requests start once the first is
            taken. Close it to stop earlier.

        Raises:
            BadImage: names the image.
            UnknownTask, InvalidRequest, TooManyLabels: the arguments are wrong.
            VersionGone: the version that the caller named is no longer served.
            ServerUnavailable, RequestTimeout, ServerError, NotAllowed, ModelNotFound, ContractMismatch: see
                `clipweld.client.errors`.
        """
        question = _question(labels, task, templates, top_k, unreadable=unreadable, left_out=left_out)
        return iterate(self._core.classify(images, question, unreadable, left_out, _checked(deadline_s)))

    def image_features(self, images: ImageLike | Iterable[ImageLike], *, deadline_s: float | None = None) -> np.ndarray:
        """Encode images.

        Args:
            images: as in `classify`.
            deadline_s: as in `classify`.

        Returns:
            float32 (num_images, embed_dim), L2-normalised, all from one version.

        Raises:
            BadImage: names the image. Others as in `classify`.
        """
        return run(self._core.image_features(images, _checked(deadline_s)))

    def text_features(self, texts: str | Sequence[str], *, deadline_s: float | None = None) -> np.ndarray:
        """Encode texts as they are, without templates.

        Args:
            texts: one or several. What is longer than the context is cut, as in CLIP.
            deadline_s: as in `classify`.

        Returns:
            float32 (num_texts, embed_dim), L2-normalised, all from one version.

        Raises:
            ClientError: as in `classify`.
        """
        return run(self._core.text_features(_texts(texts), _checked(deadline_s)))

    def card(self, *, deadline_s: float | None = None) -> Card:
        """What the version in use is: sizes, lineage, tasks."""
        return run(self._core.card(_checked(deadline_s)))

    def tasks(self, *, deadline_s: float | None = None) -> tuple[Task, ...]:
        """The tasks that the version in use has learned; none for the base model."""
        return self.card(deadline_s=deadline_s).tasks

    def versions(self, *, deadline_s: float | None = None) -> list[int]:
        """The versions that are ready now, in rising order.

        Raises:
            ServerUnavailable, RequestTimeout, ModelNotFound: see `clipweld.client.errors`.
        """
        return run(self._core.versions(_checked(deadline_s)))

    def server_info(self, *, deadline_s: float | None = None) -> ServerInfo:
        """What answers at the address.

        Raises:
            ServerUnavailable, RequestTimeout: see `clipweld.client.errors`.
        """
        return run(self._core.server_info(_checked(deadline_s)))


class AsyncZeroShotClassifier(_Classifier):
    """`ZeroShotClassifier` for asyncio: the same arguments, methods, answers and errors.

    May be shared by tasks, and by event loops, one after the other or in several threads.

    Example:
        >>> async def name(picture):
        ...     async with AsyncZeroShotClassifier(url) as clip:
        ...         async for answer in clip.classify(picture, labels=["the number seven", "a shoe"]):
        ...             return answer.best.label
        >>> asyncio.run(name("samples/seven.png"))
        'the number seven'
    """

    _runtime_type = AsyncioRuntime

    async def __aenter__(self) -> AsyncZeroShotClassifier:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection. A later call opens a new one."""
        self._core.close()

    def classify(
        self,
        images: ImageLike | Iterable[ImageLike],
        labels: Labels | None = None,
        task: str | None = None,
        templates: Sequence[str] | None = None,
        top_k: int = 5,
        *,
        unreadable: Callable[[BadImage], object] | None = None,
        left_out: Callable[[LeftOut], object] | None = None,
        deadline_s: float | None = None,
    ) -> AsyncGenerator[Classification, None]:
        """As `ZeroShotClassifier.classify`, for ``async for``."""
        question = _question(labels, task, templates, top_k, unreadable=unreadable, left_out=left_out)
        return self._core.classify(images, question, unreadable, left_out, _checked(deadline_s))

    async def image_features(
        self, images: ImageLike | Iterable[ImageLike], *, deadline_s: float | None = None
    ) -> np.ndarray:
        """As `ZeroShotClassifier.image_features`."""
        return await self._core.image_features(images, _checked(deadline_s))

    async def text_features(self, texts: str | Sequence[str], *, deadline_s: float | None = None) -> np.ndarray:
        """As `ZeroShotClassifier.text_features`."""
        return await self._core.text_features(_texts(texts), _checked(deadline_s))

    async def card(self, *, deadline_s: float | None = None) -> Card:
        """As `ZeroShotClassifier.card`."""
        return await self._core.card(_checked(deadline_s))

    async def tasks(self, *, deadline_s: float | None = None) -> tuple[Task, ...]:
        """As `ZeroShotClassifier.tasks`."""
        return (await self.card(deadline_s=deadline_s)).tasks

    async def versions(self, *, deadline_s: float | None = None) -> list[int]:
        """As `ZeroShotClassifier.versions`."""
        return await self._core.versions(_checked(deadline_s))

    async def server_info(self, *, deadline_s: float | None = None) -> ServerInfo:
        """As `ZeroShotClassifier.server_info`."""
        return await self._core.server_info(_checked(deadline_s))


def _question(
    labels: Labels | None, task: str | None, templates: Sequence[str] | None, top_k: int, **called: object
) -> Question:
    if (labels is None) == (task is None):
        raise InvalidRequest("give exactly one of labels and task")
    for name, function in called.items():
        if function is not None and not callable(function):
            raise InvalidRequest(f"{name} is {shown(function)}; expected a function, or None")
    prompts = None if templates is None else checked_templates(templates)
    return Question(
        None if labels is None else checked_labels(labels, prompts),
        None if task is None else text("task", task),
        prompts,
        count("top_k", top_k, 1),
    )


def _checked(deadline_s: float | None) -> float | None:
    limit_s = seconds("deadline_s", deadline_s)
    return None if limit_s == math.inf else limit_s


def _texts(texts: Any) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Iterable) or isinstance(texts, (bytes, Mapping)):
        raise InvalidRequest(f"texts is {shown(texts)}; expected text, or a list of texts")
    listed = list(texts)
    for index, one in enumerate(listed):
        if not isinstance(one, str):
            raise InvalidRequest(f"text {index} is {shown(one)}; expected text")
    return listed
