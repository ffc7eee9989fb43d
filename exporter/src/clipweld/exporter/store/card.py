"""The card: a tiny ONNX model that answers JSON describing a version."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from clipweld.exporter.config import IR_VERSION, OPSET, PRODUCER
from clipweld.exporter.errors import RepositoryError, UnsupportedModel
from clipweld.exporter.graph import onnx_file
from clipweld.exporter.store.schemas import CARD_FORMAT, Card, Task
from clipweld.trainer.schemas import MAX_BYTES, one_line, read_json

if TYPE_CHECKING:  # reading a card needs neither torch nor open_clip
    from clipweld.trainer.adapters.adapter import Adapter
    from clipweld.trainer.base.backbone import Backbone

RESIZE_MODES = ("shortest", "squash")
CARD_INPUT, CARD_OUTPUT = "index", "card"
_TEXT = "cards"


def describe(name: str, version: int, backbone: Backbone, adapters: Sequence[Adapter]) -> Card:
    """Return what a client must know about a version, and its lineage.

    Raises:
        UnsupportedModel: a tokenizer or resize mode that clients lack, or a card too large for clients to read.
    """
    if backbone.resize_mode not in RESIZE_MODES:
        raise UnsupportedModel(
            f"model {backbone.model_name}: resize mode {backbone.resize_mode!r}, clients know "
            f"{' and '.join(RESIZE_MODES)}; take another model"
        )
    bias = getattr(backbone.model, "logit_bias", None)
    card: Card = {
        "format": CARD_FORMAT,
        "model": name,
        "version": version,
        "image": {
            "size": backbone.image_size,
            "resize_mode": backbone.resize_mode,
            "interpolation": backbone.interpolation,
        },
        "text": {"context_length": backbone.context_length, "tokenizer_sha256": tokenizer_sha256(backbone)},
        "embed_dim": backbone.embed_dim,
        "logit_scale": float(backbone.model.logit_scale.detach().exp()),
        "logit_bias": None if bias is None else float(bias.detach()),
        "base": {
            "model_name": backbone.model_name,
            "pretrained": backbone.pretrained,
            "fingerprint": backbone.fingerprint,
        },
        "tasks": [_task(adapter) for adapter in adapters],
    }
    try:
        read_json(Card, _to_text(card))
    except ValueError as exc:
        raise UnsupportedModel(f"the card of {name} could not be read again ({exc}); merge fewer tasks") from exc
    return card


def tokenizer_sha256(backbone: Backbone) -> str:
    """Return the SHA-256 of the tokenizer's vocabulary, decompressed because gzip's bytes vary.

    Raises:
        UnsupportedModel: not open_clip's SimpleTokenizer with its shipped vocabulary, which clients have.
    """
    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    plain = SimpleTokenizer(context_length=backbone.context_length)
    tokenizer: Any = backbone.tokenizer  # open_clip has no types
    if (
        type(tokenizer) is not SimpleTokenizer
        or tokenizer.encoder != plain.encoder
        or tokenizer.clean_fn is not plain.clean_fn
        or tokenizer.reduction_fn is not None
    ):
        raise UnsupportedModel(
            f"model {backbone.model_name}: tokenizer {type(tokenizer).__name__}, clients have CLIP's own "
            "(SimpleTokenizer, lower case); take another model"
        )
    return hashlib.sha256(gzip.decompress(Path(default_bpe()).read_bytes())).hexdigest()


def card_model(card: Card) -> ModelProto:
    """Build the ONNX model: ``index`` int32 (batch, 1) -> ``card`` string (batch, 1). Every index gives the one card.

    An index out of range is clamped, because an error would fail the other requests of Triton's batch.
    """
    zero = numpy_helper.from_array(np.array(0, np.int32), "zero")
    cards = helper.make_tensor(_TEXT, TensorProto.STRING, [1], [_to_text(card).encode()])  # type: ignore[list-item]  # bytes are taken too
    graph = helper.make_graph(
        [
            helper.make_node("Clip", [CARD_INPUT, "zero", "zero"], ["row"], name="only_row"),
            helper.make_node("Gather", [_TEXT, "row"], [CARD_OUTPUT], name="read", axis=0),
        ],
        CARD_OUTPUT,
        [helper.make_tensor_value_info(CARD_INPUT, TensorProto.INT32, ["batch", 1])],
        [helper.make_tensor_value_info(CARD_OUTPUT, TensorProto.STRING, ["batch", 1])],
        [zero, cards],
    )
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name=PRODUCER)
    onnx.checker.check_model(model, full_check=True)
    return model


def read_card(file: Path) -> Card:
    """Read the card in a ``model.onnx`` without running it.

    Raises:
        RepositoryError: not a card of this format.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"{file.stat().st_size:,} bytes, at most {MAX_BYTES:,} are read")
        model = onnx_file.load(file)
        texts = [text for tensor in model.graph.initializer if tensor.name == _TEXT for text in tensor.string_data]
        if len(texts) != 1:
            raise ValueError(f"{len(texts)} cards in it")
        return read_json(Card, texts[0])
    except (OSError, ValueError) as exc:
        raise RepositoryError(
            f"card {file}: can't be read ({one_line(str(exc))}); restore it, or remove the version"
        ) from exc


def _to_text(card: Card) -> str:
    return json.dumps(card, sort_keys=True, ensure_ascii=False)


def _task(adapter: Adapter) -> Task:
    return {
        "name": adapter.task,
        "class_names": list(adapter.class_names),
        "templates": list(adapter.templates),
        "accuracy": {
            "before": adapter.accuracy.get("before", {}).get(adapter.task),
            "after": adapter.accuracy.get("after", {}).get(adapter.task),
        },
        "adapter_sha256": adapter.sha256,
    }
