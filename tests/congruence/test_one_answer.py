"""Merged weights give the same features in open_clip, PyTorch, ONNX Runtime and Triton through the client."""

from __future__ import annotations

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
import torch.nn.functional as F

from clipweld.client import ZeroShotClassifier
from clipweld.exporter.checks.parity import to_uint8
from clipweld.trainer.base.backbone import encode_classes

COUNT = 24
ATOL = 2e-5


@pytest.fixture(scope="module")
def images(digits):
    """Test images of handwritten digits, evenly spaced over the set."""
    test = digits.load("test")
    return [test[i][0] for i in range(0, len(test), len(test) // COUNT)][:COUNT]


@pytest.fixture(scope="module")
def prompts(digits):
    return [template.replace("{}", name) for name in digits.class_names for template in digits.templates]


@pytest.fixture(scope="module")
def answers(mini, fitted, repository, server, images, prompts):
    """(image features, text features) of version 2, by each way to compute them."""
    pixels, tokens = torch.stack([mini.preprocess(image) for image in images]), mini.tokenizer(prompts)
    answers = {}
    plain = open_clip.create_model("mini").eval()
    plain.load_state_dict(fitted.backbone.model.state_dict())
    with torch.no_grad():
        for name, model in (("open_clip, merged", plain), ("PyTorch, merged", fitted.backbone.model)):
            answers[name] = (
                F.normalize(model.encode_image(pixels), dim=-1).numpy(),
                F.normalize(model.encode_text(tokens), dim=-1).numpy(),
            )
    feeds = ("image", to_uint8(pixels, mini.mean, mini.std)), ("text", tokens.to(torch.int32).numpy())
    answers["ONNX Runtime"] = tuple(
        session.run(None, {session.get_inputs()[0].name: feed})[0]
        for kind, feed in feeds
        for session in [
            onnxruntime.InferenceSession(repository / f"clip_{kind}/2/model.onnx", providers=["CPUExecutionProvider"])
        ]
    )
    for protocol, url in (("gRPC", server.url), ("HTTP", server.http_url)):
        with ZeroShotClassifier(url, version=2) as classifier:
            answers[f"Triton, {protocol}"] = (classifier.image_features(images), classifier.text_features(prompts))
    return answers


def test_all_ways_give_the_same_features(answers):
    reference = answers["open_clip, merged"]
    for name, features in answers.items():
        for ours, theirs in zip(features, reference, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=ATOL, rtol=0, err_msg=name)


def test_training_changed_the_features(mini, images, answers):
    with torch.no_grad():
        base = F.normalize(mini.model.encode_image(torch.stack([mini.preprocess(i) for i in images])), dim=-1)
    assert np.abs(answers["PyTorch, merged"][0] - base.numpy()).max() > 100 * ATOL


def test_served_scores_equal_those_of_pytorch(fitted, server, images, digits, mini):
    with torch.no_grad():
        classes = encode_classes(fitted.backbone, digits.class_names, digits.templates)
        pixels = torch.stack([mini.preprocess(image) for image in images])
        scores = F.normalize(fitted.backbone.model.encode_image(pixels), dim=-1) @ classes.T
    with ZeroShotClassifier(server.url) as classifier:
        served = list(classifier.classify(images, task="digits", top_k=10))
    for answer, row in zip(served, scores, strict=True):
        assert answer.version == 2
        by_label = {prediction.label: prediction.score for prediction in answer}
        np.testing.assert_allclose([by_label[name] for name in digits.class_names], row, atol=ATOL, rtol=0)
