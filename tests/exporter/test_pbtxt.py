"""config.pbtxt, parsed as Triton parses it and compared with what ONNX Runtime reports of the graph."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc import model_config_pb2

from clipweld.exporter.graph.config_pbtxt import config
from clipweld.exporter.store.repository import KINDS

DATATYPES = {
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(int32)": "TYPE_INT32",
    "tensor(float)": "TYPE_FP32",
    "tensor(string)": "TYPE_STRING",
}


def parsed(text):
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def described(values):
    """Return (name, type, dims) as in the configuration: without the batch dimension, -1 where dynamic."""
    return [(v.name, DATATYPES[v.type], [d if isinstance(d, int) else -1 for d in v.shape[1:]]) for v in values]


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_declares_the_graph_s_inputs_and_outputs(released, kind):
    file = parsed((released[0].model(kind) / "config.pbtxt").read_text())
    session = onnxruntime.InferenceSession(released[0].file(kind, 1), providers=["CPUExecutionProvider"])
    for tensors, values in ((file.input, session.get_inputs()), (file.output, session.get_outputs())):
        said = [(t.name, model_config_pb2.DataType.Name(t.data_type), list(t.dims)) for t in tensors]
        assert said == described(values)
    assert file.name == f"clip_{kind}"
    assert file.backend == "onnxruntime"
    assert file.dynamic_batching.preferred_batch_size == []
    assert file.HasField("dynamic_batching")
    assert not file.dynamic_batching.HasField("default_queue_policy"), "requests would wait for half a second"
    assert not file.HasField("response_cache")


@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_warmup_requests_fit_the_graph_s_inputs(released, kind):
    file = parsed((released[0].model(kind) / "config.pbtxt").read_text())
    session = onnxruntime.InferenceSession(released[0].file(kind, 1), providers=["CPUExecutionProvider"])
    (name, datatype, dims) = described(session.get_inputs())[0]
    assert [sample.batch_size for sample in file.model_warmup] == [1, 8]
    for sample in file.model_warmup:
        (zeros,) = [sample.inputs[name]]
        assert model_config_pb2.DataType.Name(zeros.data_type) == datatype
        assert zeros.zero_data
        assert [free if free > 0 else 16 for free in dims] == list(zeros.dims)


@pytest.mark.parametrize(
    ("tokens", "width", "largest"),
    [(50, 3072, 64), (197, 3072, 64), (257, 4096, 32), (577, 4096, 16), (1 << 20, 1 << 10, 1)],
)
def test_the_largest_batch_is_limited_by_memory(tokens, width, largest):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("image", "features")]
    weights = [
        TensorProto(name="visual.positional_embedding", dims=[tokens, width // 4], data_type=TensorProto.FLOAT),
        TensorProto(name="visual.transformer.resblocks.0.mlp.c_fc.weight", dims=[width, width // 4]),
    ]
    graph = helper.make_graph([], "tower", values[:1], values[1:], weights)
    assert parsed(config("clip", "image", onnx.ModelProto(graph=graph))).max_batch_size == largest
