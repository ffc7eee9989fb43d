"""A classifier used before a fork works in the child and in the parent, whatever requests were in flight."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from clipweld.client import AsyncZeroShotClassifier, ZeroShotClassifier
from clipweld.client.errors import InvalidRequest, RequestTimeout

LABELS = ["cat", "dog"]
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(params=["grpc", "http"])
def url(request, server) -> str:
    return server.url if request.param == "grpc" else server.http_url


def best(clip):
    if isinstance(clip, ZeroShotClassifier):
        return next(clip.classify(PICTURE, LABELS)).best.label

    async def first():
        return (await anext(clip.classify(PICTURE, LABELS))).best.label

    return asyncio.run(first())


def close(clip):
    asyncio.run(clip.aclose()) if isinstance(clip, AsyncZeroShotClassifier) else clip.close()


def in_child(work):
    """Return what ``work`` returns in a forked child, or the error that it raises there."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            os.write(writable, str(work()).encode())
        except BaseException as exc:
            os.write(writable, f"{type(exc).__name__}: {exc}".encode())
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as answer:
        said = answer.read().decode()
    assert os.waitpid(child, 0)[1] == 0, "the child was stopped, or ended by itself"
    return said


@pytest.mark.parametrize("kind", [ZeroShotClassifier, AsyncZeroShotClassifier])
def test_a_child_and_a_grandchild_open_their_own_connections(url, kind):
    clip = kind(url, timeout_s=10, retries=0)
    expected = best(clip)
    for _ in range(3):
        assert in_child(lambda: best(clip)) == expected
        assert in_child(lambda: in_child(lambda: best(clip))) == expected
        assert best(clip) == expected, "the parent's connections are what they were"
    close(clip)


@pytest.mark.parametrize("kind", [ZeroShotClassifier, AsyncZeroShotClassifier])
def test_closing_in_the_child_leaves_the_parent_alone(url, kind):
    def close_and_ask():
        close(clip)
        return best(clip)

    clip = kind(url, timeout_s=10, retries=0)
    expected = best(clip)
    assert in_child(close_and_ask) == expected
    assert best(clip) == expected
    close(clip)


def test_a_fork_during_requests_of_other_threads(url):
    """Any lock may be held and any request may be in flight at the moment of the fork."""
    check("fork_amid_requests", url)


def fork_amid_requests(url):
    errors, stop = [], threading.Event()

    def keep_asking():
        while not stop.is_set():
            try:
                list(clip.classify([PICTURE] * 20, [str(time.monotonic()), "dog"]))
            except Exception as exc:
                errors.append(exc)

    with ZeroShotClassifier(url, timeout_s=20, retries=0) as clip:
        expected = best(clip)
        threads = [threading.Thread(target=keep_asking) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                assert in_child(lambda: best(clip)) == expected
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert errors == []
        assert best(clip) == expected


def test_a_child_in_which_grpc_cannot_work_reports_that(server):
    """gRPC without fork support does not survive a fork in which a connection is open."""
    check("fork_without_support", server.url, GRPC_ENABLE_FORK_SUPPORT="0")


def fork_without_support(url):
    with ZeroShotClassifier(url, timeout_s=20) as clip:
        best(clip)
        assert in_child(lambda: best(clip)).startswith("InvalidRequest: gRPC does not work in this process")
        assert best(clip)


def check(function, url, **environment):
    """Run a function of this file in a new process, which does not import grpc before this package."""
    command = f"from tests.client.test_forks import {function}; {function}({url!r})"
    arguments = [sys.executable, "-W", "error", "-c", command]
    done = subprocess.run(arguments, env=os.environ | environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_call_begun_before_the_fork_belongs_to_the_parent(url):
    with ZeroShotClassifier(url, timeout_s=10) as clip:
        answers = clip.classify((PICTURE for _ in range(200)), LABELS)
        first = next(answers)

        def go_on():
            try:
                for _ in answers:
                    pass
            except InvalidRequest as exc:
                return str(exc)

        assert "begun in another process, before a fork" in in_child(go_on)
        assert in_child(answers.close) == "None"
        rest = list(answers)
        assert len(rest) == 199
        assert {answer.best.label for answer in rest} == {first.best.label}


def test_a_classifier_works_in_pools_of_forked_workers(url):
    with ZeroShotClassifier(url, timeout_s=10) as clip:
        expected = best(clip)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(best, [clip] * 4) == [expected] * 4
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
            assert list(pool.map(best, [clip] * 4)) == [expected] * 4


def test_images_may_come_from_workers_forked_during_requests(url):
    """This is how torch's DataLoader works."""

    def loaded():
        for _ in range(4):
            with multiprocessing.get_context("fork").Pool(1) as pool:
                yield from pool.map(np.copy, [PICTURE] * 10)

    with ZeroShotClassifier(url, timeout_s=20) as clip:
        assert {answer.best.label for answer in clip.classify(loaded(), LABELS)} == {best(clip)}


def test_a_child_that_exits_normally_prints_nothing(url):
    check("end", url)


def end(url):
    """Fork, use the classifier in both processes, and let both exit normally."""
    clip = ZeroShotClassifier(url, timeout_s=10)
    answers = clip.classify([PICTURE] * 100, LABELS)
    next(answers)
    child = os.fork()
    signal.alarm(30)
    best(clip)
    if child:
        assert os.waitpid(child, 0)[1] == 0


def test_deadlines_hold_in_the_child(fake):
    with ZeroShotClassifier(fake.url) as clip:
        clip.card()
        fake.before_infer = lambda *_: time.sleep(3)

        def ask():
            began = time.monotonic()
            try:
                best_of = list(clip.classify(PICTURE, LABELS, deadline_s=0.5))
            except RequestTimeout:
                best_of = "in time" if time.monotonic() - began < 2.5 else "late"
            return best_of

        assert in_child(ask) == "in time"
