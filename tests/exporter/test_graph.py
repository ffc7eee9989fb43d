"""The traced towers: correct for every length and batch, reproducible bytes, nothing about this machine inside."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from clipweld.exporter.graph import onnx_file, trace


def session(model):
    return onnxruntime.InferenceSession(onnx_file.to_bytes(model), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def text(mini, graphs):
    return session(trace.fill(graphs.text, mini.model.state_dict()))


@pytest.fixture(scope="module")
def image(mini, graphs):
    return session(trace.fill(graphs.image, mini.model.state_dict()))


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_image_tower_equals_open_clip_on_raw_pixels(mini, image, batch):
    pixels = torch.randint(0, 256, (batch, 64, 64, 3), dtype=torch.uint8, generator=torch.manual_seed(batch))
    mean, std = torch.tensor(mini.mean), torch.tensor(mini.std)
    want = F.normalize(mini.model.visual(((pixels / 255 - mean) / std).permute(0, 3, 1, 2)), dim=-1)
    got = image.run(None, {"image": pixels.numpy()})[0]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want.numpy(), atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_the_text_tower_equals_open_clip_at_every_length(mini, text, batch):
    for length in range(1, mini.context_length + 1):
        tokens = torch.randint(1, 49407, (batch, length), generator=torch.manual_seed(length))
        tokens[:, 0] = 49407  # some rows have EOT first, one has it last
        if length > 2:
            tokens[0, 0], tokens[0, -1] = 49406, 49407
        padded = F.pad(tokens, (0, mini.context_length - length))
        want = mini.model.encode_text(padded, normalize=True)
        got = text.run(None, {"tokens": tokens.to(torch.int32).numpy()})[0]
        np.testing.assert_allclose(got, want.numpy(), atol=2e-6, err_msg=f"length {length}")


def test_text_longer_than_the_context_is_cut(mini, text):
    tokens = np.random.default_rng(0).integers(0, 49407, (2, 300), dtype=np.int32)
    cut = text.run(None, {"tokens": tokens[:, : mini.context_length]})[0]
    np.testing.assert_array_equal(text.run(None, {"tokens": tokens})[0], cut)


def test_token_ids_out_of_vocabulary_are_clamped(text):
    wild, tame = np.array([[-7, 2**31 - 1, 5]], np.int32), np.array([[0, 49407, 5]], np.int32)
    np.testing.assert_array_equal(text.run(None, {"tokens": wild})[0], text.run(None, {"tokens": tame})[0])


def test_weights_keep_open_clip_s_names_and_values(mini, graphs):
    weights = mini.model.state_dict()
    for traced in (graphs.image, graphs.text):
        filled = {t.name: t for t in trace.fill(traced, weights).graph.initializer}
        names = [value.name for value in traced.graph.input[1:]]
        assert names
        for name in names:
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(filled[name]), weights[name].numpy())


def test_every_weight_of_the_model_is_in_a_tower(mini, graphs):
    used = {value.name for traced in (graphs.image, graphs.text) for value in traced.graph.input[1:]}
    assert used == set(mini.model.state_dict()) - {"logit_scale"}


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_graph_does_not_depend_on_the_values_of_weights(mini, graphs, value):
    """Optimisers might fold or deduplicate weights that are equal or zero."""
    constant = {name: torch.full_like(tensor, value) for name, tensor in mini.model.state_dict().items()}
    for traced in (graphs.image, graphs.text):
        ours, others = trace.fill(traced, constant).graph, trace.fill(traced, mini.model.state_dict()).graph
        assert list(ours.node) == list(others.node)
        assert [(t.name, t.dims) for t in ours.initializer] == [(t.name, t.dims) for t in others.initializer]


@pytest.mark.slow
def test_tracing_again_gives_the_same_bytes_whatever_the_weights(mini, graphs):
    model = mini.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        for parameter in model.parameters():
            parameter.zero_()
        again = trace.trace_text_tower(mini)
    finally:
        model.load_state_dict(before)
    assert onnx_file.to_bytes(again) == onnx_file.to_bytes(graphs.text)


def test_the_file_contains_nothing_about_this_machine(mini, graphs):
    for traced in (graphs.image, graphs.text):
        content = onnx_file.to_bytes(
            trace.fill(traced, {k: torch.zeros_like(v) for k, v in mini.model.state_dict().items()})
        )
        for left in (b".py", b"site-packages", b"/home", b"/root", b"/tmp", sys.prefix.encode(), b"stack", b"torch"):
            assert left not in content


def test_opset_and_ir_load_on_old_servers(graphs):
    for traced in (graphs.image, graphs.text):
        assert traced.ir_version == 9
        assert [(opset.domain, opset.version) for opset in traced.opset_import] == [("", 18)]
