"""Serve ``backend: "onnxruntime"`` models with the onnxruntime package, in a Triton that lacks NVIDIA's C++ backend.

Triton runs this file in a separate Python process for every version and instance. It refuses what the C++ backend
refuses and reads the parameters that the C++ backend documents, so a repository that works here also works there.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils  # Triton adds it to the path

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL_FILE = "model.onnx"
TYPES = {
    "tensor(bool)": "TYPE_BOOL",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32",
    "tensor(uint64)": "TYPE_UINT64",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(string)": "TYPE_STRING",
}
LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
EXECUTION_MODES = {"0": ort.ExecutionMode.ORT_SEQUENTIAL, "1": ort.ExecutionMode.ORT_PARALLEL}


class TritonPythonModel:
    """One version of one model on one device."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the version's graph and check the configuration against it.

        Args:
            args: from Triton: configuration, folder, version and device.

        Raises:
            pb_utils.TritonModelException: configuration and graph differ, or the graph can't be loaded.
        """
        config = json.loads(args["model_config"])
        path = os.path.join(args["model_repository"], args["model_version"], MODEL_FILE)
        if os.path.isdir(path):  # external data: the graph and its weights in a folder of the graph's name
            path = os.path.join(path, MODEL_FILE)
        try:
            options = session_options(config)
            providers = execution_providers(args["model_instance_kind"], args["model_instance_device_id"])
            self.session = ort.InferenceSession(path, options, providers=providers)
            if self.session.get_providers()[0] != _name(providers[0]):
                raise ValueError(
                    f"onnxruntime could not start {_name(providers[0])}: install CUDA's libraries with 'exporter "
                    "install-server --cuda', or set instance_group [ { kind: KIND_CPU } ]"
                )
            check_config(config, self.session.get_inputs(), self.session.get_outputs())
        except Exception as exc:  # onnxruntime's errors share no base class
            reason = " ".join(str(exc).split())
            raise pb_utils.TritonModelException(f"{args['model_name']}: {path}: {reason}") from None
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.strings = {v.name for v in self.session.get_inputs() if v.type == "tensor(string)"}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.batched = config.get("max_batch_size", 0) > 0

    def execute(self, requests: list) -> list:
        """Answer all requests; those of equal shapes run as one batch. A request that fails makes no other fail."""
        responses = [None] * len(requests)
        groups = defaultdict(list)
        for place, request in enumerate(requests):
            feed = self._feed(request)
            alike = tuple(array.shape[1:] for array in feed.values()) if self.batched else place
            groups[alike].append((place, feed))
        for members in groups.values():
            for place, outputs in self._run(members):
                responses[place] = _response(outputs, requests[place])
        return responses

    def finalize(self) -> None:
        """Free the memory before the process ends."""
        self.session = None

    def _feed(self, request: pb_utils.InferenceRequest) -> dict[str, np.ndarray]:
        feed = {}
        for name in self.inputs:
            array = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            if name in self.strings:
                text = [item.decode() if isinstance(item, bytes) else item for item in array.ravel()]
                array = np.array(text, dtype=object).reshape(array.shape)
            feed[name] = array
        return feed

    def _run(self, members: list[tuple[int, dict[str, np.ndarray]]]) -> Iterator:
        """Yield (place, outputs or error) for requests of equal shapes."""
        if len(members) == 1:
            place, feed = members[0]
            yield place, self._try(feed)
            return
        sizes = [len(feed[self.inputs[0]]) for _, feed in members]
        whole = {name: np.concatenate([feed[name] for _, feed in members]) for name in self.inputs}
        outputs = self._try(whole)
        if isinstance(outputs, Exception):
            for place, feed in members:
                yield place, self._try(feed)
            return
        starts = np.cumsum([0, *sizes])
        for (place, _), start, size in zip(members, starts, sizes):  # noqa: B905
            yield place, {name: array[start : start + size] for name, array in outputs.items()}

    def _try(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray] | Exception:
        try:
            return dict(zip(self.outputs, self.session.run(None, feed)))  # noqa: B905
        except Exception as exc:  # onnxruntime's errors share no base class; each goes to the request that caused it
            return exc


def _response(
    outputs: dict[str, np.ndarray] | Exception, request: pb_utils.InferenceRequest
) -> pb_utils.InferenceResponse:
    if isinstance(outputs, Exception):
        message = f"onnxruntime: {' '.join(str(outputs).split())}"
        return pb_utils.InferenceResponse([], pb_utils.TritonError(message))
    wanted = request.requested_output_names()
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, outputs[name]) for name in outputs if name in wanted])


def session_options(config: dict) -> ort.SessionOptions:
    """Return session options from the parameters of the C++ backend, and from any ``session.*`` entry of onnxruntime.

    Args:
        config: the model's configuration.

    Raises:
        ValueError: a parameter has a value that the C++ backend refuses.
    """
    parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only; its warnings are about the host, not the model
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    options.graph_optimization_level = LEVELS.get(level, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    options.intra_op_num_threads = _threads(parameters, "intra_op_thread_count")
    options.inter_op_num_threads = _threads(parameters, "inter_op_thread_count")
    mode = parameters.get("execution_mode", "0")
    if mode not in EXECUTION_MODES:
        raise ValueError(f"parameter execution_mode: expected 0 or 1, got {mode!r}")
    options.execution_mode = EXECUTION_MODES[mode]
    options.enable_cpu_mem_arena = _flag(parameters, "enable_mem_arena")
    options.enable_mem_pattern = _flag(parameters, "enable_mem_pattern")
    # Every version is a process here, and threads that spin while idle take the cores from the version at work. With
    # two versions at work in turn on two busy cores, a batch of 8 takes 20 ms without spinning and 50 to 80 ms with it
    # (one image: 6.3 and 5.1 ms). The C++ backend has one process and keeps onnxruntime's own default.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in parameters.items():
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
    return options


def execution_providers(kind: str, device_id: str) -> list:
    """Return the providers that ``instance_group`` requires: onnxruntime's CPU, or CUDA on the given device.

    Raises:
        ValueError: a GPU is required, but this onnxruntime has no CUDA.
    """
    if kind != "GPU":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise ValueError(
            "instance_group asks for a GPU, and this onnxruntime has no CUDA, as on all but x86_64: set instance_group "
            "[ { kind: KIND_CPU } ]"
        )
    ort.preload_dlls()  # CUDA and cuDNN from Python packages, where the system has none
    return [("CUDAExecutionProvider", {"device_id": int(device_id)}), "CPUExecutionProvider"]


def check_config(config: dict, inputs: list, outputs: list) -> None:
    """Check ``config.pbtxt`` against the graph as strictly as the C++ backend does.

    Args:
        config: the model's configuration.
        inputs: the graph's inputs, each a NodeArg of onnxruntime with name, type and shape.
        outputs: the graph's outputs, likewise.

    Raises:
        ValueError: they differ; the message names the tensor, what was expected and what was found.
    """
    batched = config.get("max_batch_size", 0) > 0
    for field, values in (("input", inputs), ("output", outputs)):
        declared = {tensor["name"]: tensor for tensor in config.get(field, [])}
        graph = {value.name: value for value in values}
        if set(declared) != set(graph):
            raise ValueError(
                f"configuration has {field}s {sorted(declared)}, the graph has {sorted(graph)}; they must be the same"
            )
        for name, tensor in declared.items():
            _check_tensor(f"{field} {name!r}", tensor, graph[name], batched)


def _check_tensor(label: str, tensor: dict, value: ort.NodeArg, batched: bool) -> None:
    if batched and tensor.get("optional"):
        raise ValueError(f"{label}: optional inputs can't be batched; set max_batch_size: 0")
    if tensor.get("allow_ragged_batch"):
        raise ValueError(f"{label}: ragged batches are not supported; remove allow_ragged_batch")
    if value.type not in TYPES:
        raise ValueError(f"{label}: {value.type} can't be served")
    if tensor["data_type"] != TYPES[value.type]:
        raise ValueError(
            f"{label}: configuration says {tensor['data_type']}, the graph {TYPES[value.type]}; they must be the same"
        )
    # onnxruntime represents a dynamic dimension by its name, or by None.
    graph = [size if isinstance(size, int) else -1 for size in value.shape]
    dims = [int(size) for size in (tensor.get("reshape") or {}).get("shape", tensor["dims"])]
    if batched:
        if not graph or graph[0] != -1:
            raise ValueError(
                f"{label}: max_batch_size is above 0, but the graph's first dimension is fixed: shape {graph}; "
                "set max_batch_size: 0"
            )
        dims = [-1, *dims]
    alike = len(dims) == len(graph) and all(g in (-1, d) for d, g in zip(dims, graph))  # noqa: B905
    if not alike:
        raise ValueError(f"{label}: configuration has shape {dims}, the graph {graph}; they must be the same")


def _threads(parameters: dict[str, str], key: str) -> int:
    value = parameters.get(key, "0")
    if not value.lstrip("-").isdecimal():
        raise ValueError(f"parameter {key}: expected a number, got {value!r}")
    return max(0, int(value))  # like the C++ backend: 0 and below leave the choice to onnxruntime


def _flag(parameters: dict[str, str], key: str) -> bool:
    value = parameters.get(key, "1").lower()
    if value not in ("0", "1", "false", "true"):
        raise ValueError(f"parameter {key}: expected 0, 1, false or true, got {value!r}")
    return value in ("1", "true")


def _name(provider: str | tuple) -> str:
    return provider if isinstance(provider, str) else provider[0]
