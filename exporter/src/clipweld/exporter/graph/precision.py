"""Precisions of a version: merged in float32 first, cast last."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import ModelProto
from torch import Tensor

from clipweld.exporter.config import IR_VERSION, OPSET, PRODUCER, Precision
from clipweld.exporter.graph import onnx_file
from clipweld.exporter.graph.branches import with_branches
from clipweld.exporter.graph.trace import fill, hollow, trace_image_tower, trace_text_tower
from clipweld.trainer.adapters.adapter import Adapter
from clipweld.trainer.base.backbone import Backbone
from clipweld.trainer.errors import OutputError
from clipweld.trainer.os_errors import cause, next_step

_BLOCK = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.")
_AFTER_ATTENTION = ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")


class Towers:
    """Both towers of a CLIP as graphs, to be filled with any weights it may have.

    Args:
        backbone: the base.
        traced: files of the image and the text tower in float32 that were traced before; their graphs are taken.

    Raises:
        UnsupportedModel: torch can't trace it.
    """

    def __init__(self, backbone: Backbone, precision: Precision, traced: tuple[Path, Path] | None = None) -> None:
        self._precision = precision
        if traced:
            weights = backbone.model.state_dict()
            image, text = (hollow(file, weights) for file in traced)
        else:
            image, text = trace_image_tower(backbone), trace_text_tower(backbone)
        self._graphs = {"image": image, "text": text}
        if precision is Precision.fp16:
            half = torch.float16
            self._half = {"image": trace_image_tower(backbone, half), "text": trace_text_tower(backbone, half)}

    def exact(self, kind: str, weights: Mapping[str, Tensor], branches: Sequence[Adapter] = ()) -> ModelProto:
        """A tower in float32, these adapters beside its layers."""
        return fill(with_branches(self._graphs[kind], branches), weights)

    def cast(self, kind: str, weights: Mapping[str, Tensor], exact: Path) -> ModelProto | None:
        """A tower in this precision; None where that is float32 too.

        Args:
            exact: the file of what ``exact`` gave for the same weights.
        """
        if self._precision is Precision.fp16:
            return fill(self._half[kind], weights)
        if self._precision is Precision.int8 and kind == "image":
            return quantize(exact)
        return None


def quantize(file: Path) -> ModelProto:
    """An image tower's float32 file with its products by weights in int8: weights now, activations when it runs.

    Seven bits of weights a channel: CPUs without VNNI add two products in 16 bits, which eight would overflow. The
    scale of activations is that of a whole batch, so an answer depends a little on what it is batched with. The
    products that err most stay in float32 (``float_products``).
    """
    # Imported here: it takes a second.
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    large = onnx_file.data_file(file).exists()
    with _temporary_folder() as folder, _quiet():
        # Names that are nowhere else: beside a large model onnx looks for its data in the working folder too.
        folded, quantized = (folder / f"{folder.name}-{step}.onnx" for step in ("folded", "quantized"))
        quant_pre_process(
            file,
            folded,
            skip_symbolic_shape=True,
            save_as_external_data=large,
            all_tensors_to_one_file=large,
            external_data_location=f"{folded.name}.data" if large else None,
        )
        quantize_dynamic(
            folded,
            quantized,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=float_products(onnx_file.load(file)),
            use_external_data_format=large,
            extra_options={"MatMulConstBOnly": True},
        )
        model = onnx.load(quantized)
        if onnx_file.is_large(model):  # too large to be checked in memory
            onnx.checker.check_model(str(quantized), full_check=True)
    del model.opset_import[:], model.graph.value_info[:]
    model.opset_import.append(onnx.helper.make_opsetid("", OPSET))  # all it needs; onnxruntime lists all it knows
    model.ir_version, model.producer_name, model.producer_version = IR_VERSION, PRODUCER, ""
    if not onnx_file.is_large(model):
        onnx.checker.check_model(model, full_check=True)
    return model


def float_products(tower: ModelProto) -> list[str]:
    """The products of an image tower that int8 leaves alone, by their nodes' names.

    The second layer of the first MLP, whose input has the outliers: on the small CLIP it alone made 28% of the
    features' squared error. And the last block's layers after its attention, with the projection, which made 25% and
    cost next to nothing: only [CLS] goes through them.
    """
    transposed = {node.output[0]: node.input[0] for node in tower.graph.node if node.op_type == "Transpose"}
    weights = {
        node.name: transposed.get(node.input[1], node.input[1]) for node in tower.graph.node if node.op_type == "MatMul"
    }
    blocks = [int(found[1]) for weight in weights.values() if (found := _BLOCK.match(weight))]
    kept = {
        "visual.proj",
        f"visual.transformer.resblocks.{min(blocks)}.mlp.c_proj.weight",
        *(f"visual.transformer.resblocks.{max(blocks)}.{layer}.weight" for layer in _AFTER_ATTENTION),
    }
    return [name for name, weight in weights.items() if weight in kept]


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder for as long as the block runs.

    Raises:
        OutputError: something can't be written to it.
    """
    place = "temporary files"
    try:
        place = f"temporary folder {tempfile.gettempdir()}"
        with tempfile.TemporaryDirectory(prefix="clipweld-int8-") as folder:
            yield Path(folder)
    except (OSError, onnx.checker.ValidationError, DecodeError) as exc:
        # onnxruntime and onnx write on a full disk without a word, and what they wrote can't be read back.
        reason, step = (cause(exc), next_step(exc)) if isinstance(exc, OSError) else ("files are cut off", "make room")
        raise OutputError(f"{place}: can't be written ({reason}); {step}, or name another folder in TMPDIR") from exc


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what onnxruntime has to say of every tensor that is not float, and before an error of ours."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
