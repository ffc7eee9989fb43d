"""One asynchronous classifier in several event loops: in sequence, after it was closed, and in several threads."""

import asyncio
import logging
import threading

import numpy as np
import pytest

from clipweld.client import AsyncZeroShotClassifier, ZeroShotClassifier

LABELS = ["cat", "dog"]
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(params=["grpc", "http"])
def url(request, server) -> str:
    return server.url if request.param == "grpc" else server.http_url


@pytest.fixture
def expected(url):
    with ZeroShotClassifier(url) as clip:
        return next(clip.classify(PICTURE, LABELS)).best.label


@pytest.fixture
def clip(url, caplog):
    """An asynchronous classifier; nothing may be logged, by asyncio or its libraries."""
    classifier = AsyncZeroShotClassifier(url, timeout_s=20)
    yield classifier
    asyncio.run(classifier.aclose())
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


async def best(clip, count=20):
    labels = [answer.best.label async for answer in clip.classify([PICTURE] * count, LABELS)]
    assert len(labels) == count
    return labels[-1]


async def best_of_many(clip):
    (label,) = set(await asyncio.gather(*(best(clip, 2) for _ in range(20))))
    return label


def test_a_classifier_works_in_one_event_loop_after_another_closed_or_not(clip, expected):
    for _ in range(2):
        assert asyncio.run(best(clip)) == expected
        assert asyncio.run(best_of_many(clip)) == expected
        asyncio.run(clip.aclose())
        assert asyncio.run(best_of_many(clip)) == expected


def test_a_classifier_can_be_closed_and_used_again_in_one_event_loop(clip, expected):
    async def main():
        for _ in range(3):
            async with clip:
                assert await best(clip) == expected
            assert await best(clip) == expected

    asyncio.run(main())


def test_unfinished_answers_of_one_event_loop_do_not_disturb_the_next(clip, expected):
    async def begin():
        answers = clip.classify([PICTURE] * 200, LABELS)
        await anext(answers)
        return answers

    kept = asyncio.run(begin())
    assert asyncio.run(best(clip)) == expected
    assert kept is not None


def test_an_event_loop_closed_before_the_classifier_does_not_disturb_the_next(clip, expected):
    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(best(clip)) == expected
    loop.close()
    assert asyncio.run(best(clip)) == expected


def test_a_classifier_works_in_event_loops_of_several_threads_at_once(clip, expected):
    found = []
    threads = [threading.Thread(target=lambda: found.append(asyncio.run(best_of_many(clip)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_a_cancelled_task_does_not_disturb_the_others(clip, expected):
    async def main():
        tasks = [asyncio.create_task(best(clip)) for _ in range(6)]
        await asyncio.sleep(0.05)
        for task in tasks[::2]:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert list(ended[1::2]) == [expected] * 3
        assert await best(clip) == expected

    asyncio.run(main())
