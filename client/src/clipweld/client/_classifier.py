"""Zero-shot classification against a served CLIP: a blocking and an asyncio class over one core."""

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
    """What the blocking and the asyncio class have in common."""

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
        """Return the address and settings, headers included; a copy opens its own connections."""
        return {name: value for name, value in vars(self).items() if name not in ("_runtime", "_core")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._connect()


class ZeroShotClassifier(_Classifier):
    """A client of a served CLIP that ranks labels for images.

    The image and text features of an answer always come from one version. An instance may be shared by threads. In a
    forked child it opens new connections. Pickling or copying an instance keeps its address and settings, headers
    included, but not its connections. An open instance does not keep the interpreter from exiting.

    Numeric arguments may be of any numeric type, or text that spells a number. A server on loopback is contacted
    directly; for any other, the environment variables http_proxy, https_proxy, grpc_proxy and no_proxy apply.

    Args:
        url: ``host:port`` or ``grpc://host:port`` for gRPC, ``http://host:port`` for HTTP; ``grpcs://`` and
            ``https://`` with TLS.
        model: name of the served model.
        version: number of the version to use. "latest" or None: the newest one that is ready, chosen once per call; a
            switch on the server is noticed within a second. If the server unloads a version during a call, or comes
            back with another version of the same number, the remaining images are classified by the new one.
        timeout_s: limit on one request to the server, in seconds; None: no limit.
        retries: how often a request without an answer is retried, after randomised, growing pauses.
        headers: sent with every request, such as ``{"authorization": "Bearer ..."}``.
        tls: certificates for ``grpcs://`` and ``https://``.
        exif_orientation: rotate and mirror an image according to its Exif orientation, as in training, so that the
            model sees what a person sees. False: the pixels are exactly those of open_clip's transform.
        allow_urls: fetch images given as http:// or https:// URLs, each of at most 50 MB within 30 s, and never from
            loopback, private or link-local addresses.

    Raises:
        InvalidRequest: an argument is wrong. The server is not contacted before the first call.

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

        Several requests are in flight at a time, and only a few images are read ahead, so there may be millions.

        Args:
            images: one or several. Each is a path, the bytes of an image file, an open binary file, a PIL image, or an
                array or tensor of shape (height, width[, channels]) or (channels, height, width), in grey, RGB or RGBA,
                of dtype uint8, uint16, bool, or float with values in [0, 1]. A batch of such arrays counts as several
                images, a folder as all image files below it. If an iterator raises, its exception is raised here, once
                all images before it have been answered.
            labels: what the images may show, or a mapping of each label to its prompt or prompts. Give exactly one of
                ``labels`` and ``task``.
            task: name of a task that the served version has learned. Its class names are the labels, its templates the
                prompts.
            templates: prompts with ``{}`` where the label goes. The features of a label's prompts are averaged, as in
                CLIP. None: those of the task, or "a photo of a {}". An article before ``{}`` is dropped if the label
                begins with one.
            top_k: maximum number of labels per image.
            unreadable: called with the error of each image that can't be read, which is then skipped. None: the first
                such error is raised.
            left_out: called with a `LeftOut` for whatever else a folder contains: other files, hidden ones, links to
                folders, folders that can't be read. None: a warning sums it up after the folder's last image.
            deadline_s: limit on the whole call, in seconds; None: no limit.

        Returns:
            A generator of one `Classification` per image, in the order of the images, as they arrive. Requests start
            when the first answer is taken. Close the generator to stop early.

        Raises:
            BadImage: an image can't be read; the message names it.
            InvalidRequest: an argument is wrong, or the server refused the request as malformed.
            TooManyLabels: there are more labels or prompts than a call accepts.
            UnknownTask: the served version has not learned ``task``.
            ModelNotFound: the server does not serve the model.
            VersionGone: the version that the caller named is not served, or no longer.
            ContractMismatch: the model was exported for another version of this client.
            NotAllowed: the server requires other headers or certificates.
            ServerUnavailable: there is no server at the address.
            RequestTimeout: the server took longer than ``timeout_s``, or the call longer than ``deadline_s``.
            ServerError: the server failed, or is busy (`ServerBusy`).
        """
        question = _question(labels, task, templates, top_k, unreadable=unreadable, left_out=left_out)
        return iterate(self._core.classify(images, question, unreadable, left_out, _checked(deadline_s)))

    def image_features(self, images: ImageLike | Iterable[ImageLike], *, deadline_s: float | None = None) -> np.ndarray:
        """Encode images.

        Args:
            images: as in `classify`.
            deadline_s: limit on the whole call, in seconds; None: no limit.

        Returns:
            float32 (num_images, embed_dim), L2-normalised, all from one version.

        Raises:
            BadImage: an image can't be read; the message names it.
            ClientError: any other error that `classify` raises.

        Example:
            >>> with ZeroShotClassifier(url) as clip:
            ...     cosines = clip.image_features("samples/seven.png") @ clip.text_features(["seven", "a shoe"]).T
            >>> cosines.shape
            (1, 2)
        """
        return run(self._core.image_features(images, _checked(deadline_s)))

    def text_features(self, texts: str | Sequence[str], *, deadline_s: float | None = None) -> np.ndarray:
        """Encode texts as they are, without templates.

        Args:
            texts: one or several. A text longer than the model's context is cut, as in CLIP.
            deadline_s: limit on the whole call, in seconds; None: no limit.

        Returns:
            float32 (num_texts, embed_dim), L2-normalised, all from one version.

        Raises:
            InvalidRequest: ``texts`` is not text, or not a list of texts.
            ClientError: any error of the server that `classify` raises.
        """
        return run(self._core.text_features(_texts(texts), _checked(deadline_s)))

    def card(self, *, deadline_s: float | None = None) -> Card:
        """Return the card of the version in use: its sizes, base and learned tasks.

        Args:
            deadline_s: limit on the whole call, in seconds; None: no limit.

        Raises:
            ClientError: any error of the server that `classify` raises.
        """
        return run(self._core.card(_checked(deadline_s)))

    def tasks(self, *, deadline_s: float | None = None) -> tuple[Task, ...]:
        """Return the tasks that the version in use has learned; none for the base model.

        Args:
            deadline_s: limit on the whole call, in seconds; None: no limit.

        Raises:
            ClientError: any error of the server that `classify` raises.
        """
        return self.card(deadline_s=deadline_s).tasks

    def versions(self, *, deadline_s: float | None = None) -> list[int]:
        """Return the numbers of all versions that are ready now, in rising order.

        Args:
            deadline_s: limit on the whole call, in seconds; None: no limit.

        Raises:
            ModelNotFound: the server does not serve the model, or has no version of it ready.
            ClientError: any other error of the server that `classify` raises.
        """
        return run(self._core.versions(_checked(deadline_s)))

    def server_info(self, *, deadline_s: float | None = None) -> ServerInfo:
        """Return the name and version of the server, and its extensions of the protocol.

        Args:
            deadline_s: limit on the whole call, in seconds; None: no limit.

        Raises:
            ClientError: any error of the server that `classify` raises.
        """
        return run(self._core.server_info(_checked(deadline_s)))


class AsyncZeroShotClassifier(_Classifier):
    """`ZeroShotClassifier` for asyncio, with the same arguments, methods, answers and errors.

    An instance may be shared by tasks and by event loops, whether these run one after the other or in several threads.

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
        """Like `ZeroShotClassifier.classify`, for ``async for``."""
        question = _question(labels, task, templates, top_k, unreadable=unreadable, left_out=left_out)
        return self._core.classify(images, question, unreadable, left_out, _checked(deadline_s))

    async def image_features(
        self, images: ImageLike | Iterable[ImageLike], *, deadline_s: float | None = None
    ) -> np.ndarray:
        """Like `ZeroShotClassifier.image_features`."""
        return await self._core.image_features(images, _checked(deadline_s))

    async def text_features(self, texts: str | Sequence[str], *, deadline_s: float | None = None) -> np.ndarray:
        """Like `ZeroShotClassifier.text_features`."""
        return await self._core.text_features(_texts(texts), _checked(deadline_s))

    async def card(self, *, deadline_s: float | None = None) -> Card:
        """Like `ZeroShotClassifier.card`."""
        return await self._core.card(_checked(deadline_s))

    async def tasks(self, *, deadline_s: float | None = None) -> tuple[Task, ...]:
        """Like `ZeroShotClassifier.tasks`."""
        return (await self.card(deadline_s=deadline_s)).tasks

    async def versions(self, *, deadline_s: float | None = None) -> list[int]:
        """Like `ZeroShotClassifier.versions`."""
        return await self._core.versions(_checked(deadline_s))

    async def server_info(self, *, deadline_s: float | None = None) -> ServerInfo:
        """Like `ZeroShotClassifier.server_info`."""
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
