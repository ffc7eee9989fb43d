"""Towers -> ONNX.

A tower is traced once, with its weights as graph inputs, and only then filled with the values of a state_dict. So no
optimisation can depend on a weight's value (torch's own deduplicates equal initializers and folds small ones): base and
merged have one graph, whatever was learned. ONNX Runtime folds what it likes when it loads.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from textwrap import shorten

import onnx
import onnx_ir
import open_clip
import torch
import torch.nn.functional as F
from onnx import ModelProto, numpy_helper
from onnxscript import optimizer
from torch import Tensor, nn
from torch.export import Dim

from exporter.config import IR_VERSION, OPSET, PRODUCER
from exporter.errors import UnsupportedModel
from trainer.backbone import Backbone
from trainer.towers import encode_text

PROTOBUF_LIMIT = 2**31 - 1

IMAGE_INPUT, IMAGE_OUTPUT = "image", "image_features"
TEXT_INPUT, TEXT_OUTPUT = "tokens", "text_features"


class ImageTower(nn.Module):
    """Pixels -> image features; scaling, mean and std inside."""

    def __init__(self, model: open_clip.CLIP, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.visual = model.visual
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """uint8 (batch, image_size, image_size, 3), RGB -> float32 (batch, embed_dim), L2-normalised."""
        pixels = image.permute(0, 3, 1, 2).to(torch.float32) / 255.0
        return F.normalize(self.visual((pixels - self.mean) / self.std), dim=-1)


class TextTower(nn.Module):
    """Tokens of any length -> text features: the text half of a CLIP, its parts under open_clip's own names."""

    def __init__(self, model: open_clip.CLIP) -> None:
        super().__init__()
        self.context_length, self.vocab_size = model.context_length, model.vocab_size
        self.token_embedding = model.token_embedding
        self.positional_embedding = model.positional_embedding
        self.transformer = model.transformer
        self.ln_final = model.ln_final
        self.text_projection = model.text_projection
        self.register_buffer("attn_mask", model.attn_mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """int32 (batch, seq_len) -> float32 (batch, embed_dim), L2-normalised.

        Longer requests are cut to the context, ids clamped to the vocabulary: neither may be an internal error, nor
        disturb the requests that Triton batches with it.
        """
        length = torch.sym_min(tokens.shape[1], self.context_length)
        tokens = tokens.narrow(1, 0, length).clamp(0, self.vocab_size - 1)
        return F.normalize(encode_text(self, tokens), dim=-1)


def trace_image_tower(backbone: Backbone) -> ModelProto:
    """The image tower's graph, without weights: they are inputs, to be given by ``fill``.

    Raises:
        UnsupportedModel: torch can't trace it.
    """
    size = backbone.image_size
    tower = ImageTower(backbone.model, backbone.mean, backbone.std)
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    return _trace(tower, example, {0: Dim("batch")}, IMAGE_INPUT, IMAGE_OUTPUT)


def trace_text_tower(backbone: Backbone) -> ModelProto:
    """The text tower's graph, without weights: they are inputs, to be given by ``fill``.

    Raises:
        UnsupportedModel: torch can't trace it.
    """
    example = torch.zeros(2, min(7, backbone.context_length), dtype=torch.int32)
    # No maximum: the graph itself cuts to the context. The bound only tells the tracer that lengths are small.
    shapes = {0: Dim("batch"), 1: Dim("length", min=1, max=1 << 20)}
    return _trace(TextTower(backbone.model), example, shapes, TEXT_INPUT, TEXT_OUTPUT)


def fill(graph: ModelProto, state_dict: Mapping[str, Tensor]) -> ModelProto:
    """A traced tower with weights: float32, inside the file, in the order of the graph.

    Args:
        graph: what ``trace_image_tower`` or ``trace_text_tower`` gave; not changed.
        state_dict: an open_clip CLIP's weights, base or merged.

    Raises:
        UnsupportedModel: the tower is too large for one ONNX file.
    """
    filled = copy.deepcopy(graph)
    for value in graph.graph.input[1:]:
        array = state_dict[value.name].detach().to("cpu", torch.float32).contiguous().numpy()
        filled.graph.initializer.append(numpy_helper.from_array(array, value.name))
    del filled.graph.input[1:]
    if (size := filled.ByteSize()) > PROTOBUF_LIMIT:
        raise UnsupportedModel(
            f"tower {graph.graph.input[0].name!r}: {size / 2**30:.1f} GiB as one ONNX file, protobuf allows 2 GiB; "
            "take a smaller model"
        )
    return filled


def to_bytes(model: ModelProto) -> bytes:
    """The file's content; the same model gives the same bytes."""
    return model.SerializeToString(deterministic=True)


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
    model = program.model
    weights = set(tower.state_dict())
    for name in [name for name in model.graph.initializers if name in weights]:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
    optimizer.optimize_ir(model)
    return _strip(onnx_ir.to_proto(model))


def _strip(model: ModelProto) -> ModelProto:
    """Drop what differs between machines: stack traces, source paths, versions of the tools."""
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
