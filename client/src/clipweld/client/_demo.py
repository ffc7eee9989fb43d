"""Comparison of the base and the newest version on one image and one set of labels, for the demo page."""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, TypeVar

from clipweld.client import Classification, Task, ZeroShotClassifier
from clipweld.client.errors import ClientError, InvalidRequest

BASE_VERSION = 1
TOP_K = 5
# Each version is timed this often, or less often once all turns together have taken this many seconds.
TURNS = 5
TURNS_S = 1.0

_T = TypeVar("_T")


class Comparison:
    """The base and the newest version of a served CLIP, given the same images.

    May be shared by threads. A single worker thread talks to the server, so that times are not disturbed by other
    questions, and a connection over HTTP never changes threads. Which versions are served is looked up for each
    question.

    Args:
        url: as in `ZeroShotClassifier`.
        model: as in `ZeroShotClassifier`.

    Raises:
        InvalidRequest: the URL can't be used. The server is not contacted before the first question.
    """

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = url, model
        self._any_version = ZeroShotClassifier(url, model)
        self._opened: dict[int, ZeroShotClassifier] = {}
        self._questions: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._answer_all, daemon=True)
        self._thread.start()

    def state(self) -> dict[str, Any]:
        """Return what is served now, as plain JSON types.

        Returns:
            {"url", "model", "base": 1 or None, "newest": the newest version above 1 or None, "tasks": those of the
            newest, each {"name", "class_names", "accuracy_before", "accuracy_after"}}

        Raises:
            ClientError: the server can't be reached, or serves nothing that can be used.
        """
        return self._in_turn(self._state)

    def answer(self, image: bytes, labels: Sequence[str], task: str | None) -> dict[str, Any]:
        """Classify an image with both versions, and time them.

        A latency is the median over requests made in turns, after a first request that also encodes the labels.

        Args:
            image: the bytes of an image file.
            labels: what it may show; not used if there is a task.
            task: name of a task of the newest version. The base gets its class names and prompts.

        Returns:
            {"state": as `state`, "labels": their number, "answers": base first, each {"version", "latency_ms",
            "predictions": the best, each {"label", "probability", "score"}}}

        Raises:
            ClientError: the image, labels or task are wrong, or the server can't be reached or used.
        """
        return self._in_turn(lambda versions: self._answer(versions, image, labels, task))

    def close(self) -> None:
        """Close the connections; if a question is still being answered, wait for it no longer than a second."""
        self._questions.put(None)
        self._thread.join(timeout=1)

    def _in_turn(self, work: Callable[[list[int]], _T]) -> _T:
        future: Future[_T] = Future()
        self._questions.put((future, lambda: self._on_served_versions(work)))
        return future.result()

    def _answer_all(self) -> None:
        while question := self._questions.get():
            future, work = question
            try:
                future.set_result(work())
            except BaseException as exc:
                future.set_exception(exc)
        self._close_all_but(())
        self._any_version.close()

    def _on_served_versions(self, work: Callable[[list[int]], _T]) -> _T:
        """Do work on the served versions, and repeat it once if these changed in the meantime."""
        versions = self._served_versions()
        try:
            return work(versions)
        except ClientError:
            if (switched := self._served_versions()) == versions:
                raise
        return work(switched)

    def _served_versions(self) -> list[int]:
        served: list[int] = []
        try:
            served = self._any_version.versions()
        finally:  # even on errors: a server that comes back may have other versions under the same numbers
            self._close_all_but(served)
        return served

    def _close_all_but(self, versions: Iterable[int]) -> None:
        for version in set(self._opened) - set(versions):
            self._opened.pop(version).close()

    def _open(self, version: int) -> ZeroShotClassifier:
        if version not in self._opened:
            self._opened[version] = ZeroShotClassifier(self._url, self._model, version=version)
        return self._opened[version]

    def _state(self, versions: list[int]) -> dict[str, Any]:
        newest = versions[-1] if versions[-1] != BASE_VERSION else None
        return {
            "url": self._url,
            "model": self._model,
            "base": BASE_VERSION if BASE_VERSION in versions else None,
            "newest": newest,
            "tasks": [_task_row(task) for task in self._open(newest).tasks()] if newest else [],
        }

    def _answer(self, versions: list[int], image: bytes, labels: Sequence[str], task: str | None) -> dict[str, Any]:
        state = self._state(versions)
        compared = [version for version in (state["base"], state["newest"]) if version]
        templates = None
        if task is not None:
            learned = self._learned(compared[-1], task)
            labels, templates = learned.class_names, learned.templates

        def ask(version: int) -> Classification:
            (answer,) = self._open(version).classify([image], labels=labels, templates=templates, top_k=TOP_K)
            return answer

        answers = [ask(version) for version in compared]
        times_s = _times_in_turns(compared, ask)
        return {
            "state": state,
            "labels": len(labels),
            "answers": [
                {
                    "version": answer.version,
                    "latency_ms": 1e3 * statistics.median(times_s[version]),
                    "predictions": [asdict(prediction) for prediction in answer.predictions],
                }
                for version, answer in zip(compared, answers, strict=True)
            ],
        }

    def _learned(self, version: int, name: str) -> Task:
        for task in self._open(version).tasks():
            if task.name == name:
                return task
        raise InvalidRequest(f"version {version}, the newest now, has not learned {name!r}; choose another task")


def _times_in_turns(versions: Sequence[int], ask: Callable[[int], Any]) -> dict[int, list[float]]:
    """Return the seconds of each request, by version; versions take turns at going first."""
    times_s: dict[int, list[float]] = {version: [] for version in versions}
    started = time.perf_counter()
    for turn in range(TURNS):
        for version in versions if turn % 2 == 0 else reversed(versions):
            asked = time.perf_counter()
            ask(version)
            times_s[version].append(time.perf_counter() - asked)
        if time.perf_counter() - started > TURNS_S:
            break
    return times_s


def _task_row(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "class_names": list(task.class_names),
        "accuracy_before": task.accuracy_before,
        "accuracy_after": task.accuracy_after,
    }
