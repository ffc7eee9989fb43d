"""Towers in the precision of a version; adapters are merged in float32, the cast comes last."""

from __future__ import annotations

import logging
import re
import shutil
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
    """The graphs of both towers of a CLIP, to be filled with weights.

    Args:
        backbone: the base.
        traced: float32 files of the image and the text tower whose graphs are reused, instead of tracing again.

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
        """Return a tower in float32, with these adapters as branches."""
        return fill(with_branches(self._graphs[kind], branches), weights)

    def cast(self, kind: str, weights: Mapping[str, Tensor], exact: Path) -> ModelProto | None:
        """Return a tower in this precision; None where that is float32.

        Args:
            exact: the file of the float32 tower with the same weights.
        """
        if self._precision is Precision.fp16:
            return fill(self._half[kind], weights)
        if self._precision is Precision.int8 and kind == "image":
            return quantize(exact)
        return None


def quantize(file: Path) -> ModelProto:
    """Quantise the matrix products of an image tower's float32 file to int8, weights now and activations at run time.

    Weights have seven bits, with a scale per channel: CPUs without VNNI add two products in 16 bits, which eight bits
    would overflow. Activations have one scale per batch, so an answer depends slightly on the rest of its batch. The
    products with the largest errors stay in float32 (``float_products``).
    """
    # Imported here: it takes a second.
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    large = onnx_file.data_file(file).exists()
    with _temporary_folder() as folder, _quiet():
        if large:  # copied, because onnx refuses data with several hard links, as a version's have
            for part in (file, onnx_file.data_file(file)):
                shutil.copy(part, folder)
            file = folder / file.name
        # Unique names, because onnx looks for the data of a large model in the working folder too.
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
        if onnx_file.is_large(model):  # too large to check in memory
            onnx.checker.check_model(str(quantized), full_check=True)
    del model.opset_import[:], model.graph.value_info[:]
    model.opset_import.append(
        onnx.helper.make_opsetid("", OPSET)
    )  # the only one needed; onnxruntime lists all it knows
    model.ir_version, model.producer_name, model.producer_version = IR_VERSION, PRODUCER, ""
    if not onnx_file.is_large(model):
        onnx.checker.check_model(model, full_check=True)
    return model


def float_products(tower: ModelProto) -> list[str]:
    """Return the node names of the matrix products of an image tower that stay in float32.

    These are the second layer of the first MLP, whose input has outliers (on the small CLIP it alone caused 28% of the
    features' squared error), and the last block's layers after its attention, with the projection (25%). The latter
    cost next to nothing in float32: only [CLS] passes through them.
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
    """Create a temporary folder, removed when the block ends.

    Raises:
        OutputError: it can't be written to.
    """
    place = "temporary files"
    try:
        place = f"temporary folder {tempfile.gettempdir()}"
        with tempfile.TemporaryDirectory(prefix="clipweld-int8-") as folder:
            yield Path(folder)
    except (OSError, onnx.checker.ValidationError, DecodeError) as exc:
        # On a full disk onnxruntime and onnx report nothing; reading their truncated files fails instead.
        reason, step = (cause(exc), next_step(exc)) if isinstance(exc, OSError) else ("files are cut off", "make room")
        raise OutputError(f"{place}: can't be written ({reason}); {step}, or name another folder in TMPDIR") from exc


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence onnxruntime, which logs a line per non-float tensor, and logs an error before raising it."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
