"""Readers of files that training reads (checkpoints, weights, image folders), and of its records for reports."""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric.plugins.precision import MixedPrecision
from PIL import Image
from safetensors.numpy import load_file

from clipweld.trainer.base.backbone import load_backbone
from clipweld.trainer.learning.checkpoint import Checkpoint
from clipweld.trainer.report.runs import read_runs
from clipweld.trainer.tasks import load_task
from evidence.trust.mutations import (
    corrupted_bytes,
    corrupted_header,
    corrupted_json,
    json_text,
    safetensors_file,
    sealed_file,
    split_safetensors,
)
from evidence.trust.readers.reader import OtherMeaning, Reader, write_json


class Checkpoints(Reader):
    """Checkpoints of interrupted training."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._layer = torch.nn.Linear(3, 2)
        self._optimizer = torch.optim.AdamW(self._layer.parameters())
        self._layer(torch.ones(1, 3)).sum().backward()
        self._optimizer.step()
        self._checkpoint = Checkpoint(
            folder / "unfinished", {"task": "birds", "lr": 0.1}, MixedPrecision("16-mixed", "cpu")
        )
        self._checkpoint._next_save = 0
        self._checkpoint.save_when_due(1, 2.0, self, self._optimizer)
        self._content = self._checkpoint.path.read_bytes()
        self._tensors = load_file(self._checkpoint.path)
        self._sealed = False

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self._layer.named_parameters())

    def spoil(self, draw: random.Random) -> int:
        way = draw.randrange(3)
        self._sealed = way == 0
        if way == 0:
            header, _ = split_safetensors(self._content)
            metadata = json.loads(header["__metadata__"]["clipweld"])
            del metadata["sha256"]
            content = sealed_file(corrupted_json(metadata, draw), self._tensors, draw)
        elif way == 1:
            content = corrupted_bytes(self._content, draw)
        else:
            content = corrupted_header(self._content, draw)
        self._checkpoint.path.write_bytes(content)
        return len(content)

    def read(self) -> None:
        progress = self._checkpoint.load(self, self._optimizer)
        loaded = all(np.array_equal(self._tensors[f"trainee.{name}"], now) for name, now in self.arrays())
        if not self._sealed and not (loaded and progress == (1, 2.0)):
            raise OtherMeaning("it was damaged, and is other training")
        self._optimizer.step()

    def arrays(self) -> list[tuple[str, np.ndarray]]:
        return [(name, tensor.detach().numpy()) for name, tensor in self.state().items()]


class Runs(Reader):
    """``sequence.json`` as read by ``trainer report``."""

    def spoil(self, draw: random.Random) -> int:
        result = {
            "method": "pool", "tasks": ["a", "b"], "tested": ["a", "b"], "label_space": "task", "seed": 1,
            "zero_shot": [1.0, 2.0], "matrix": [[3.0, 2.0], [3.0, 4.0]], "transfer": 2.0, "average": 3.0, "last": 3.5,
            "forgetting": 0.0, "trainable_parameters": 5, "kept_parameters": 4, "seconds_per_task": [1.0, 1.0],
        }  # fmt: skip
        record = {
            "model": "mini", "pretrained": "mini", "base_fingerprint": "ab" * 32, "method": "pool", "tasks": ["a", "b"],
            "watch": [], "sources": ["x", "y"], "order_seed": None, "devices": 1, "precision": None,
            "config": {"lr": 0.1, "seed": 1},
            "results": {"task": result, "union": result | {"label_space": "union"}},
        }  # fmt: skip
        return write_json(self.folder / "sequence.json", record, draw)

    def read(self) -> None:
        read_runs(self.folder)


class Weights(Reader):
    """Checkpoints of open_clip: pickles that run code, zip bombs, and tensors whose data is missing."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._whole = load_backbone("mini").model.state_dict()
        self._small = {name: tensor for name, tensor in self._whole.items() if tensor.numel() < 1000}
        self._canary = folder / "canary"

    def spoil(self, draw: random.Random) -> int:
        for path in self.folder.iterdir():
            path.unlink()
        self._file = self.folder / f"w.{draw.choice(('pt', 'bin', 'pth', 'safetensors', 'npz', 'npy'))}"
        way = draw.randrange(7)
        state = dict(self._whole if way == 6 else self._small)
        if way == 0:
            state[draw.choice(list(state))] = draw.choice((Leaves(self._canary), torch.zeros(1).expand(2**40), 7, None))
        if way == 1:
            state["visual.positional_embedding"] = torch.zeros(1, 1).expand(10**6, draw.choice((192, 10**5)))
        torch.save(state, self._file, _use_new_zipfile_serialization=draw.random() < 0.7)
        content = self._file.read_bytes()
        if way == 2 and zipfile.is_zipfile(self._file):
            content = _deflated(self._file, self.folder / "deflated")
        elif way == 3:
            archive = torch.jit.script(torch.nn.Linear(2, 2))
            torch.jit.save(archive, str(self._file))
            content = self._file.read_bytes()
        elif way == 4:
            header = {"visual.proj": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 8]}}
            content = safetensors_file(header, bytes(8))
        elif way == 5:
            beside = json_text(corrupted_json({"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {}}, draw), draw)
            (self.folder / "open_clip_config.json").write_text(beside, encoding="utf-8", errors="surrogatepass")
        if way > 2 and draw.random() < 0.5:
            content = corrupted_bytes(content, draw)
        self._file.write_bytes(content)
        return len(content)

    def read(self) -> None:
        try:
            load_backbone("mini", str(self._file))
        finally:
            if self._canary.exists():
                self._canary.unlink()
                raise OtherMeaning("it was run")


class Leaves:
    """An object that creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self._target = str(target)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self._target, "w")


class Folders(Reader):
    """Image folders with circular links, pipes, names that aren't text, and invalid lists of classes."""

    def spoil(self, draw: random.Random) -> int:
        self._root, self._secret = self.folder / "birds", self.folder / "secret"
        self._secret.write_text("secret")
        shutil.rmtree(self._root, ignore_errors=True)
        for split in ("train", "test"):
            for name in ("one", "two"):
                (self._root / split / name).mkdir(parents=True)
                Image.new("RGB", (8, 8)).save(self._root / split / name / "1.png")
        place = self._root / draw.choice(("train", "test")) / draw.choice(("one", "two"))
        image = place / "2.jpg"
        lists = self._root / draw.choice(("classes.txt", "templates.txt"))
        texts = ("one\ntwo", "a {}", "\x1b[2J {}\nb", "{} {}", "one\none", "", "\u2028", "a\x00b {}\nc")
        corrupted: tuple[Callable[[], Any], ...] = (
            lambda: (place / "loop").symlink_to(self._root),
            lambda: (place / "loop").symlink_to("."),
            lambda: os.mkfifo(image),
            lambda: image.symlink_to("/dev/zero"),
            lambda: image.symlink_to(image.name),
            lambda: image.symlink_to(self._secret),
            image.mkdir,
            lambda: _create(image, draw.randbytes(100)),
            lambda: _create(place / os.fsdecode(b"\xff\xfe.png"), b"x"),
            lambda: _create(place / "a\nb\x1b[2J.png", b"x"),
            lambda: os.mkdir(os.fsencode(self._root / "train") + b"/\xff"),
            lambda: place.rename(place.with_name("a\nb")),
            lambda: _create(lists, draw.choice((b"\xff\xfe", draw.choice(texts).encode(), bytes(10)))),
            lambda: os.mkfifo(lists),
            lambda: lists.symlink_to("/dev/zero"),
            lists.mkdir,
            lambda: _create(lists, b"", 1 << 40),
            lambda: shutil.rmtree(place),
            lambda: shutil.rmtree(place.parent),
        )
        for _ in range(draw.choice((1, 1, 2))):
            try:
                draw.choice(corrupted)()
            except OSError:  # the first change may have removed the place of the second
                continue
        return 1 << 20

    def read(self) -> None:
        task = load_task(str(self._root))
        for split in ("train", "test"):
            images = task.load(split)
            if len(images) > 4:
                raise OtherMeaning(f"{len(images)} images where there are four at most")
            for _ in images:
                pass


def _deflated(archive: Path, target: Path) -> bytes:
    """Return the same archive with compressed entries, and with an entry of 10 MiB of zeros added."""
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as smaller:
        for name in whole.namelist():
            smaller.writestr(name, whole.read(name))
        smaller.writestr(f"{whole.namelist()[0].split('/')[0]}/data/99", bytes(10 << 20))
    return target.read_bytes()


def _create(file: Path, content: bytes, size: int = 0) -> None:
    """Create a file, sparse up to ``size`` bytes. Mode "x" never writes through an existing link or into a pipe."""
    with file.open("xb") as opened:
        opened.write(content)
        if size:
            opened.truncate(size)
