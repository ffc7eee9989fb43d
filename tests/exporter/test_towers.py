"""The towers in plain operators: they share the backbone's weights, and ONNX Runtime fuses their activations."""

from __future__ import annotations

from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from clipweld.exporter.graph import onnx_file, trace
from clipweld.exporter.graph.towers import PlainAttention, PlainGELU, plain


def test_the_backbone_is_not_changed_and_its_weights_are_shared(mini):
    block = mini.model.visual.transformer.resblocks[0]
    copied = plain(mini.model, torch.float32).visual.transformer.resblocks[0]
    assert isinstance(block.attn, nn.MultiheadAttention)
    assert isinstance(copied.attn, PlainAttention)
    assert copied.attn.in_proj_weight.data_ptr() == block.attn.in_proj_weight.data_ptr()


def test_half_precision_leaves_the_backbone_in_float32(mini):
    copied = plain(mini.model, torch.float16)
    assert {p.dtype for p in copied.parameters()} == {torch.float16}
    assert {p.dtype for p in mini.model.parameters()} == {torch.float32}
    assert set(copied.state_dict()) == set(mini.model.state_dict())


@torch.no_grad()
def test_the_activation_equals_torch_s(mini):
    x = torch.linspace(-6, 6, 1001)
    torch.testing.assert_close(PlainGELU()(x), nn.functional.gelu(x))


@torch.no_grad()
def test_attention_equals_torch_s_with_and_without_a_mask(mini):
    attention = mini.model.transformer.resblocks[0].attn
    x = torch.randn(2, 9, attention.embed_dim, generator=torch.manual_seed(0))
    for mask in (None, mini.model.attn_mask[:9, :9]):
        want = attention(x, x, x, need_weights=False, attn_mask=mask)[0]
        got = PlainAttention(attention)(x, x, x, need_weights=False, attn_mask=mask)[0]
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_onnx_runtime_fuses_every_activation(mini, graphs, tower, tmp_path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    filled = onnx_file.to_bytes(trace.fill(getattr(graphs, tower), mini.model.state_dict()))
    onnxruntime.InferenceSession(filled, options, providers=["CPUExecutionProvider"])
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    blocks = mini.model.visual.transformer.layers if tower == "image" else mini.model.transformer.layers
    # The image tower's last block has a single token, for which ONNX Runtime may choose Gelu over BiasGelu.
    assert operators["BiasGelu"] + operators["Gelu"] == blocks
    assert operators["Erf"] == 0
