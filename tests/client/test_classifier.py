"""The classifier against a real Triton: version 1 is the small CLIP, version 2 has the learned task "digits"."""

import numpy as np
import pytest

from clipweld.client.errors import InvalidRequest, ModelNotFound, UnknownTask, VersionGone

LABELS = ["cat", "dog", "a very small house by the sea"]


@pytest.fixture(params=["grpc", "http"])
def url(request, server) -> str:
    return server.url if request.param == "grpc" else server.http_url


@pytest.fixture
def clip(url, connect):
    with connect(url) as classifier:
        yield classifier


@pytest.fixture(scope="module")
def base():
    """The small CLIP in PyTorch, without a server."""
    from clipweld.trainer.base.backbone import load_backbone

    return load_backbone("mini")


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (int(rng.integers(20, 99)), 70, 3), dtype=np.uint8) for _ in range(count)]


def test_versions_are_listed(clip):
    assert clip.versions() == [1, 2]


def test_the_newest_version_is_used_and_lists_its_tasks(clip):
    assert clip.card().version == 2
    assert [task.name for task in clip.tasks()] == ["digits"]
    assert clip.classify(pictures(1), task="digits")[0].version == 2


def test_base_has_no_tasks(url, connect):
    with connect(url, version=1) as clip:
        assert clip.tasks() == ()
        with pytest.raises(UnknownTask, match="it is the base model, without tasks"):
            clip.classify(pictures(1), task="digits")


def test_features_equal_open_clip(url, base, connect):
    import torch
    from PIL import Image

    images = pictures(5)
    tokens = base.tokenizer(LABELS)
    with torch.inference_mode():
        pixels = torch.stack([base.preprocess(Image.fromarray(image)) for image in images])
        expected_image = base.model.encode_image(pixels, normalize=True).numpy()
        expected_text = base.model.encode_text(tokens, normalize=True).numpy()
    with connect(url, version=1) as clip:
        np.testing.assert_allclose(clip.image_features(images), expected_image, atol=1e-5)
        np.testing.assert_allclose(clip.text_features(LABELS), expected_text, atol=1e-5)


def test_features_are_normalised_and_do_not_depend_on_the_batch(clip):
    images = pictures(70)
    features = clip.image_features(images)
    assert features.shape == (70, clip.card().embed_dim)
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(clip.image_features(images[69]), features[69:], atol=1e-5)
    texts = clip.text_features(LABELS)
    np.testing.assert_allclose(clip.text_features(LABELS[0]), texts[:1], atol=1e-5)


def test_probabilities_cover_all_labels_and_are_sorted(clip):
    for answer in clip.classify(pictures(3), LABELS, top_k=99):
        probabilities = [found.probability for found in answer]
        assert sorted(found.label for found in answer) == sorted(LABELS)
        assert sum(probabilities) == pytest.approx(1)
        assert probabilities == sorted(probabilities, reverse=True)


def test_both_protocols_give_the_same_answers(server, connect):
    with connect(server.url) as grpc, connect(server.http_url) as http:
        np.testing.assert_array_equal(grpc.image_features(pictures(3)), http.image_features(pictures(3)))
        np.testing.assert_array_equal(grpc.text_features(LABELS), http.text_features(LABELS))
        assert grpc.card() == http.card()


def test_an_unknown_version_is_refused_and_the_ready_ones_are_listed(url, connect):
    with connect(url, version=99) as clip, pytest.raises(VersionGone, match=r"version 99 .* ready: 1, 2"):
        clip.classify(pictures(1), LABELS)


def test_an_unknown_model_is_refused_with_a_suggestion(url, connect):
    with connect(url, model="clop") as clip, pytest.raises(ModelNotFound, match="did you mean 'clip'"):
        clip.classify(pictures(1), LABELS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one of labels and task"),
        ({"labels": ["a"], "task": "b"}, "give exactly one of labels and task"),
        ({"labels": "a cat"}, "labels is one string"),
        ({"labels": []}, "labels is empty"),
        ({"labels": ["a", " "]}, "label ' ' is not text"),
        ({"labels": ["a", 3]}, "label 3 is not text but int"),
        ({"labels": ["a", "b", "a"]}, "label 'a' is given twice"),
        ({"labels": ["a"], "templates": "a {}"}, "templates is one string"),
        ({"labels": ["a"], "templates": []}, "templates is empty"),
        ({"labels": ["a"], "templates": ["a photo"]}, "template 'a photo' has no {}"),
        ({"labels": ["a"], "top_k": 0}, "top_k is 0"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_sent(arguments, message, connect):
    with connect("localhost:1") as clip, pytest.raises(InvalidRequest, match=message):
        clip.classify(pictures(1), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"timeout_s": 0}, "timeout_s is 0"), ({"version": 0}, "version is 0")]
)
def test_invalid_settings_are_refused(arguments, message, connect):
    with pytest.raises(InvalidRequest, match=message):
        connect(**arguments)
