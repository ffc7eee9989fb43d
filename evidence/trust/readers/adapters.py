"""Readers of adapters, and of the names of adapters and repositories."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipweld.exporter.store.repository import Repository
from clipweld.trainer.adapters.adapter import Adapter, Moved, load_adapter, save_adapter
from clipweld.trainer.adapters.merge import delta_weight
from clipweld.trainer.tasks import find_learned
from evidence.trust.mutations import (
    NASTY,
    corrupted_bytes,
    corrupted_header,
    corrupted_json,
    corrupted_tensors,
    safetensors_file,
    sealed_file,
    split_safetensors,
)
from evidence.trust.readers.reader import REFUSALS, OtherMeaning, Reader


def tiny_adapter() -> Adapter:
    """Return a valid adapter of a few hundred bytes."""
    drawn = torch.Generator().manual_seed(0)
    shapes = {"m.lora_A": (2, 3), "m.lora_B": (4, 2), "m.inputs": (2, 3)}
    return Adapter(
        task="birds", class_names=("cat", "dög"), templates=("a photo of a {}",), model_name="mini", pretrained="mini",
        base_fingerprint="ab" * 32, parents=("cd" * 32,), scaling=0.5, seed=1,
        accuracy={"before": {"birds": 10.0}, "after": {"birds": 90.5}}, config={"lr": 0.1, "source": "birds"},
        activation_counts={"m": [3, 4]},
        tensors={name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()},
        moved=Moved(words_mean=0.25, words_p95=0.5, images_kl=0.125, names_mean=8.0),
    )  # fmt: skip


class Adapters(Reader):
    """Damaged adapters, and adapters with a fitting hash whose content ``fit`` would never write."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._file, self._again = folder / "birds.safetensors", folder / "again"
        self._whole = tiny_adapter()
        save_adapter(self._whole, self._file)
        self._content = self._file.read_bytes()
        self._tensors = {name: tensor.numpy() for name, tensor in self._whole.tensors.items()}
        self._metadata = json.loads(json.dumps(self._whole.metadata()))
        self._sealed = False

    def spoil(self, draw: random.Random) -> int:
        way = draw.randrange(100)
        self._sealed = way < 60
        if way < 40:
            content = self._seal(corrupted_json(self._metadata, draw), self._tensors, draw)
        elif way < 59:
            content = self._seal(self._metadata, corrupted_tensors(self._tensors, draw), draw)
        elif way < 60:
            content = self._large(draw)
        elif way < 85:
            content = corrupted_bytes(self._content, draw)
        else:
            content = corrupted_header(self._content, draw)
        self._file.write_bytes(content)
        return len(content)

    def _seal(self, metadata: Any, tensors: dict[str, np.ndarray], draw: random.Random) -> bytes:
        return sealed_file(metadata, tensors, draw)

    def _large(self, draw: random.Random) -> bytes:
        """Return a file of up to megabytes, whose content takes more space in memory than on disk."""
        many = draw.choice((10**4, 3 * 10**5))
        name, filler = draw.choice((("config", {}), ("class_names", "a"), ("class_names", []), ("parents", 0)))
        if draw.random() < 0.5:
            return self._seal(self._metadata | {name: [filler] * many}, self._tensors, draw)
        if draw.random() < 0.5:
            counts = {str(number): [number] for number in range(many // 2)}
            return self._seal(self._metadata | {"activation_counts": counts}, self._tensors, draw)
        empty = {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}
        return safetensors_file({f"{n}.lora_A": empty for n in range(many // 3)}, b"")

    def read(self) -> None:
        found = load_adapter(self._file)
        save_adapter(found, self._again)
        if load_adapter(self._again).sha256 != found.sha256:
            raise OtherMeaning("saved again it is another adapter")
        if not self._sealed and found.sha256 != self._whole.sha256:
            raise OtherMeaning("it was damaged, and is another adapter")
        header, _ = split_safetensors(self._file.read_bytes())
        said = json.loads(header["__metadata__"]["clipweld"])
        del said["sha256"]
        if said != json.loads(json.dumps(found.metadata())):
            raise OtherMeaning("its metadata is not what the file says")
        if not (self.folder / f"{found.task}.safetensors").resolve().parent == self.folder.resolve():
            raise OtherMeaning("its task's name leads out of the folder")
        if not all(tensor.isfinite().all() for tensor in found.tensors.values()):
            raise OtherMeaning("it has numbers that are none")
        for module in found.modules():
            delta_weight(*found.experts(module), found.scaling)
        find_learned(found, self.folder)


class Names(Reader):
    """Names of tasks and of models."""

    PARTS = (
        "a", "clip", "..", ".", "/", "\\", "\x00", "\n", " ", "-", "_", "²", "ä", "\ud800", "\u202e", "~", "$(x)", "1",
    )  # fmt: skip

    def spoil(self, draw: random.Random) -> int:
        self._name = draw.choice(
            ("".join(draw.choices(self.PARTS, k=draw.randrange(6))), str(draw.choice(NASTY)), "a" * draw.randrange(400))
        )
        return len(self._name)

    def read(self) -> None:
        whole = tiny_adapter()
        refused = []
        for make in (
            lambda: self._within(Repository(self.folder / "models", self._name).store, self.folder / "models.store"),
            lambda: save_adapter(replace(whole, task=self._name), self.folder / "named"),
        ):
            try:
                make()
            except (*REFUSALS, UnicodeEncodeError) as exc:  # a name that can't be encoded can't occur in a file
                refused.append(exc)
        if (self.folder / "named").exists():
            try:
                task = load_adapter(self.folder / "named").task
                self._within(self.folder / f"{task}.safetensors", self.folder)
            except REFUSALS as exc:
                refused.append(exc)
            (self.folder / "named").unlink(missing_ok=True)
        for exc in refused:
            if isinstance(exc, REFUSALS):
                raise exc

    def _within(self, path: Path, parent: Path) -> None:
        if path.resolve().parent != parent.resolve():
            raise OtherMeaning(f"{self._name!r} leads to {path}")
