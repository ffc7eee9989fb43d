"""What the classifier does when the server misbehaves, tested with a fake server that does so on request."""

import threading
import time

import grpc
import numpy as np
import pytest

from clipweld.client import ZeroShotClassifier
from clipweld.client.errors import (
    BadImage,
    ContractMismatch,
    InvalidRequest,
    ModelNotFound,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
    UnknownTask,
    VersionGone,
)

LABELS = ["cat", "dog"]


@pytest.fixture
def clip(fake, connect):
    with connect(fake.url, timeout_s=10) as classifier:
        yield classifier


def shapes(fake, part):
    return [shape for model, _, shape in fake.requests if model == f"clip_{part}"]


def test_newest_version_is_pinned_until_it_is_gone(fake, clip, picture):
    assert clip.classify(picture, LABELS)[0].version == 2
    fake.cards[3] = fake.card(3)
    assert clip.classify(picture, LABELS)[0].version == 2
    del fake.cards[2]
    assert clip.classify(picture, LABELS)[0].version == 3


def test_a_version_that_vanishes_between_the_towers_restarts_the_whole_call(fake, clip, picture):
    def drop_2_before_an_image(model, version, context):
        if model == "clip_image":
            fake.cards.pop(2, None)

    fake.before_infer = drop_2_before_an_image
    answer = clip.classify(picture, LABELS)[0]
    assert answer.version == 1
    assert [(model, version) for model, version, _ in fake.requests] == [
        ("clip_card", 2),
        ("clip_text", 2),
        ("clip_card", 1),
        ("clip_text", 1),
        ("clip_image", 1),
    ]


def test_a_version_that_vanishes_while_it_is_opened_is_replaced_by_another(fake, clip):
    fake.before_infer = lambda model, version, context: fake.cards.pop(2, None)
    assert clip.card().version == 1


def test_named_version_is_never_replaced(fake, picture, connect):
    with connect(fake.url, version=1) as clip:
        assert clip.classify(picture, LABELS)[0].version == 1
        del fake.cards[1]
        with pytest.raises(VersionGone, match=r"version 1 of model 'clip' is not served at .*; ready: 2"):
            clip.image_features(picture)


def test_a_model_without_any_version_left_is_reported(fake, clip, picture):
    clip.classify(picture, LABELS)
    fake.cards.clear()
    with pytest.raises(ModelNotFound, match=r"no model 'clip' .*; it serves none: wait, or write one with"):
        clip.classify(picture, LABELS)


def test_requests_never_exceed_the_server_s_batch_size(fake, clip, picture):
    answers = clip.classify([picture] * 9, [f"label {i}" for i in range(6)], templates=["a {}", "the photo of a {}"])
    assert len(answers) == 9
    assert sorted(shape[0] for shape in shapes(fake, "image")) == [1, 4, 4]
    assert [shape[0] for shape in shapes(fake, "text")] == [4, 4, 4]


def test_texts_are_padded_to_the_longest_text_of_their_request(fake, clip):
    clip.text_features(["a", "a b", "a b c", "a b c d", "a", "word " * 99])
    assert sorted(shapes(fake, "text")) == [(2, 3), (4, 24)], "texts of like length go together"


def test_label_features_are_encoded_once(fake, clip, picture):
    for _ in range(3):
        clip.classify(picture, LABELS)
    assert len(shapes(fake, "text")) == 1
    clip.classify(picture, LABELS, templates=["{}"])
    clip.classify(picture, LABELS[::-1])
    assert len(shapes(fake, "text")) == 3


def test_answer_equals_the_formula(fake, clip, picture):
    """softmax(logit_scale * image @ text.T), where text is the normalised mean over templates."""
    templates = ["a photo of a {}", "a {} or so"]
    image = clip.image_features(picture)[0].astype(np.float64)
    rows = []
    for label in LABELS:
        mean = clip.text_features([template.format(label) for template in templates]).mean(axis=0)
        rows.append(mean / np.linalg.norm(mean))
    scores = np.stack(rows) @ image
    probabilities = np.exp(100 * scores) / np.exp(100 * scores).sum()
    answer = clip.classify(picture, LABELS, templates=templates)[0]
    order = np.argsort(-scores)
    assert [found.label for found in answer] == [LABELS[i] for i in order]
    np.testing.assert_allclose([found.score for found in answer], scores[order], atol=1e-6)
    np.testing.assert_allclose([found.probability for found in answer], probabilities[order], atol=1e-4)


def test_task_brings_its_labels_and_templates(fake, clip, picture):
    task = fake.card(2)["tasks"][0]
    by_task = clip.classify(picture, task="digits")
    assert by_task == clip.classify(picture, task["class_names"], templates=task["templates"])
    assert by_task != clip.classify(picture, task="digits", templates=["{}"])


def test_an_unknown_task_is_refused_with_similar_names(clip, picture):
    with pytest.raises(UnknownTask, match="no task 'digit'; did you mean 'digits'") as caught:
        clip.classify(picture, task="digit")
    assert (caught.value.name, caught.value.known, caught.value.near) == ("digit", ("digits",), ("digits",))


def test_no_images_give_no_answers(fake, clip):
    assert clip.classify([], LABELS) == []
    assert clip.image_features([]).shape == (0, 8)
    assert clip.text_features([]).shape == (0, 8)


def test_bad_image_among_good_ones_is_named(clip, picture):
    with pytest.raises(BadImage, match=r"^image 1 \(bytes\) \(8 bytes\) is no image"):
        clip.classify([picture, b"nonsense"], LABELS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2, this client reads format 1"),
        ({"version": 7}, "says version 7"),
        ({"embed_dim": None}, "cannot be read"),
        ({"image": {"size": 16, "resize_mode": "longest", "interpolation": "bicubic"}}, "needs resize mode 'longest'"),
        ({"image": {"size": 16, "resize_mode": "squash", "interpolation": "cubic"}}, "needs interpolation 'cubic'"),
        ({"image": {"size": 16}}, "has no 'resize_mode'"),
        ({"text": {"context_length": 24, "tokenizer_sha256": "00"}}, "needs tokenizer sha256 '00'"),
    ],
)
def test_card_that_this_client_cannot_serve_is_refused(fake, clip, change, message):
    fake.cards[2] |= change
    with pytest.raises(ContractMismatch, match=message):
        clip.card()


@pytest.mark.slow
def test_a_slow_answer_causes_a_timeout(fake, picture, connect):
    with connect(fake.url, timeout_s=0.5) as clip:
        clip.card()
        fake.before_infer = lambda *_: time.sleep(1)
        with pytest.raises(RequestTimeout, match=r"no answer from .* within 0\.5 s"):
            clip.classify(picture, LABELS)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (grpc.StatusCode.INTERNAL, ServerError),
        (grpc.StatusCode.UNKNOWN, ServerError),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.UNAVAILABLE, ServerUnavailable),
    ],
)
def test_an_error_of_a_version_that_is_still_served_keeps_its_type(fake, clip, picture, status, error):
    clip.card()
    fake.before_infer = lambda model, version, context: context.abort(status, "two\nlines")
    with pytest.raises(error) as caught:
        clip.image_features(picture)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_server_that_stops_is_reported_as_unavailable(fake, clip, picture):
    clip.classify(picture, LABELS)
    fake.stop()
    with pytest.raises(ServerUnavailable, match="connection refused; start one with: exporter serve"):
        clip.classify(picture, LABELS)


def test_a_closed_classifier_reconnects_when_used_again(fake, clip, picture):
    first = clip.classify(picture, LABELS)
    clip.close()
    clip.close()
    assert clip.classify(picture, LABELS) == first


def test_a_version_replaced_under_the_same_number_is_opened_again(fake, picture, connect, monkeypatch):
    """A server restarted on a backup may serve another version under the same number."""
    monkeypatch.setattr("clipweld.client._core.LOOK_AGAIN_S", 0.2)
    for version in ("latest", 2):
        with connect(fake.url, version=version, timeout_s=10) as clip:
            clip.classify(picture, LABELS)
            fake.cards[2]["tasks"][0]["adapter_sha256"] = f"{version:x<64}"
            texts = len(shapes(fake, "text"))
            time.sleep(0.3)
            clip.classify(picture, LABELS)
            assert len(shapes(fake, "text")) == texts + 1, "labels are encoded anew"
            assert clip.card().task("digits").adapter_sha256 == f"{version:x<64}"


def test_a_call_is_retried_when_its_version_changes_between_the_towers(fake, picture, connect):
    """The server restarts with other contents after the text tower's answer and before the image tower's."""
    with connect(fake.url, timeout_s=10) as clip:
        clip.classify(picture, LABELS)

        def swap(model, version, context):
            if model == "clip_image" and not fake.cards[2]["tasks"][0]["adapter_sha256"].startswith("x"):
                fake.cards[2]["tasks"][0]["adapter_sha256"] = "x" * 64
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone for a moment")

        fake.before_infer = swap
        requests = len(fake.requests)
        clip.classify(picture, LABELS)
        asked = [model for model, _, _ in fake.requests[requests:]]
        assert asked == ["clip_image", "clip_card", "clip_card", "clip_text", "clip_image"]


def changed(**fields):
    return lambda answer: [setattr(answer.outputs[0], name, value) for name, value in fields.items()]


def raw(function):
    def change(answer):
        array = np.frombuffer(answer.raw_output_contents[0], np.float32)
        answer.raw_output_contents[0] = function(array).astype(np.float32).tobytes()

    return change


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda answer: setattr(answer, "id", "1"), "the answer to another request"),
        (lambda answer: setattr(answer, "id", ""), "the answer to another request"),
        (changed(name="features"), "answered no image_features"),
        (changed(datatype="FP64"), "failed: cannot reshape"),
        (changed(datatype="BYTES"), "failed: "),
        (changed(datatype="NONSENSE"), "failed: "),
        (lambda answer: answer.outputs[0].shape.append(2), "failed: cannot reshape"),
        (lambda answer: answer.ClearField("outputs"), "answered no image_features"),
        (lambda answer: answer.ClearField("raw_output_contents"), "failed: "),
        (raw(lambda array: array[:-1]), "failed: cannot reshape"),
    ],
)
def test_malformed_answers_are_server_errors(fake, clip, picture, tamper, message):
    clip.card()
    fake.tamper = lambda answer: answer.outputs[0].name != "image_features" or tamper(answer)
    with pytest.raises(ServerError, match=message):
        clip.image_features(picture)
    fake.tamper = lambda answer: None
    assert clip.image_features(picture).shape == (1, 8)


@pytest.mark.parametrize("change", [changed(datatype="FP32"), lambda answer: answer.ClearField("outputs")])
def test_a_malformed_card_answer_is_refused(fake, clip, change):
    fake.tamper = change
    with pytest.raises((ContractMismatch, ServerError)):
        clip.card()


@pytest.mark.slow
def test_a_deadline_holds_for_a_call_that_waits_for_another_thread(fake, picture):
    with ZeroShotClassifier(fake.url, timeout_s=10, retries=0) as clip:
        fake.before_infer = lambda *_: time.sleep(3)
        patient = threading.Thread(target=clip.card)
        patient.start()
        time.sleep(0.3)
        began = time.monotonic()
        with pytest.raises(RequestTimeout, match=r"not done within 0\.5 s"):
            clip.card(deadline_s=0.5)
        assert time.monotonic() - began < 1.5
        patient.join()
