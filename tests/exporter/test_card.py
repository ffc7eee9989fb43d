"""The card holds everything that a client must know about a version."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import onnxruntime
import open_clip
import pytest
from open_clip.tokenizer import HFTokenizer

from clipweld.exporter.errors import RepositoryError, UnsupportedModel
from clipweld.exporter.graph.onnx_file import to_bytes
from clipweld.exporter.store.card import card_model, describe, read_card
from clipweld.trainer.schemas import MAX_VALUES


def test_the_card_of_a_merged_version(mini, make_adapter):
    adapter = make_adapter("digits")
    card = describe("clip", 2, mini, [adapter])
    assert card == {
        "format": 1,
        "model": "clip",
        "version": 2,
        "image": {"size": 64, "resize_mode": "shortest", "interpolation": "bicubic"},
        "text": {"context_length": 24, "tokenizer_sha256": card["text"]["tokenizer_sha256"]},
        "embed_dim": 192,
        "logit_scale": pytest.approx(mini.model.logit_scale.exp().item()),
        "logit_bias": None,
        "base": {"model_name": "mini", "pretrained": "mini", "fingerprint": mini.fingerprint},
        "tasks": [
            {
                "name": "digits",
                "class_names": ["cat", "dög"],
                "templates": ["a photo of a {}"],
                "accuracy": {"before": 10.0, "after": 90.0},
                "adapter_sha256": adapter.sha256,
            }
        ],
    }


def test_the_tokenizer_is_identified_by_the_hash_of_its_decompressed_vocabulary(mini):
    import gzip

    from open_clip.tokenizer import default_bpe

    with gzip.open(default_bpe()) as file:
        want = hashlib.sha256(file.read()).hexdigest()
    assert describe("clip", 1, mini, [])["text"]["tokenizer_sha256"] == want


@pytest.mark.parametrize("batch", [1, 3])
def test_the_card_model_returns_the_json_for_any_index(mini, make_adapter, tmp_path, batch):
    card = describe("clip", 7, mini, [make_adapter("pets")])
    content = to_bytes(card_model(card))
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    index = np.arange(-1, batch - 1, dtype=np.int32).reshape(-1, 1) * 5
    answer = session.run(None, {"index": index})[0]
    assert answer.shape == (batch, 1)
    assert all(json.loads(text) == card for text in answer.ravel())
    (tmp_path / "model.onnx").write_bytes(content)
    assert read_card(tmp_path / "model.onnx") == card


def test_other_tokenizers_are_refused_by_name(mini):
    foreign = object.__new__(HFTokenizer)
    with pytest.raises(UnsupportedModel, match="HFTokenizer"):
        describe("clip", 1, replace(mini, tokenizer=foreign), [])
    case = open_clip.SimpleTokenizer(context_length=24, clean="whitespace")
    with pytest.raises(UnsupportedModel, match="lower case"):
        describe("clip", 1, replace(mini, tokenizer=case), [])


def test_other_resize_modes_are_refused_by_name(mini):
    with pytest.raises(UnsupportedModel, match="'longest'"):
        describe("clip", 1, replace(mini, resize_mode="longest"), [])


def test_a_card_too_large_to_be_read_again_is_not_written(mini, make_adapter):
    wide = replace(make_adapter("birds"), class_names=tuple(map(str, range(MAX_VALUES // 2))))
    describe("clip", 2, mini, [wide])
    with pytest.raises(UnsupportedModel, match=r"the card of clip could not be read again .* merge fewer tasks"):
        describe("clip", 2, mini, [wide, wide])


@pytest.mark.parametrize("content", [b"", b"not onnx", None])
def test_a_file_that_is_not_a_card_is_refused(tmp_path, content):
    file = tmp_path / "model.onnx"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RepositoryError, match=r"model\.onnx: (can.t be read|not ONNX)"):
        read_card(file)


def test_a_card_of_a_later_format_is_refused(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(to_bytes(card_model({"format": 2})))
    with pytest.raises(RepositoryError, match="its fields are not those of this clipweld's format"):
        read_card(file)
