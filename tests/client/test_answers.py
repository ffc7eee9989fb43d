"""A server's answers are checked to be valid features before they are used."""

from __future__ import annotations

import math
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from clipweld.client._core import ranked
from clipweld.client.errors import ContractMismatch, ServerError
from clipweld.exporter.serving.triton import serve
from clipweld.exporter.store.repository import KINDS, Repository

LABELS = ["a cat", "a dog", "a cow"]


@pytest.fixture
def answering(fake, monkeypatch):
    """A function that makes the fake server pass its features through another function."""
    features = fake.features

    def answering(change):
        monkeypatch.setattr(fake, "features", lambda rows, version: change(features(rows, version)))

    return answering


def with_row(value):
    def change(features):
        features[-1] = value
        return features

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_row(math.nan), r"expected features of length 1, got nan for number \d of \d"),
        (with_row(math.inf), r"length 1, got inf"),
        (with_row(3e38), r"length 1, got inf"),
        (with_row(0), r"length 1, got 0"),
        (lambda features: features * 1.02, r"length 1, got 1.02 for number 0"),
    ],
    ids=["nan", "inf", "beyond float32", "zero", "not normalised"],
)
def test_invalid_features_are_a_server_error(fake, connect, picture, answering, change, said):
    with connect(fake.url, retries=0) as clip:
        answering(change)
        asked = [
            lambda: clip.classify([picture, picture], labels=LABELS),
            lambda: clip.image_features([picture, picture]),
            lambda: clip.text_features(LABELS),
        ]
        for ask in asked:
            with pytest.raises(ServerError, match=said) as caught:
                ask()
            assert "version 2" in str(caught.value)
            assert "exporter rollback" in str(caught.value)


def test_features_of_the_wrong_width_are_a_server_error(fake, connect, picture):
    fake.cards[2]["embed_dim"] = 4
    with (
        connect(fake.url) as clip,
        pytest.raises(ServerError, match=r"expected .* float32 \(1, 4\), got float32 \(1, 8\)"),
    ):
        clip.image_features(picture)


def test_float16_rounding_is_accepted(fake, connect, picture, answering):
    answering(lambda features: features.astype(np.float16).astype(np.float32))
    with connect(fake.url) as clip:
        assert len(clip.classify(picture, labels=LABELS)[0].predictions) == 3


def test_a_label_whose_prompts_cancel_out_is_named_in_the_error(fake, connect, picture, answering):
    calls = []

    def opposed(features):
        calls.append(len(features))
        features[1::2] = -features[::2]
        return features

    with connect(fake.url) as clip:
        answering(opposed)
        with pytest.raises(ServerError, match=r"version 2: .* label 'a cat' cancel"):
            clip.classify(picture, labels=["a cat"], templates=["a {}", "b {}"])


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e6])
def test_probabilities_and_scores_stay_in_their_ranges(scale):
    scores = np.array([1 + 1e-6, -1 - 1e-6, 0.3, 0.3], np.float32)
    answer = ranked("x", scores, ["a", "b", "c", "d"], scale, 1, 4)
    assert [p.label for p in answer] == ["a", "c", "d", "b"]
    assert sum(p.probability for p in answer) == pytest.approx(1)
    assert all(0 <= p.probability <= 1 and -1 <= p.score <= 1 for p in answer)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0, 1e308])
@pytest.mark.parametrize("name", ["logit_scale", "embed_dim"])
def test_a_card_with_impossible_numbers_is_refused(fake, connect, picture, name, value):
    fake.cards[2][name] = value
    with connect(fake.url) as clip, pytest.raises(ContractMismatch, match=r"model 'clip' version 2 .*export"):
        clip.classify(picture, labels=LABELS)


@pytest.mark.slow
def test_nan_from_a_real_model_is_an_error_that_names_model_and_version(repository, connect, picture, tmp_path):
    """No release writes such a version, so the test puts NaN into a weight of the served file."""
    shutil.copytree(repository.parent, tmp_path, dirs_exist_ok=True)
    served = Repository(tmp_path / "models", "clip")
    file = served.model("image") / "2" / "model.onnx"
    model = onnx.load(file)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "visual.ln_post.weight")
    broken = numpy_helper.to_array(weight).copy()
    broken[5] = math.nan
    weight.CopyFrom(numpy_helper.from_array(broken, weight.name))
    file.unlink()  # it is a hard link: writing in place would change the store's file too
    onnx.save(model, file)
    assert all((served.model(kind) / "2").is_dir() for kind in KINDS)
    with serve(served.path) as server:
        for url in (server.url, server.http_url):
            with connect(url) as clip:
                with pytest.raises(ServerError, match=r"clip_image version 2 at .*: expected .* length 1, got nan"):
                    clip.classify(picture, labels=LABELS)
                assert clip.text_features(LABELS).shape == (3, 192)
            with connect(url, version=1) as clip:
                assert len(clip.classify(picture, labels=LABELS)) == 1
