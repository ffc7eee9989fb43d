"""Reading and writing ONNX files, with weights in a second file where one can't hold them.

Files may come from untrusted sources: of the paths that a file names, only our own data file is followed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, external_data_helper, helper, numpy_helper

from clipweld.exporter.disk import changing, is_regular, write
from clipweld.exporter.errors import VersionDamaged

DATA_FILE = "model.onnx.data"  # beside a ``model.onnx``
# Bytes of weights. A protobuf message is limited to 2 GiB - 1; the margin is for the graph.
EXTERNAL_ABOVE = 2**31 - 2**25
SMALL = 1024  # bytes of a tensor that stays in the graph: shapes and axes, which ONNX infers shapes from


def data_file(file: Path) -> Path:
    """Return the path of a model's external weights."""
    return file.with_name(f"{file.name}.data")


def to_bytes(model: ModelProto) -> bytes:
    """Serialise a model; equal models give equal bytes."""
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def is_large(model: ModelProto) -> bool:
    """Whether a model's weights exceed what is written to a single file."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer) > EXTERNAL_ABOVE


def save(model: ModelProto, file: Path) -> None:
    """Write a model and flush it; the weights of a large one are moved, in the message too, to ``data_file(file)``.

    Raises:
        RepositoryError: it can't be written.
    """
    if is_large(model):
        data = data_file(file)
        with changing(data):
            data.parent.mkdir(parents=True, exist_ok=True)
            data.touch()  # with the umask's mode: onnx would create it readable by its owner only
            for tensor in model.graph.initializer:
                if len(tensor.raw_data) >= SMALL:
                    external_data_helper.set_external_data(tensor, data.name)
            external_data_helper.write_external_data_tensors(model, str(data.parent))
            with data.open("rb") as written:
                os.fsync(written.fileno())
    write(file, to_bytes(model))


def load(file: Path) -> ModelProto:
    """Load a model; external weights are not read (see ``values``).

    Raises:
        VersionDamaged: not ONNX, or a tensor's data is not where ``save`` puts it.
    """
    try:
        model = onnx.load(file, load_external_data=False)
    except OSError as exc:
        raise VersionDamaged(f"{file}: can't be read ({exc.strerror}); restore it, or remove the version") from exc
    except Exception as exc:  # each protobuf implementation has its own DecodeError
        raise VersionDamaged(f"{file}: not ONNX ({exc}); restore it, or remove the version") from exc
    nodes = (node for function in model.functions for node in function.node)
    lost = [tensor for tensor in (*_inner(model.graph), *_of_nodes(nodes)) if _is_elsewhere(tensor)]
    lost += [weight for weight in model.graph.initializer if _is_elsewhere(weight) and not _is_beside(weight, file)]
    for tensor in lost[:1]:
        raise VersionDamaged(
            f"{file}: tensor {tensor.name!r} has its data in another file, where clipweld never writes it, or not all "
            "of it is there; restore it, or remove the version"
        )
    return model


def take_inside(tensor: TensorProto, file: Path) -> None:
    """Embed the external data of a tensor of a model that ``load`` read from ``file``."""
    if _is_elsewhere(tensor):
        tensor.raw_data = values(tensor, file).tobytes()
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")


def values(tensor: TensorProto, file: Path) -> np.ndarray:
    """Return a copy of a weight of a model that ``load`` read from ``file``."""
    if not _is_elsewhere(tensor):
        return np.array(numpy_helper.to_array(tensor))
    dtype, offset = helper.tensor_dtype_to_np_dtype(tensor.data_type), _offset(tensor)
    # Not with onnx, which refuses files with several hard links, as active versions have.
    flat: np.ndarray = np.fromfile(data_file(file), dtype, math.prod(tensor.dims), offset=offset)
    return flat.reshape(tensor.dims)


def _is_beside(tensor: TensorProto, file: Path) -> bool:
    """Whether all of a tensor's data is in the file where ``save`` puts it."""
    said, data = {entry.key: entry.value for entry in tensor.external_data}, data_file(file)
    size = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return (
        said.get("location") == data.name
        and said.get("length") == str(size)
        and said.get("offset", "").isdecimal()
        and is_regular(data)
        and _offset(tensor) + size <= data.stat().st_size
    )


def _offset(tensor: TensorProto) -> int:
    return next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")


def _is_elsewhere(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def _inner(graph: GraphProto) -> Iterator[TensorProto]:
    """Yield all tensors of a graph except its initializers."""
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from (*graph.initializer, *_inner(graph))
