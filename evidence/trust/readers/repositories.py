"""Readers of model repositories: manifests, histories, cards and ONNX files."""

from __future__ import annotations

import json
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from clipweld.client._card import read_card
from clipweld.client.errors import ClientError
from clipweld.exporter.errors import RepositoryError
from clipweld.exporter.store.card import card_model
from clipweld.exporter.store.foreign import foreign_entries
from clipweld.exporter.store.manifest import check_files, to_text
from clipweld.exporter.store.repository import KINDS, Repository
from clipweld.exporter.tables import summaries
from clipweld.trainer.schemas import sha256_of
from evidence.trust.mutations import corrupted_bytes, corrupted_json, json_text
from evidence.trust.readers.reader import OtherMeaning, Reader, write_json


class Store(Reader):
    """A repository with one version of tiny models. Each ``spoil`` replaces what the last one corrupted."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.repository = Repository(folder / "models", "clip")
        self.card = {
            "format": 1, "model": "clip", "version": 1,
            "image": {"size": 64, "resize_mode": "shortest", "interpolation": "bicubic"},
            "text": {"context_length": 24, "tokenizer_sha256": "ab" * 32}, "embed_dim": 8, "logit_scale": 100.0,
            "logit_bias": None, "base": {"model_name": "mini", "pretrained": "mini", "fingerprint": "cd" * 32},
            "tasks": [{
                "name": "birds", "class_names": ["cat", "dög"], "templates": ["a {}"],
                "accuracy": {"before": 10.0, "after": None}, "adapter_sha256": "ef" * 32,
            }],
        }  # fmt: skip
        for kind in KINDS:
            self._file(kind).parent.mkdir(parents=True)
            onnx.save(card_model(self.card) if kind == "card" else small_model(), self._file(kind))
            standing = self.repository.model(kind) / "1"
            standing.mkdir(parents=True)
            os.link(self._file(kind), standing / "model.onnx")
        parity = {"image_max_abs": 1e-6, "text_max_abs": 1e-6, "cosine_min": 1.0, "top1_agreement": 1.0}
        self.manifest = {
            "format": 1, "model": "clip", "version": 1, "date": "2026-01-01T00:00:00+00:00",
            "base": {**self.card["base"], "architecture": "mini"}, "lineage": [{"task": "birds", "sha256": "ef" * 32}],
            "accuracy": [{"task": "birds", "before": None, "after": 90.5, "measured": "training"}], "forced": ["x"],
            "unmerged": False, "precision": "fp32", "opset": 18, "parity": parity,
            "cast": {"parity": parity, "agreement": [{"task": "birds", "top1": 1.0, "images": 4}]},
            "files": {
                kind: {"sha256": sha256_of(file), "bytes": file.stat().st_size}
                for kind, file in ((kind, self._file(kind)) for kind in KINDS)
            },
            "tools": {"python": "3.11"},
        }  # fmt: skip
        self.repository.manifest_file(1).write_text(to_text(self.manifest), encoding="utf-8")
        for kind in KINDS:
            os.link(self.repository.manifest_file(1), self.repository.model(kind) / "1" / "manifest.json")

    def _file(self, kind: str) -> Path:
        return self.repository.file(kind, 1)

    def _check_same(self, said: str | bytes, found: Any) -> None:
        if json.loads(said) != found:
            raise OtherMeaning("it was read as something else than it says")


class Manifests(Store):
    """``manifest.json``, which is read and shown, and used to check the files of its version."""

    def spoil(self, draw: random.Random) -> int:
        return write_json(self.repository.manifest_file(1), self.manifest, draw)

    def read(self) -> None:
        found = self.repository.manifest(1)
        self._check_same(self.repository.manifest_file(1).read_bytes(), found)
        json.dumps(summaries(self.repository), allow_nan=False)
        check_files(self.repository, 1)


class Histories(Store):
    """``history.json``."""

    def spoil(self, draw: random.Random) -> int:
        return write_json(self.repository.store / "history.json", {"now": [1, 2, 1], "next": [1, 2]}, draw)

    def read(self) -> None:
        found = self.repository.history()
        said = json.loads((self.repository.store / "history.json").read_bytes())
        if found not in (said["now"], said["next"], [*said["now"], 1]):
            raise OtherMeaning("it was read as something else than it says")


class Cards(Store):
    """A card with corrupted JSON in its ONNX file, which may be damaged too; the client reads the same JSON."""

    def spoil(self, draw: random.Random) -> int:
        model = card_model(self.card)
        self._text = json_text(corrupted_json(self.card, draw), draw).encode("utf-8", "surrogatepass")
        cards = next(tensor for tensor in model.graph.initializer if tensor.name == "cards")
        cards.string_data[0] = self._text
        if draw.random() < 0.1:
            outside(draw.choice(model.graph.initializer), draw)
        content = model.SerializeToString()
        content = corrupted_bytes(content, draw) if draw.random() < 0.3 else content
        self._file("card").write_bytes(content)
        return len(content)

    def read(self) -> None:
        with suppress(ClientError):
            read_card(self._text, "a server")
        self.repository.card(1)


class Models(Store):
    """ONNX towers and folders of versions: damaged files, data in other files, links, pipes, and odd version names."""

    def spoil(self, draw: random.Random) -> int:
        shutil.rmtree(self.folder)
        Store.__init__(self, self.folder)
        self._elsewhere = self.folder / "elsewhere"
        file, secret = self._file("image"), self.folder / "secret"
        secret.write_bytes(bytes(64))
        model = onnx.load(file)
        version = self.repository.store / "1"
        way = draw.randrange(6)
        if way == 0:
            outside(draw.choice(model.graph.initializer), draw)
            file.write_bytes(model.SerializeToString())
        elif way == 1:
            file.write_bytes(corrupted_bytes(file.read_bytes(), draw))
        elif way == 2:
            file.unlink()
            draw.choice((lambda: file.symlink_to(secret), lambda: os.mkfifo(file), file.mkdir))()
        elif way == 3:
            name = draw.choice(("0", "0007", "²", "٣", "1" * 30, "-1", "1.", "1 ", "1\n", "+1", "0x1"))
            shutil.copytree(version, version.with_name(name))
        elif way == 4:
            version.rename(self._elsewhere)
            version.symlink_to(self._elsewhere)
        else:
            part = draw.choice((version / "image", self.repository.model("image"), self.repository.model("card") / "1"))
            part.rename(self._elsewhere)
            part.symlink_to(self._elsewhere)
        if way < 2:  # the manifest is untrusted too
            self.manifest["files"]["image"] = {"sha256": sha256_of(file), "bytes": file.stat().st_size}
            self.repository.manifest_file(1).write_text(to_text(self.manifest), encoding="utf-8")
        return 1 << 16

    def read(self) -> None:
        versions, standing = self.repository.versions(), self.repository.standing()
        foreign = [str(entry.path) for entry in foreign_entries(self.repository)]
        if versions == standing == [1]:
            check_files(self.repository, 1)
        elif {*versions, *standing} <= {1} and foreign:
            raise RepositoryError(f"no version, but foreign: {foreign}")
        else:
            raise OtherMeaning(f"versions {versions}, standing {standing}, foreign {foreign}")


def small_model() -> onnx.ModelProto:
    """Return an ONNX model with one tensor."""
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], np.ones(1, np.float32).tobytes(), raw=True)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "one"], ["y"])], "small", ends[:1], ends[1:], [one])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def outside(tensor: TensorProto, draw: random.Random) -> None:
    """Move a tensor's data to another file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    location = draw.choice(("secret", "../secret", "../../../../secret", "/etc/passwd", "/dev/zero", "\x00"))
    for key, value in (("location", location), ("length", draw.choice(("4", "99999999999", "-1", "x")))):
        tensor.external_data.add(key=key, value=value)
