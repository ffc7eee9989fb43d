"""Our Python-based onnxruntime backend in a real Triton refuses and supports what NVIDIA's does."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException


def tensors(x="data_type: TYPE_FP32 dims: [ 2 ]", y="data_type: TYPE_FP32 dims: [ 2 ]", names=("x", "y")):
    return f'input [ {{ name: "{names[0]}" {x} }} ]\noutput [ {{ name: "{names[1]}" {y} }} ]\n'


BATCHED = "max_batch_size: 4\n"


@pytest.fixture
def load(served, write_model):
    """A function that writes a model, loads it into the running Triton, and returns its name; removed afterwards."""
    written = []

    def load(name, config, **graph):
        written.append(name)
        write_model(served.repository.path, name, config, **graph)
        served.load(name)
        return name

    yield load
    for name in written:
        shutil.rmtree(served.repository.path / name, ignore_errors=True)
        served.unload(name)


REFUSED = {
    "dtype": (BATCHED + tensors(x="data_type: TYPE_INT32 dims: [ 2 ]"), {}, "TYPE_INT32, the graph TYPE_FP32"),
    "rank": (BATCHED + tensors(x="data_type: TYPE_FP32 dims: [ 2, 2 ]"), {}, r"\[-1, 2, 2\], the graph \[-1, 2\]"),
    "dims": (BATCHED + tensors(x="data_type: TYPE_FP32 dims: [ 3 ]"), {}, r"\[-1, 3\], the graph \[-1, 2\]"),
    "output_dims": (BATCHED + tensors(y="data_type: TYPE_FP32 dims: [ 3 ]"), {}, "output 'y'"),
    "dynamic": (BATCHED + tensors(x="data_type: TYPE_FP32 dims: [ -1 ]"), {}, r"\[-1, -1\], the graph \[-1, 2\]"),
    "name": (BATCHED + tensors(names=("z", "y")), {}, r"inputs \['z'\], the graph has \['x'\]"),
    "output_name": (BATCHED + tensors(names=("x", "z")), {}, r"outputs \['z'\], the graph has \['y'\]"),
    "extra": (
        BATCHED + tensors() + 'input [ { name: "w" data_type: TYPE_FP32 dims: [ 2 ] } ]',
        {},
        r"\['w', 'x'\], the graph has \['x'\]",
    ),
    "fixed_batch": (BATCHED + tensors(), {"shape": (1, 2)}, "first dimension is fixed"),
    "optional": (BATCHED + tensors(x="data_type: TYPE_FP32 dims: [ 2 ] optional: true"), {}, "optional"),
    "ragged": (BATCHED + tensors(x="data_type: TYPE_FP32 dims: [ 2 ] allow_ragged_batch: true"), {}, "ragged"),
    "mode": (
        BATCHED + tensors() + 'parameters { key: "execution_mode" value: { string_value: "2" } }',
        {},
        "execution_mode: expected 0 or 1, got '2'",
    ),
    "threads": (
        BATCHED + tensors() + 'parameters { key: "intra_op_thread_count" value: { string_value: "many" } }',
        {},
        "intra_op_thread_count: expected a number, got 'many'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_contradicts_its_config_is_refused(load, case):
    config, graph, message = REFUSED[case]
    with pytest.raises(InferenceServerException, match=message) as caught:
        load(f"refused_{case}", config, **graph)
    assert "model.onnx" in caught.value.message()


def test_a_config_without_inputs_and_outputs_is_refused(load):
    with pytest.raises(InferenceServerException):
        load("nothing", BATCHED)


def test_documented_parameters_are_accepted(served, load):
    values = {
        "intra_op_thread_count": "1",
        "inter_op_thread_count": "0",
        "execution_mode": "1",
        "enable_mem_arena": "0",
        "enable_mem_pattern": "0",
        "session.intra_op.allow_spinning": "0",
    }
    parameters = "".join(f'parameters {{ key: "{k}" value: {{ string_value: "{v}" }} }}\n' for k, v in values.items())
    name = load("parameters", BATCHED + tensors() + parameters + "optimization { graph { level: 2 } }\n")
    x = np.ones((2, 2), np.float32)
    np.testing.assert_array_equal(served.infer(name, {"x": x})["y"], x + 1)


def test_fixed_dims_in_the_config_of_a_dynamic_graph_are_allowed(served, load):
    name = load("fixed", BATCHED + tensors(), shape=("batch", "width"))
    x = np.ones((3, 2), np.float32)
    np.testing.assert_array_equal(served.infer(name, {"x": x})["y"], x + 1)


def test_without_batching_the_whole_shape_is_declared(served, load):
    config = tensors("data_type: TYPE_FP32 dims: [ 1, 2 ]", "data_type: TYPE_FP32 dims: [ 1, 2 ]")
    name = load("unbatched", "max_batch_size: 0\n" + config, shape=(1, 2))
    x = np.ones((1, 2), np.float32)
    np.testing.assert_array_equal(served.infer(name, {"x": x})["y"], x + 1)


def test_a_model_file_inside_a_folder_of_that_name_is_accepted(served, write_model, load):
    name = "folder"
    write_model(served.repository.path, name, BATCHED + tensors())
    version = served.repository.path / name / "1"
    (version / "model.onnx").rename(version / "graph")
    (version / "model.onnx").mkdir()
    (version / "graph").rename(version / "model.onnx" / "model.onnx")
    try:
        served.load(name)
        x = np.ones((1, 2), np.float32)
        np.testing.assert_array_equal(served.infer(name, {"x": x})["y"], x + 1)
    finally:
        shutil.rmtree(served.repository.path / name)
        served.unload(name)


def test_strings_are_accepted_and_returned(served, load):
    text = "data_type: TYPE_STRING dims: [ 2 ]"
    node = helper.make_node("Identity", ["x"], ["y"])
    name = load("strings", BATCHED + tensors(text, text), dtype=TensorProto.STRING, node=node)
    x = np.array([["a", "ünï"], ["", "日本"]], object)
    got = served.infer(name, {"x": x})["y"]
    assert [[item.decode() for item in row] for row in got] == x.tolist()


def test_a_request_that_fails_does_not_fail_others_in_its_batch(served, load):
    """An index out of range fails the whole run in ONNX Runtime, but only its own request may get the error."""
    node = helper.make_node("Gather", ["table", "x"], ["y"])
    table = helper.make_tensor("table", TensorProto.FLOAT, [3], [10.0, 20.0, 30.0])
    delay = "dynamic_batching { max_queue_delay_microseconds: 200000 preferred_batch_size: [ 8 ] }\n"
    config = (
        "max_batch_size: 8\n" + delay + tensors("data_type: TYPE_INT32 dims: [ 1 ]", "data_type: TYPE_FP32 dims: [ 1 ]")
    )
    name = load(
        "neighbours", config, shape=("batch", 1), dtype=TensorProto.INT32, node=node, initializers=(table,),
        out_dtype=TensorProto.FLOAT,
    )  # fmt: skip

    def ask(index):
        try:
            return served.infer(name, {"x": np.array([[index]], np.int32)})["y"].item()
        except InferenceServerException as exc:
            return exc.message()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [0, 1, 2, 99, 0, 1, 2, -77]))
    assert answers[:3] == answers[4:7] == [10.0, 20.0, 30.0]
    assert "indices element out of data bounds" in answers[3]
    assert "indices element out of data bounds" in answers[7]
    statistics = served.client.get_inference_statistics(name).model_stats[0]
    assert statistics.execution_count < 8, "the requests were not batched, so this proved nothing"
