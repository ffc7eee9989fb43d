"""Everything that reads files which may come from anyone, each with whole files to spoil.

A reader puts a spoilt file into a folder of its own and reads it as the product does. It returns whether the file was
accepted; refusals are errors of the product's families. What is accepted must mean what its bytes say: else it raises
``OtherMeaning``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from lightning_fabric.plugins.precision import MixedPrecision
from onnx import TensorProto, helper
from PIL import Image

from client._card import read_card
from client._files import ResultsFile
from client.errors import ClientError
from exporter.card import card_model
from exporter.errors import ExporterError
from exporter.manifest import check_files, hash_of, to_text
from exporter.printing import summary
from exporter.repository import KINDS, Repository
from trainer import adapter as adapters
from trainer.adapter import Adapter, load_adapter, save_adapter
from trainer.backbone import load_backbone
from trainer.checkpoint import Checkpoint
from trainer.errors import TrainerError
from trainer.merge import delta_weight
from trainer.report.runs import read_runs
from trainer.tasks import find_learned, load_task
from trust.mutations import (
    NASTY,
    json_text,
    safetensors_file,
    sealed_adapter,
    split_safetensors,
    spoilt_bytes,
    spoilt_header,
    spoilt_json,
    spoilt_tensors,
)

REFUSALS = (TrainerError, ExporterError, ClientError)


class OtherMeaning(Exception):
    """A file was accepted as something that it doesn't say."""


class Reader(ABC):
    """One kind of file.

    Args:
        folder: empty, to work in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def spoil(self, draw: random.Random) -> int:
        """Put a spoilt file in place; its size in bytes."""

    @abstractmethod
    def read(self) -> None:
        """Read it as the product does.

        Raises:
            REFUSALS: it is refused.
            OtherMeaning: it is accepted for what it isn't.
        """


def tiny_adapter() -> Adapter:
    """A whole adapter of a few hundred bytes."""
    drawn = torch.Generator().manual_seed(0)
    shapes = {"m.lora_A": (2, 3), "m.lora_B": (4, 2), "m.inputs": (2, 3)}
    return Adapter(
        task="birds", class_names=("cat", "dög"), templates=("a photo of a {}",), model_name="mini", pretrained="mini",
        base_fingerprint="ab" * 32, parents=("cd" * 32,), scaling=0.5, seed=1,
        accuracy={"before": {"birds": 10.0}, "after": {"birds": 90.5}}, config={"lr": 0.1, "source": "birds"},
        activation_counts={"m": [3, 4]},
        tensors={name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()},
    )  # fmt: skip


class Adapters(Reader):
    """Damaged adapters, and those whose writer sealed what no fit writes."""

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
            content = self._seal(spoilt_json(self._metadata, draw), self._tensors, draw)
        elif way < 59:
            content = self._seal(self._metadata, spoilt_tensors(self._tensors, draw), draw)
        elif way < 60:
            content = self._large(draw)
        elif way < 85:
            content = spoilt_bytes(self._content, draw)
        else:
            content = spoilt_header(self._content, draw)
        self._file.write_bytes(content)
        return len(content)

    def _seal(self, metadata: Any, tensors: dict[str, np.ndarray], draw: random.Random) -> bytes:
        return sealed_adapter(metadata, tensors, draw, adapters.FORMAT)

    def _large(self, draw: random.Random) -> bytes:
        """Megabytes, of what takes more memory than room on disk."""
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
        del said["sha256"], said["format"]
        if said != json.loads(json.dumps(found.metadata())):
            raise OtherMeaning("its metadata is not what the file says")
        if not (self.folder / f"{found.task}.safetensors").resolve().parent == self.folder.resolve():
            raise OtherMeaning("its task's name leads out of the folder")
        if not all(tensor.isfinite().all() for tensor in found.tensors.values()):
            raise OtherMeaning("it has numbers that are none")
        for module in found.modules():
            delta_weight(*found.experts(module), found.scaling)
        find_learned(found, self.folder)


class Store(Reader):
    """A repository with one version, of tiny models; what is spoilt is put back before the next."""

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
                kind: {"sha256": hash_of(self._file(kind)), "bytes": self._file(kind).stat().st_size} for kind in KINDS
            },
            "tools": {"python": "3.11"},
        }  # fmt: skip
        self.repository.manifest_file(1).write_text(to_text(self.manifest), encoding="utf-8")

    def _file(self, kind: str) -> Path:
        return self.repository.file(kind, 1)

    def _check_same(self, said: str | bytes, found: Any) -> None:
        if json.loads(said) != found:
            raise OtherMeaning("it was read as something else than it says")


class Manifests(Store):
    """``manifest.json``: read, shown, and the files it names checked."""

    def spoil(self, draw: random.Random) -> int:
        return _write_json(self.repository.manifest_file(1), self.manifest, draw)

    def read(self) -> None:
        found = self.repository.manifest(1)
        self._check_same(self.repository.manifest_file(1).read_bytes(), found)
        json.dumps(summary(self.repository, 1), allow_nan=False)
        check_files(self.repository, 1)


class Histories(Store):
    """``history.json``."""

    def spoil(self, draw: random.Random) -> int:
        return _write_json(self.repository.store / "history.json", {"now": [1, 2, 1], "next": [1, 2]}, draw)

    def read(self) -> None:
        found = self.repository.history()
        said = json.loads((self.repository.store / "history.json").read_bytes())
        if found not in (said["now"], said["next"], [*said["now"], 1]):
            raise OtherMeaning("it was read as something else than it says")


class Cards(Store):
    """A card in its ONNX file: JSON of any kind, and damaged ONNX; and the same JSON as the client gets it."""

    def spoil(self, draw: random.Random) -> int:
        model = card_model(self.card)
        self._text = json_text(spoilt_json(self.card, draw), draw).encode("utf-8", "surrogatepass")
        cards = next(tensor for tensor in model.graph.initializer if tensor.name == "cards")
        cards.string_data[0] = self._text
        if draw.random() < 0.1:
            outside(draw.choice(model.graph.initializer), draw)
        content = model.SerializeToString()
        content = spoilt_bytes(content, draw) if draw.random() < 0.3 else content
        self._file("card").write_bytes(content)
        return len(content)

    def read(self) -> None:
        with suppress(ClientError):
            read_card(self._text, "a server")
        self.repository.card(1)


class Models(Store):
    """ONNX towers and folders of versions: damaged files, data in other files, links, pipes and odd numbers."""

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
            file.write_bytes(spoilt_bytes(file.read_bytes(), draw))
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
        if way < 2:  # the manifest is the stranger's too
            self.manifest["files"]["image"] = {"sha256": hash_of(file), "bytes": file.stat().st_size}
            self.repository.manifest_file(1).write_text(to_text(self.manifest), encoding="utf-8")
        return 1 << 16

    def read(self) -> None:
        if self.repository.versions() != [1] or self.repository.standing() != [1]:
            raise OtherMeaning(f"versions {self.repository.versions()}, standing {self.repository.standing()}")
        check_files(self.repository, 1)


class Names(Reader):
    """Names of tasks, models and versions."""

    PARTS = (
        "a",
        "clip",
        "..",
        ".",
        "/",
        "\\",
        "\x00",
        "\n",
        " ",
        "-",
        "_",
        "²",
        "ä",
        "\ud800",
        "\u202e",
        "~",
        "$(x)",
        "1",
    )

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
            except (*REFUSALS, UnicodeEncodeError) as exc:  # what can't be encoded can't be in a file
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


class Checkpoints(Reader):
    """Training that was interrupted."""

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

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self._layer.named_parameters())

    def spoil(self, draw: random.Random) -> int:
        way = draw.randrange(3)
        if way == 0:
            content = spoilt_bytes(self._content, draw)
        elif way == 1:
            content = spoilt_header(self._content, draw)
        else:
            header, data = split_safetensors(self._content)
            metadata = json.loads(header["__metadata__"]["clipweld"])
            header["__metadata__"] = {"clipweld": json_text(spoilt_json(metadata, draw), draw)}
            content = safetensors_file(header, data)
        self._checkpoint.path.write_bytes(content)
        return len(content)

    def read(self) -> None:
        self._checkpoint.load(self, self._optimizer)
        self._optimizer.step()


class Runs(Reader):
    """``sequence.json``, as reports read it."""

    def spoil(self, draw: random.Random) -> int:
        result = {
            "method": "pool", "tasks": ["a", "b"], "tested": ["a", "b"], "label_space": "task", "seed": 1,
            "zero_shot": [1.0, 2.0], "matrix": [[3.0, 2.0], [3.0, 4.0]], "transfer": 2.0, "average": 3.0, "last": 3.5,
            "forgetting": 0.0, "trainable_parameters": 5, "kept_parameters": 4, "seconds_per_task": [1.0, 1.0],
        }  # fmt: skip
        record = {
            "model": "mini", "pretrained": "mini", "base_fingerprint": "ab" * 32, "method": "pool", "tasks": ["a", "b"],
            "watch": [], "sources": ["x", "y"], "order_seed": None, "devices": 1, "config": {"lr": 0.1, "seed": 1},
            "results": {"task": result, "union": result | {"label_space": "union"}},
        }  # fmt: skip
        return _write_json(self.folder / "sequence.json", record, draw)

    def read(self) -> None:
        read_runs(self.folder)


class Results(Reader):
    """What an interrupted ``client classify --out`` left."""

    QUESTION: ClassVar = {"labels": ["cat", "dog"], "top_k": 2}

    def spoil(self, draw: random.Random) -> int:
        for path in self.folder.iterdir():
            path.unlink()
        rows: list[Any] = [{"clipweld results": 1, "question": self.QUESTION}]
        for number in range(3):
            predictions = [{"label": label, "probability": 0.5, "score": 0.1} for label in ("cat", "dog")]
            rows.append({"image": f"{number}.png", "version": 2, "predictions": predictions})
        rows.append({"image": "4.png", "error": "4.png is not an image"})
        place = draw.randrange(len(rows))
        texts = [json_text(row, random.Random(0)).replace("\n", " ") for row in rows]
        texts[place] = json_text(spoilt_json(rows[place], draw), draw)
        content = "".join(f"{text}\n" for text in texts).encode("utf-8", "surrogatepass")
        content = spoilt_bytes(content, draw) if draw.random() < 0.4 else content
        self._out = self.folder / f"out{draw.choice(('.csv', '.jsonl', '.parquet'))}"
        self._out.with_name(f"{self._out.name}.part").write_bytes(content)
        return len(content)

    def read(self) -> None:
        with ResultsFile(self._out, self.QUESTION) as results:
            results.finish()
        if not self._out.is_file():
            raise OtherMeaning("nothing was written")


class Weights(Reader):
    """Checkpoints of open_clip: pickles that run, archives that swell, tensors that aren't there."""

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
            beside = json_text(spoilt_json({"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {}}, draw), draw)
            (self.folder / "open_clip_config.json").write_text(beside, encoding="utf-8", errors="surrogatepass")
        if way > 2 and draw.random() < 0.5:
            content = spoilt_bytes(content, draw)
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
    """Unpickled, it writes a file."""

    def __init__(self, target: Path) -> None:
        self._target = str(target)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self._target, "w")


class Folders(Reader):
    """Trees of images: links in circles, pipes, names that are no text, lists of classes that are none."""

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
        spoilt: tuple[Callable[[], Any], ...] = (
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
                draw.choice(spoilt)()
            except OSError:  # the second has no place left
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


def small_model() -> onnx.ModelProto:
    """ONNX with one tensor."""
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], np.ones(1, np.float32).tobytes(), raw=True)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "one"], ["y"])], "small", ends[:1], ends[1:], [one])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def outside(tensor: TensorProto, draw: random.Random) -> None:
    """Have a tensor's data be in another file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    location = draw.choice(("secret", "../secret", "../../../../secret", "/etc/passwd", "/dev/zero", "\x00"))
    for key, value in (("location", location), ("length", draw.choice(("4", "99999999999", "-1", "x")))):
        tensor.external_data.add(key=key, value=value)


@contextmanager
def reader(kind: type[Reader], folder: Path) -> Iterator[Reader]:
    """A reader in a folder that is removed at the end."""
    folder.mkdir(parents=True)
    try:
        yield kind(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_json(file: Path, value: Any, draw: random.Random) -> int:
    """A file of JSON that is spoilt, as JSON mostly, else as bytes."""
    if draw.random() < 0.8:
        content = json_text(spoilt_json(value, draw), draw).encode("utf-8", "surrogatepass")
    else:
        content = spoilt_bytes(json.dumps(value).encode(), draw)
    if draw.random() < 0.005:
        content = b" " * (5 << 20)
    file.write_bytes(content)
    return len(content)


def _deflated(archive: Path, target: Path) -> bytes:
    """The same archive, its entries compressed, one of them ten megabytes of nothing."""
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as smaller:
        for name in whole.namelist():
            smaller.writestr(name, whole.read(name))
        smaller.writestr(f"{whole.namelist()[0].split('/')[0]}/data/99", bytes(10 << 20))
    return target.read_bytes()


def _create(file: Path, content: bytes, size: int = 0) -> None:
    """A new file, sparse up to a size: never through a link or into a pipe that stands there already."""
    with file.open("xb") as opened:
        opened.write(content)
        if size:
            opened.truncate(size)


READERS: dict[str, type[Reader]] = {
    "adapters": Adapters, "manifests": Manifests, "histories": Histories, "cards": Cards, "models": Models,
    "names": Names, "checkpoints": Checkpoints, "runs": Runs, "results": Results, "weights": Weights,
    "folders": Folders,
}  # fmt: skip
