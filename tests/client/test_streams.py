"""Many images: answered in order, a few at a time, whatever the server does meanwhile."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from clipweld.client import AsyncZeroShotClassifier, ZeroShotClassifier
from clipweld.client._streams import AHEAD, IN_FLIGHT
from clipweld.client.errors import (
    BadImage,
    InvalidRequest,
    RequestTimeout,
    ServerUnavailable,
    TooManyLabels,
    VersionGone,
)

LABELS = ["cat", "dog"]


@pytest.fixture
def clip(fake, connect):
    with connect(fake.url, timeout_s=10) as classifier:
        yield classifier


def picture(number):
    """Return a different image for every number."""
    return np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def scores(answers):
    """Return the scores of the best labels, to be compared up to rounding."""
    return pytest.approx([answer.best.score for answer in answers], abs=1e-5)


def test_answers_come_in_the_order_of_the_images(fake, clip):
    alone = [clip.classify(picture(i), LABELS)[0] for i in range(30)]
    fake.before_infer = lambda model, version, context: time.sleep(np.random.default_rng().uniform(0, 0.02))
    answers = clip.classify((picture(i) for i in range(30)), LABELS)
    assert [answer.best.score for answer in answers] == scores(alone)
    assert [answer.image for answer in answers] == [f"image {i} (ndarray)" for i in range(30)]


def test_several_requests_but_no_more_than_the_limit_are_in_flight(fake, clip):
    now, most, lock = [0], [0], threading.Lock()

    def count(model, version, context):
        if model == "clip_image":
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.05)
            with lock:
                now[0] -= 1

    fake.before_infer = count
    assert len(clip.classify((picture(i) for i in range(60)), LABELS)) == 60
    assert 2 <= most[0] <= IN_FLIGHT


def test_images_are_read_only_as_fast_as_answers_are_used(fake, thread_stays):
    """With an endless iterator, only a few images are held in memory, and closing the answers stops reading."""
    taken = [0]

    def endless():
        while True:
            taken[0] += 1
            yield picture(taken[0])

    with ZeroShotClassifier(fake.url) as clip:
        answers = clip.classify(endless(), LABELS)
        for number, _ in zip(range(1, 101), answers, strict=False):
            assert taken[0] <= number + 4 * (IN_FLIGHT + AHEAD + 1)
        answers.close()
        after = taken[0]
    assert taken[0] == after
    assert not thread_stays("clipweld")


async def first_of_endless(url, taken):
    def endless():
        while True:
            taken[0] += 1
            yield picture(taken[0])

    async with AsyncZeroShotClassifier(url) as clip:
        answers = clip.classify(endless(), LABELS)
        answer = await anext(answers)
        await answers.aclose()
    return answer


def test_closing_an_asynchronous_stream_stops_reading_images(fake):
    import asyncio

    taken = [0]
    assert asyncio.run(first_of_endless(fake.url, taken)).version == 2
    assert taken[0] <= 4 * (IN_FLIGHT + AHEAD + 1)


def test_unreadable_images_are_skipped_if_the_caller_collects_them(clip):
    images = [picture(0), b"nonsense", picture(1), b"", *[picture(i) for i in range(2, 9)]]
    told = []
    answers = clip.classify(images, LABELS, unreadable=told.append)
    assert [answer.image.split()[1] for answer in answers] == ["0", "2", "4", "5", "6", "7", "8", "9", "10"]
    assert [str(error).split(" ")[1] for error in told] == ["1", "3"]
    with pytest.raises(BadImage, match=r"^image 1 \(bytes\)"):
        clip.classify(images, LABELS)
    told.clear()
    assert clip.classify([b"", b"x"], LABELS, unreadable=told.append) == []
    assert len(told) == 2


def test_a_folder_is_classified_file_by_file(clip, tmp_path):
    from PIL import Image

    for i in range(7):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.warns(UserWarning, match="left out 1 "):
        answers = clip.classify(tmp_path, LABELS)
    assert [answer.image for answer in answers] == [str(tmp_path / f"{i}.png") for i in range(7)]
    alone = [clip.classify(picture(i), LABELS)[0] for i in range(7)]
    assert [answer.best.score for answer in answers] == scores(alone)


def test_a_version_unloaded_during_a_call_loses_and_repeats_no_image(fake, clip):
    fake.cards[3] = fake.card(3)
    seen = [0]

    def drop_3_after_some(model, version, context):
        seen[0] += model == "clip_image"
        if seen[0] == 5:
            fake.cards.pop(3, None)

    fake.before_infer = drop_3_after_some
    answers = clip.classify((picture(i) for i in range(80)), LABELS)
    fake.before_infer = lambda *_: None
    assert [answer.image for answer in answers] == [f"image {i} (ndarray)" for i in range(80)]
    assert {answer.version for answer in answers} == {2, 3}
    with ZeroShotClassifier(fake.url, version=2) as two:
        for i, answer in enumerate(answers):
            if answer.version == 2:
                assert [answer.best.score] == scores(two.classify(picture(i), LABELS))


def test_a_requested_version_unloaded_during_a_call_is_an_error(fake, connect):
    def drop_2(model, version, context):
        if model == "clip_image":
            fake.cards.pop(2, None)

    fake.before_infer = drop_2
    with connect(fake.url, version=2) as clip, pytest.raises(VersionGone):
        clip.classify((picture(i) for i in range(80)), LABELS)


def test_a_newer_version_is_used_from_the_next_call_on(fake, connect, monkeypatch):
    monkeypatch.setattr("clipweld.client._core.LOOK_AGAIN_S", 0)

    def promote_3(model, version, context):
        if model == "clip_image":
            fake.cards[3] = fake.card(3)

    fake.before_infer = promote_3
    with connect(fake.url) as clip:
        assert {answer.version for answer in clip.classify((picture(i) for i in range(40)), LABELS)} == {2}
        assert {answer.version for answer in clip.classify((picture(i) for i in range(40)), LABELS)} == {3}
    with connect(fake.url, version=2) as clip:
        assert clip.classify(picture(0), LABELS)[0].version == 2


def test_requests_are_retried_while_a_server_is_briefly_unavailable(fake, clip):
    refused = [0]

    def away(model, version, context):
        if model == "clip_image" and refused[0] < 2:
            refused[0] += 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "in a moment")

    clip.card()
    fake.before_infer = away
    assert len(clip.classify(picture(0), LABELS)) == 1
    assert refused[0] == 2


@pytest.mark.parametrize(
    ("status", "attempts"),
    [
        (grpc.StatusCode.UNAVAILABLE, 3),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 3),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 3),
        (grpc.StatusCode.INTERNAL, 1),
        (grpc.StatusCode.INVALID_ARGUMENT, 1),
    ],
)
def test_only_requests_without_an_answer_are_retried(fake, connect, status, attempts):
    asked = [0]

    def fail(model, version, context):
        asked[0] += 1
        context.abort(status, "no")

    with connect(fake.url, retries=2) as clip:
        clip.card()
        fake.before_infer = fail
        with pytest.raises(Exception, match=r".+"):
            clip.image_features(picture(0))
        assert asked[0] == attempts


@pytest.mark.slow
def test_a_deadline_holds_for_the_whole_call(fake, connect):
    with connect(fake.url, timeout_s=10) as clip:
        clip.card()
        fake.before_infer = lambda *_: time.sleep(0.3)
        began = time.monotonic()
        with pytest.raises(RequestTimeout, match=r"not done within 1 s|no answer"):
            clip.classify((picture(i) for i in range(400)), LABELS, deadline_s=1)
        assert time.monotonic() - began < 5
        with pytest.raises(InvalidRequest, match="deadline_s is 0"):
            clip.versions(deadline_s=0)


@pytest.mark.slow
def test_a_deadline_ends_retries(fake, connect):
    with connect(fake.url, retries=1000) as clip:
        clip.card()
        fake.before_infer = lambda model, version, context: context.abort(grpc.StatusCode.UNAVAILABLE, "no")
        with pytest.raises((RequestTimeout, ServerUnavailable)):
            clip.image_features(picture(0), deadline_s=1)


@pytest.mark.slow
def test_a_thousand_labels_with_seven_templates_are_encoded_once(fake, clip):
    labels = [f"label number {i} {'word ' * (i % 9)}" for i in range(1000)]
    templates = [f"{'a ' * i}photo of {{}}" for i in range(7)]
    clip.classify(picture(0), labels, templates=templates)
    texts = [shape for model, _, shape in fake.requests if model == "clip_text"]
    assert sum(rows for rows, _ in texts) == 7000
    assert len({length for _, length in texts}) > 5
    clip.classify(picture(1), labels, templates=templates)
    assert len([model for model, *_ in fake.requests if model == "clip_text"]) == len(texts)


def test_too_many_labels_are_refused(clip):
    with pytest.raises(TooManyLabels, match=r"2,000 labels with 501 templates are 1,002,000 prompts"):
        clip.classify(picture(0), [str(i) for i in range(2000)], templates=[f"{i} {{}}" for i in range(501)])


def test_threads_can_share_a_classifier(server):
    """With sixteen threads on one classifier, every answer equals that of a single call."""
    images = [picture(i) for i in range(40)]
    for url in (server.url, server.http_url):
        with ZeroShotClassifier(url) as clip:
            alone = [next(clip.classify(image, LABELS)).best.score for image in images]
        with ZeroShotClassifier(url) as clip, ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda image: next(clip.classify(image, LABELS)).best.score, images * 4))
        np.testing.assert_allclose(found, alone * 4, atol=1e-5)


def test_tasks_can_share_an_asynchronous_classifier(server):
    import asyncio

    images = [picture(i) for i in range(40)]

    async def score(clip, image):
        return (await anext(clip.classify(image, LABELS))).best.score

    async def main(url):
        async with AsyncZeroShotClassifier(url) as clip:
            return await asyncio.gather(*(score(clip, image) for image in images * 4))

    with ZeroShotClassifier(server.url) as clip:
        alone = [answer.best.score for answer in clip.classify(images, LABELS)]
    for url in (server.url, server.http_url):
        np.testing.assert_allclose(asyncio.run(main(url)), alone * 4, atol=1e-5)


def test_server_info_names_the_server_and_its_version(server, connect):
    for url in (server.url, server.http_url):
        with connect(url) as clip:
            info = clip.server_info()
        assert info.name == "triton"
        assert "statistics" in info.extensions
        assert str(info) == f"triton {info.version}"
        assert info.to_dict()["version"] == info.version
