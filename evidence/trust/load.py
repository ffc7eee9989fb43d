"""Clients that send requests without pause while a server fails or changes, and the check of all their answers."""

from __future__ import annotations

import asyncio
import io
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from clipweld.client import TLS, AsyncZeroShotClassifier, Classification, ZeroShotClassifier
from clipweld.client.errors import ClientError
from evidence.trust.answers import FEW, LABELS, Known

MARGIN_S = 1.5  # allowance for a busy machine
TICK_S, STALL_S = 0.05, 0.25
FORMATS: tuple[tuple[str, dict[str, Any]], ...] = (  # lossless, so their pixels are known
    ("PNG", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("WEBP", {"lossless": True}),
)


def _lists() -> list[list[str]]:
    """Return lists of few or many labels.

    There are so few lists that clients soon have encoded all of them, and then use the cached features.
    """
    draw = random.Random(0)
    few = [draw.sample(FEW, draw.randint(2, len(FEW))) for _ in range(40)]
    return [
        *few,
        *(draw.sample(LABELS, draw.randint(2, len(LABELS))) for _ in range(4)),
        *[list(FEW)] * 20,
        list(LABELS),
    ]


LISTS = _lists()


class Truth:
    """The correct answers of each version at each time, since a server may be restarted with other files."""

    def __init__(self, versions: Mapping[int, Known]) -> None:
        self._times: list[tuple[float, Mapping[int, Known]]] = [(float("-inf"), versions)]

    def change(self, versions: Mapping[int, Known]) -> None:
        """Replace the correct answers from now on."""
        self._times.append((time.monotonic(), versions))

    def agrees(self, began: float, picture: int, labels: Sequence[str], answer: Classification) -> bool:
        """Return whether an answer was correct at any time since its call began."""
        for since, versions in reversed(self._times):
            if answer.version in versions and versions[answer.version].agrees(picture, labels, answer):
                return True
            if since <= began:
                return False
        return False


@dataclass(frozen=True)
class Manner:
    """How clients send requests.

    Attributes:
        timeout_s, retries, deadline_s: the client's settings; a fifth of the calls have no deadline.
        most_images: most images per call.
        pause_s: mean pause between calls.
    """

    timeout_s: float = 1.0
    retries: int = 2
    deadline_s: float | None = 2.5
    most_images: int = 10
    pause_s: float = 0.0

    def longest_s(self, images: int) -> float:
        """Return the longest time that a call without a deadline may take.

        It asks for the version, for its card twice, for labels and for images, each with retries.
        """
        requests = 6 + images // 8
        return requests * (1 + self.retries) * (self.timeout_s + 1)


@dataclass
class Load:
    """Four clients, blocking and asyncio over gRPC and HTTP, each used by several threads or tasks at once.

    Args:
        urls: URLs by protocol.
        pictures: images to classify.
        truth: the correct answers.
        seed: seed of the questions.
        workers: threads or tasks per client.

    Attributes:
        ends: how often calls ended right, wrong, overdue, or with each error.
        faults: descriptions of broken promises, with what is needed to reproduce the call.
        images: number of images that were answered.
        stalled_s: how long this whole process did not run; this time does not count towards calls.
    """

    urls: Mapping[str, str]
    pictures: Sequence[Image.Image]
    truth: Truth
    seed: str
    tls: TLS | None = None
    workers: int = 2
    manner: Manner = Manner()
    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    images: int = 0
    stalled_s: float = 0.0

    def __enter__(self) -> Load:
        self._stopping, self._counting = threading.Event(), threading.Lock()
        self._last_right: dict[str, float] = {}
        self._forms = [_forms(picture) for picture in self.pictures]
        settings: dict[str, Any] = {
            "timeout_s": self.manner.timeout_s,
            "retries": self.manner.retries,
            "tls": self.tls,
        }
        self._blocking = {f"blocking {name}": ZeroShotClassifier(url, **settings) for name, url in self.urls.items()}
        self._asyncio = {f"asyncio {name}": AsyncZeroShotClassifier(url, **settings) for name, url in self.urls.items()}
        self._threads = [
            threading.Thread(target=self._block, args=(name, clip, worker), name=name, daemon=True)
            for name, clip in self._blocking.items()
            for worker in range(self.workers)
        ]
        self._threads += [
            threading.Thread(target=lambda n=name, c=clip: asyncio.run(self._suspend_all(n, c)), name=name, daemon=True)
            for name, clip in self._asyncio.items()
        ]
        self._threads.append(threading.Thread(target=self._watch_the_clock, name="clock", daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop all clients; a call that never ends is recorded as a fault."""
        self._stopping.set()
        end = time.monotonic() + self.manner.longest_s(self.manner.most_images) + MARGIN_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                self.faults.append(f"{self.seed}, {thread.name}: a call never ended")
        for clip in self._blocking.values():
            clip.close()

    def wait_until_right(self, since: float, at_most_s: float) -> float | None:
        """Return the seconds from ``since`` until every client has had a correct answer, or None if one has not.

        Args:
            since: a value of ``time.monotonic()``.
            at_most_s: how long after ``since`` to wait.
        """
        seen: dict[str, float] = {}
        while time.monotonic() < since + at_most_s:
            for client, ended in list(self._last_right.items()):
                if ended > since:
                    seen.setdefault(client, ended)
            if len(seen) == len(self._blocking) + len(self._asyncio):
                return max(seen.values()) - since
            time.sleep(0.01)
        return None

    def _watch_the_clock(self) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            time.sleep(TICK_S)
            late_s = time.monotonic() - began - TICK_S
            if late_s > STALL_S:
                self.stalled_s += late_s

    def _block(self, name: str, clip: ZeroShotClassifier, worker: int) -> None:
        number = 0
        while not self._stopping.is_set():
            question, error = self._question(name, worker, number), None
            try:
                question.take(clip.classify(*question.arguments, deadline_s=question.deadline_s))
            except Exception as exc:
                error = exc
            self._judge(question, error)
            self._stopping.wait(question.pause_s)
            number += 1

    async def _suspend_all(self, name: str, clip: AsyncZeroShotClassifier) -> None:
        async with clip:
            await asyncio.gather(*(self._suspend(name, clip, worker) for worker in range(self.workers)))

    async def _suspend(self, name: str, clip: AsyncZeroShotClassifier, worker: int) -> None:
        number = 0
        while not self._stopping.is_set():
            question, error = self._question(name, worker, number), None
            try:
                await question.take_async(clip.classify(*question.arguments, deadline_s=question.deadline_s))
            except Exception as exc:
                error = exc
            self._judge(question, error)
            await asyncio.sleep(question.pause_s)
            number += 1

    def _question(self, client: str, worker: int, number: int) -> Question:
        which = f"{self.seed}, {client}, worker {worker}, call {number}"
        draw = random.Random(which)
        count = draw.choice([1, 1, 2, 3, draw.randint(1, self.manner.most_images)])
        places = draw.choices(range(len(self.pictures)), k=count)
        labels = draw.choice(LISTS)
        return Question(
            client,
            which,
            self.truth,
            places,
            [draw.choice(self._forms[place]) for place in places],
            labels,
            None if draw.random() < 0.2 else self.manner.deadline_s,
            draw.randint(1, count) if draw.random() < 0.1 else count,
            draw.uniform(0, 2 * self.manner.pause_s),
            self.stalled_s,
        )

    def _judge(self, question: Question, error: Exception | None) -> None:
        ended = time.monotonic()
        outcome = "right" if error is None else type(error).__name__
        fault = ""
        limit_s = (question.deadline_s or self.manner.longest_s(len(question.places))) + MARGIN_S
        took_s = ended - question.began - (self.stalled_s - question.stalled_s)
        if took_s > limit_s:
            outcome = "overdue"
            fault = f"took {took_s:.1f} s of {limit_s:.1f}, then {error!r}"
        if error is not None and not isinstance(error, ClientError):
            outcome = "foreign"
            fault = f"{type(error).__name__} is no ClientError: {error}"
        if question.wrong or (error is None and question.taken < question.enough):
            outcome = "wrong"
            fault = question.wrong or f"{question.taken} of {question.enough} images have an answer"
        with self._counting:
            self.ends[outcome] += 1
            self.images += question.taken
            if fault:
                self.faults.append(f"{question.which}: {fault}")
        if outcome == "right":
            self._last_right[question.client] = ended


@dataclass
class Question:
    """One call, and the check of its answers.

    Attributes:
        enough: number of answers after which the stream is closed.
        stalled_s: ``Load.stalled_s`` when the call began.
        wrong: the last wrong answer, if any.
        taken: number of answers so far.
    """

    client: str
    which: str
    truth: Truth
    places: Sequence[int]
    images: Sequence[Any]
    labels: Sequence[str]
    deadline_s: float | None
    enough: int
    pause_s: float
    stalled_s: float
    wrong: str = ""
    taken: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of ``classify``: images, labels, task, templates, top_k."""
        return self.images, self.labels, None, None, len(self.labels)

    def take(self, answers: Generator[Classification, None, None]) -> None:
        for answer in answers:
            if self._is_last(answer):
                return answers.close()
        return None

    async def take_async(self, answers: AsyncGenerator[Classification, None]) -> None:
        async for answer in answers:
            if self._is_last(answer):
                return await answers.aclose()
        return None

    def _is_last(self, answer: Classification) -> bool:
        picture = self.places[self.taken]
        if not self.truth.agrees(self.began, picture, self.labels, answer):
            self.wrong = f"picture {picture}, {len(self.labels)} labels: version {answer.version}, {answer}"
        self.taken += 1
        return self.taken == self.enough < len(self.places)


def _forms(picture: Image.Image) -> list[Any]:
    """Return one picture in every form that the client accepts and that keeps its pixels."""
    forms: list[Any] = [picture, np.asarray(picture)]
    for kind, settings in FORMATS:
        file = io.BytesIO()
        picture.save(file, kind, **settings)
        forms.append(file.getvalue())
    return forms
