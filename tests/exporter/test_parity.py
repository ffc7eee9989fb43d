"""The checks before a version counts: they pass what is right and refuse what is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from exporter import graph
from exporter.errors import AnswersDiffer, GraphsDiffer
from exporter.parity import Parity, check_parity, check_same_graph, measure_parity, to_uint8

GOOD = Parity(image_max_abs=1e-6, text_max_abs=1e-6, cosine_min=0.9999999, top1_agreement=1.0)


def files(repository, version):
    return repository.file("image", version), repository.file("text", version)


def test_released_base_agrees_with_pytorch(mini, released, samples):
    parity = measure_parity(mini, *files(released[0], 1), *samples)
    assert max(parity.image_max_abs, parity.text_max_abs) < 2e-6
    assert parity.cosine_min > 0.99999
    assert parity.top1_agreement == 1


def test_other_weights_are_told_apart(mini, released, samples):
    parity = measure_parity(mini, *files(released[0], 2), *samples)
    assert parity.image_max_abs > 1e-3
    assert parity.text_max_abs > 1e-3
    with pytest.raises(AnswersDiffer, match="disagree"):
        check_parity(parity, "clip version 2")


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
def test_each_figure_can_refuse(worse):
    check_parity(GOOD, "v")
    with pytest.raises(AnswersDiffer):
        check_parity(replace(GOOD, **worse), "v")


def test_pixels_survive_normalisation(mini):
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mini.mean, mini.std))
    back = to_uint8((pixels / 255 - mean) / std, mini.mean, mini.std)
    np.testing.assert_array_equal(back, pixels.permute(0, 2, 3, 1).numpy())


def test_merged_is_the_bases_graph_with_other_weights(released):
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
def test_any_other_difference_is_refused(mini, graphs, change):
    base = graph.fill(graphs.text, mini.model.state_dict())
    merged = onnx.ModelProto.FromString(base.SerializeToString())
    change(merged)
    with pytest.raises(GraphsDiffer, match="text tower: merged and base differ in their"):
        check_same_graph(base, merged, "text tower")
