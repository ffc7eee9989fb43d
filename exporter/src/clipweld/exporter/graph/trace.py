"""Trace towers to ONNX graphs and fill them with weights.

A tower is traced once, with its weights as graph inputs, and then filled with the values of a state_dict. So no
optimisation can depend on weight values (torch's deduplicates equal initializers and folds small ones), and base and
merged have the same graph. ONNX Runtime still optimises it when it loads the file.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import ModelProto, helper
from onnxscript import optimizer
from torch import Tensor, nn
from torch.export import Dim

from clipweld.exporter.config import IR_VERSION, OPSET, PRODUCER
from clipweld.exporter.errors import NotFinite, UnsupportedModel
from clipweld.exporter.graph import onnx_file
from clipweld.exporter.graph.towers import ImageTower, TextTower, plain
from clipweld.trainer.base.backbone import Backbone

IMAGE_INPUT, IMAGE_OUTPUT = "image", "image_features"
TEXT_INPUT, TEXT_OUTPUT = "tokens", "text_features"


def trace_image_tower(backbone: Backbone, dtype: torch.dtype = torch.float32) -> ModelProto:
    """Trace the image tower without weights: they are graph inputs until ``fill``.

    Args:
        dtype: of the transformer: float32, or float16 for GPUs.

    Raises:
        UnsupportedModel: torch can't trace it.
    """
    size = backbone.image_size
    tower = ImageTower(plain(backbone.model, dtype), backbone.mean, backbone.std)
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    return _trace(tower, example, {0: Dim("batch")}, IMAGE_INPUT, IMAGE_OUTPUT)


def trace_text_tower(backbone: Backbone, dtype: torch.dtype = torch.float32) -> ModelProto:
    """Trace the text tower without weights: they are graph inputs until ``fill``.

    Args, errors: as of ``trace_image_tower``.
    """
    example = torch.zeros(2, min(7, backbone.context_length), dtype=torch.int32)
    # Longer than any context, to which the graph itself cuts; the bound only tells the tracer that lengths are small.
    shapes = {0: Dim("batch"), 1: Dim("length", min=1, max=1 << 20)}
    return _trace(TextTower(plain(backbone.model, dtype)), example, shapes, TEXT_INPUT, TEXT_OUTPUT)


def hollow(file: Path, names: Container[str]) -> ModelProto:
    """Undo ``fill``: read a tower's file and turn its weights back into graph inputs.

    Args:
        names: of the weights.
    """
    model = onnx_file.load(file)
    weights = [tensor for tensor in model.graph.initializer if tensor.name in names]
    for tensor in weights:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        model.graph.initializer.remove(tensor)
    for constant in model.graph.initializer:  # such as the text tower's mask
        onnx_file.take_inside(constant, file)
    # A copy, because protobuf keeps the memory of what was removed from a message.
    compact: ModelProto = ModelProto.FromString(model.SerializeToString())
    return compact


def fill(graph: ModelProto, state_dict: Mapping[str, Tensor]) -> ModelProto:
    """Return a copy of a traced tower with weights in its precision, in the order of its inputs.

    Args:
        graph: from ``trace_image_tower`` or ``trace_text_tower``; not changed.
        state_dict: an open_clip CLIP's weights, base or merged.

    Raises:
        NotFinite: a weight is NaN, infinite, or too large for its precision; the message names it.
    """
    filled = copy.deepcopy(graph)
    values = list(graph.graph.input[1:])
    del filled.graph.input[1:]
    for value in values:
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        weight = state_dict[value.name].detach().to("cpu", torch.float32).numpy()
        with np.errstate(over="ignore"):  # refused below
            array = weight.astype(dtype, copy=False)
        if not np.isfinite(array).all():
            raise NotFinite(
                f"tower {graph.graph.input[0].name!r}: weight {value.name} reaches {np.abs(weight).max():.3g}, "
                f"expected finite {dtype.name}; merge with --precision fp32, or learn the task again with a lower --lr"
            )
        # In place: appending a finished tensor would make protobuf hold it twice.
        filled.graph.initializer.add(
            name=value.name,
            data_type=value.type.tensor_type.elem_type,
            dims=array.shape,
            raw_data=array.tobytes(),
        )
    return filled


def _trace(tower: nn.Module, example: Tensor, shapes: dict, input_name: str, output_name: str) -> ModelProto:
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                tower.eval(),
                (example,),
                dynamo=True,
                dynamic_shapes=(shapes,),
                input_names=[input_name],
                output_names=[output_name],
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as exc:
        reason = shorten(str(exc.__cause__ or exc), 200, placeholder=" ...")
        raise UnsupportedModel(
            f"{type(tower).__name__} of this model can't be traced to ONNX: {reason}; try a plain ViT such as ViT-B-16"
        ) from exc
    assert program is not None  # dynamo=True returns one
    model = program.model
    weights = set(tower.state_dict())
    for name in [name for name in model.graph.initializers if name in weights]:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
    optimizer.optimize_ir(model)
    return _strip(onnx_ir.to_proto(model))


def _strip(model: ModelProto) -> ModelProto:
    """Remove what differs between machines: stack traces, source paths, tool versions."""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = PRODUCER, ""
    graph = model.graph
    graph.name = graph.output[0].name
    del graph.value_info[:]
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's tracer: deprecations inside torch, and log lines about torchvision operators that no CLIP has."""
    logger = logging.getLogger("torch.onnx._internal.exporter._schemas")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
