"""LoRA branches in a tower's graph: their number, their positions, and their sum when folded into the weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

from clipweld.exporter.checks.parity import MAX_ABS
from clipweld.exporter.errors import UnsupportedModel
from clipweld.exporter.graph import onnx_file, trace
from clipweld.exporter.graph.branches import branch_weights, fold_branches, with_branches
from clipweld.trainer.adapters.adapter import load_lineage
from clipweld.trainer.adapters.merge import merge
from evidence.studies.release import write_adapters

EXPERTS = 2
LAYERS = 6  # linear layers per block, all of them adapted
PER_BRANCH = {"Transpose": 2, "MatMul": 2, "Add": 1}


@pytest.fixture(scope="module")
def lineage(mini, tmp_path_factory):
    """Three adapters on every layer of both towers, each with a different scaling."""
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(mini, 3, EXPERTS, folder)
    adapters = load_lineage(folder, mini.fingerprint)
    return [replace(adapter, scaling=scaling) for adapter, scaling in zip(adapters, (10.0, 40.0, 20.0), strict=True)]


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("count", [1, 3])
def test_every_layer_gets_one_branch_per_adapter_and_the_rest_is_unchanged(mini, graphs, lineage, tower, count):
    base = getattr(graphs, tower)
    before = base.SerializeToString(deterministic=True)
    branched = with_branches(base, lineage[:count])
    transformer = mini.model.visual.transformer if tower == "image" else mini.model.transformer
    branches = len(transformer.resblocks) * LAYERS * count
    nodes, own = (Counter(node.op_type for node in model.graph.node) for model in (branched, base))
    assert nodes - own == {kind: number * branches for kind, number in PER_BRANCH.items()}
    assert len(branched.graph.input) == len(base.graph.input) + 2 * branches
    names = {node.name for node in base.graph.node}
    assert [node.name for node in branched.graph.node if node.name in names] == [node.name for node in base.graph.node]
    assert base.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("tower", ["image", "text"])
def test_branches_give_the_features_of_the_merged_weights(mini, graphs, lineage, tower):
    base, random = getattr(graphs, tower), np.random.default_rng(0)
    weights = mini.model.state_dict()
    models = (
        trace.fill(base, weights),
        trace.fill(base, merge(weights, lineage)),
        trace.fill(with_branches(base, lineage), weights | branch_weights(lineage)),
    )
    rows = {
        "image": random.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8),
        "text": random.integers(0, 49408, (4, 9), dtype=np.int32),
    }[tower]
    unlearned, merged, unmerged = (
        onnxruntime.InferenceSession(onnx_file.to_bytes(model), providers=["CPUExecutionProvider"]).run(
            None, {model.graph.input[0].name: rows}
        )[0]
        for model in models
    )
    np.testing.assert_allclose(unmerged, merged, rtol=0, atol=MAX_ABS)
    assert np.abs(unlearned - merged).max() > 100 * MAX_ABS


def test_an_adapter_need_not_cover_every_layer(graphs, make_adapter, lineage):
    one_layer = make_adapter("digits")  # it adapts a single layer of the text tower
    base, branched = graphs.text, with_branches(graphs.text, [lineage[0], one_layer])
    added = {value.name for value in branched.graph.input} - {value.name for value in base.graph.input}
    assert {name for name in added if name.endswith(".1")} == {
        f"transformer.resblocks.1.mlp.c_proj.{part}.1" for part in ("lora_A", "lora_B")
    }


def test_without_adapters_the_graph_is_unchanged(graphs):
    assert with_branches(graphs.image, []) is graphs.image


def test_folded_branches_equal_the_merged_weights(mini, lineage):
    weights = mini.model.state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    folded, merged = fold_branches(weights | branch_weights(lineage)), merge(weights, lineage)
    for name, want in merged.items():
        torch.testing.assert_close(folded[name], want, rtol=0, atol=1e-5)
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())
    assert fold_branches(weights) == weights


def test_a_layer_without_a_matrix_product_of_its_own_is_refused(graphs, lineage):
    whole = trace.ModelProto.FromString(graphs.image.SerializeToString())
    split = next(node for node in whole.graph.node if node.op_type == "Split")
    split.op_type = "Identity"
    with pytest.raises(UnsupportedModel, match=r"resblocks\.0\.attn\.\w_proj: no product of its own .*--unmerged"):
        with_branches(whole, lineage)
