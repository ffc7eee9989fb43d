"""The checks of a new version: correct ones pass, wrong ones are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from clipweld.exporter.checks import parity
from clipweld.exporter.checks.parity import check_parity, check_same_graph, check_unit, measure_parity, to_uint8
from clipweld.exporter.errors import AnswersDiffer, GraphsDiffer, NotFinite
from clipweld.exporter.graph import trace
from clipweld.exporter.results import Parity
from clipweld.trainer.base.backbone import with_weights

GOOD = Parity(image_max_abs=1e-6, text_max_abs=1e-6, cosine_min=0.9999999, top1_agreement=1.0)


def files(repository, version):
    return repository.file("image", version), repository.file("text", version)


def test_released_base_agrees_with_pytorch(mini, released, samples):
    measured = measure_parity(mini, *files(released[0], 1), *samples)
    assert max(measured.image_max_abs, measured.text_max_abs) < 2e-6
    assert measured.cosine_min > 0.99999
    assert measured.top1_agreement == 1


def test_other_weights_are_detected(mini, released, samples):
    measured = measure_parity(mini, *files(released[0], 2), *samples)
    assert measured.image_max_abs > 1e-3
    assert measured.text_max_abs > 1e-3
    with pytest.raises(AnswersDiffer, match="disagree"):
        check_parity(measured, "clip version 2")


@pytest.mark.parametrize(
    "worse",
    [
        {"image_max_abs": 2e-4},
        {"text_max_abs": 2e-4},
        {"text_max_abs": float("nan")},
        {"cosine_min": 0.9},
        {"cosine_min": float("nan")},
        {"top1_agreement": 0.99},
    ],
)
def test_each_figure_alone_can_cause_a_refusal(worse):
    check_parity(GOOD, "v")
    with pytest.raises(AnswersDiffer):
        check_parity(replace(GOOD, **worse), "v")


def test_normalised_pixels_are_converted_back_exactly(mini):
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mini.mean, mini.std))
    back = to_uint8((pixels / 255 - mean) / std, mini.mean, mini.std)
    np.testing.assert_array_equal(back, pixels.permute(0, 2, 3, 1).numpy())


def test_the_merged_graph_is_the_base_s_with_other_weights(released):
    repository, _ = released
    for kind in ("image", "text"):
        base, merged = (onnx.load(repository.file(kind, version)) for version in (1, 2))
        check_same_graph(base, merged, kind)
        differ = [a.name for a, b in zip(base.graph.initializer, merged.graph.initializer, strict=True) if a != b]
        assert (
            differ
            == {
                "image": [
                    "visual.transformer.resblocks.0.attn.in_proj_weight",
                    "visual.transformer.resblocks.5.mlp.c_fc.weight",
                ],
                "text": ["transformer.resblocks.1.mlp.c_proj.weight"],
            }[kind]
        )


def rename_node(model):
    model.graph.node[3].output[0] += "x"


def extra_node(model):
    model.graph.node.append(onnx.helper.make_node("Identity", ["tokens"], ["z"]))


def other_opset(model):
    model.opset_import[0].version = 19


def other_dtype(model):
    model.graph.initializer[0].data_type = onnx.TensorProto.DOUBLE


def other_input(model):
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64


@pytest.mark.parametrize("change", [rename_node, extra_node, other_opset, other_dtype, other_input])
def test_any_difference_besides_weights_is_refused(mini, graphs, change):
    base = trace.fill(graphs.text, mini.model.state_dict())
    merged = onnx.ModelProto.FromString(base.SerializeToString())
    change(merged)
    with pytest.raises(GraphsDiffer, match="text tower: merged and base differ in their"):
        check_same_graph(base, merged, "text tower")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("kind", "name", "what"), [("image", "visual.ln_post.weight", "images"), ("text", "ln_final.bias", "prompts")]
)
def test_non_finite_answers_are_refused_even_if_pytorch_gives_them_too(
    mini, released, samples, tmp_path, kind, name, what, value
):
    repository, weights = released[0], dict(mini.model.state_dict())
    weights[name] = weights[name].clone()
    weights[name][3] = value
    with pytest.raises(NotFinite, match=rf"weight {name} reaches .* expected finite float32"):
        trace.fill(trace.hollow(repository.file(kind, 1), weights), weights)
    model = onnx.load(repository.file(kind, 1))
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.raw_data = weights[name].numpy().tobytes()
    onnx.save(model, tmp_path / "broken.onnx")
    chosen = [tmp_path / "broken.onnx" if k == kind else repository.file(k, 1) for k in ("image", "text")]
    with pytest.raises(NotFinite, match=rf"features of {what} in ONNX Runtime, in batches of 1: .* for number 0"):
        measure_parity(mini, *chosen, *samples)
    alike = with_weights(mini, weights)  # PyTorch now gives the same wrong answers
    with pytest.raises(NotFinite, match=f"features of {what} in PyTorch"):
        measure_parity(alike, *chosen, *samples)


def test_a_single_non_finite_answer_in_the_largest_batch_is_refused(mini, released, samples, monkeypatch):
    run = parity._run_batches

    def spoiled(*args, **settings):
        results = run(*args, **settings)
        results[-1] = results[-1].copy()
        results[-1][-1, 0] = np.nan
        return results

    monkeypatch.setattr(parity, "_run_batches", spoiled)
    with pytest.raises(NotFinite, match=r"in batches of 8: expected length 1, got nan for number 8 of 9"):
        measure_parity(mini, *files(released[0], 1), *samples)


@pytest.mark.parametrize("length", [0.0, 0.98, 1.02, np.nan, np.inf, 1e30])
def test_features_that_are_not_unit_vectors_are_refused(length):
    features = np.eye(3, dtype=np.float32)
    check_unit(features, "images")
    features[2, 2] = length
    with pytest.raises(NotFinite, match=r"features of images: .* for number 2 of 3"):
        check_unit(features, "images")
