"""ONNX files that anyone may have written, read without following what they name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from exporter.errors import VersionDamaged


def load(file: Path) -> ModelProto:
    """A model with all its data inside.

    Raises:
        VersionDamaged: not ONNX, or a tensor's data is in another file.
    """
    try:
        model = onnx.load(file, load_external_data=False)
    except OSError as exc:
        raise VersionDamaged(f"{file}: can't be read ({exc.strerror}); restore it, or remove the version") from exc
    except Exception as exc:  # protobuf's DecodeError has a different home in each of its implementations
        raise VersionDamaged(f"{file}: not ONNX ({exc}); restore it, or remove the version") from exc
    nodes = (node for function in model.functions for node in function.node)
    for tensor in (*_tensors(model.graph), *_of_nodes(nodes)):
        if tensor.data_location == TensorProto.EXTERNAL:
            raise VersionDamaged(
                f"{file}: tensor {tensor.name!r} has its data in another file, which clipweld never writes; restore "
                "it, or remove the version"
            )
    return model


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterator[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _tensors(graph)
