"""What the demo page asks the server: one image and one set of labels, of the base and of the newest version."""

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
TURNS = 5  # how often each version is timed,
TURNS_S = 1.0  # as long as all of them together take no longer than this many seconds

_T = TypeVar("_T")


class Comparison:
    """The base and the newest version of a served CLIP, given the same images.

    May be shared by threads. A single one of its own talks to the server: times are not disturbed by other questions,
    and a connection over HTTP never changes threads. What is served is looked up anew for each question.

    Args:
        url, model: as in `ZeroShotClassifier`.

    Raises:
        InvalidRequest: the url cannot be used. The server is not contacted before the first question.
    """

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = url, model
        self._any_version = ZeroShotClassifier(url, model)
        self._opened: dict[int, ZeroShotClassifier] = {}
        self._questions: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._answer_all, daemon=True)
        self._thread.start()

    def state(self) -> dict[str, Any]:
        """What is served now, as plain JSON types.

        Returns:
            {"url", "model", "base": 1 or None, "newest": the newest version above 1 or None, "tasks": of the newest,
            each {"name", "class_names", "accuracy_before", "accuracy_after"}}

        Raises:
            ClientError: the server is away, or serves nothing that can be used.
        """
        return self._in_turn(self._state)

    def answer(self, image: bytes, labels: Sequence[str], task: str | None) -> dict[str, Any]:
        """Ask both versions; times are medians over requests in turns, after a first one that encodes the labels.

        Args:
            image: an image file.
            labels: what it may show; not used where there is a task.
            task: a task of the newest version. The base gets its class names and prompts.

        Returns:
            {"state": as `state`, "labels": how many there were, "answers": base first, each {"version", "latency_ms",
            "predictions": the best, each {"label", "probability", "score"}}}

        Raises:
            ClientError: image, labels or task are wrong, or the server is.
        """
        return self._in_turn(lambda versions: self._answer(versions, image, labels, task))

    def close(self) -> None:
        """Close the connections, unless a question is still out: nobody waits for its answer."""
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
        """Do the work on what is served; once more where that was switched in the meantime."""
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
        finally:  # a server that was away may come back with other versions of the same numbers
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
    """Seconds of each request, by version; which version goes first alternates."""
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
