"""Versions on disk: three models, one number, written whole or not at all.

A version counts once its card is there. It is staged in a hidden folder beside the repository, so that Triton never
sees half of it and no model's folder ever holds a foreign file (any change there makes Triton reload every version),
then renamed in: towers first, card last. What a killed merge left behind, the next one removes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from onnx import ModelProto, TensorProto, ValueInfoProto

from exporter.card import read_card
from exporter.errors import ConfigChanged, RepositoryBusy, RepositoryEmpty, RepositoryError

MODEL_FILE, CONFIG_FILE = "model.onnx", "config.pbtxt"
KINDS = ("image", "text", "card")  # the order in which they are renamed in
BASE_VERSION = 1
MAX_BATCH_SIZE = {"image": 64, "text": 64, "card": 8}
# The datatypes of CLIP's inputs and outputs, in Triton's words.
TYPES = {
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.STRING: "TYPE_STRING",
}


class Repository:
    """One CLIP's three models in a Triton model repository."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def model(self, kind: str) -> Path:
        """The folder of the image tower, text tower or card."""
        return self.path / f"{self.name}_{kind}"

    def file(self, kind: str, version: int) -> Path:
        """Where a version's ONNX lies."""
        return self.model(kind) / str(version) / MODEL_FILE

    def versions(self) -> list[int]:
        """The versions that count: card and both towers are there. Oldest first."""
        return sorted(set.intersection(*(self._numbers(kind) for kind in KINDS)))

    def next_version(self) -> int:
        """A number that no model has used."""
        return max((0, *(n for kind in KINDS for n in self._numbers(kind)))) + 1

    def card(self, version: int) -> dict:
        """What a version says of itself."""
        return read_card(self.file("card", version))

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Hold the repository and lend an empty staging folder on its file system, removed at the end.

        Raises:
            RepositoryBusy: another process holds it.
            RepositoryError: it can't be created or written beside.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as exc:
            raise RepositoryError(f"repository {self.path}: {exc.strerror}; give a folder that can be written") from exc
        try:
            self._hold(lock)
            self._clean()
            staging = self._new_staging()
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        finally:
            os.close(lock)

    def publish(self, staging: Path) -> None:
        """Rename everything staged into place: ``<staging>/<model>/<version>``, configs of new models with it.

        Raises:
            ConfigChanged: a model's config would change; nothing has been renamed.
        """
        for kind in KINDS:
            self._check_config(kind, (staging / self.model(kind).name / CONFIG_FILE).read_text())
        for kind in KINDS:
            staged, model = staging / self.model(kind).name, self.model(kind)
            if not model.exists():
                os.rename(staged, model)
                continue
            for version in sorted(_numbers(staged)):
                os.rename(staged / str(version), model / str(version))

    def _check_config(self, kind: str, config: str) -> None:
        there = self.model(kind) / CONFIG_FILE
        if self.model(kind).exists() and (not there.is_file() or there.read_text() != config):
            raise ConfigChanged(
                f"{there}: the new version needs another config (other architecture, or the file was edited), and a "
                "changed config makes Triton reload every version; give another --name or --repository"
            )

    def _hold(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise RepositoryBusy(
                f"repository {self.path}: another merge is writing to it; wait until it has finished"
            ) from exc

    def _new_staging(self) -> Path:
        beside = self.path.resolve()
        staging = Path(tempfile.mkdtemp(prefix=self._staging_prefix(), dir=beside.parent))
        if staging.stat().st_dev != beside.stat().st_dev:
            staging.rmdir()
            raise RepositoryError(
                f"repository {self.path}: is a mount point, and a version must be staged beside it on the same file "
                "system; give a folder inside the mount"
            )
        return staging

    def _staging_prefix(self) -> str:
        return f".{self.path.resolve().name}.staging-"

    def _clean(self) -> None:
        """Remove what killed merges left: staging folders, and towers without a card."""
        for stale in self.path.resolve().parent.glob(f"{self._staging_prefix()}*"):
            shutil.rmtree(stale, ignore_errors=True)
        counted = self._numbers("card")
        for kind in ("image", "text"):
            for version in self._numbers(kind) - counted:
                shutil.rmtree(self.model(kind) / str(version))
            if not counted and self.model(kind).is_dir():
                (self.model(kind) / CONFIG_FILE).unlink(missing_ok=True)
                self.model(kind).rmdir()

    def _numbers(self, kind: str) -> set[int]:
        return _numbers(self.model(kind))


def repositories(path: Path) -> list[Repository]:
    """Every CLIP in a model repository that has a version.

    Raises:
        RepositoryEmpty: there is none.
    """
    cards = sorted(path.glob("*_card")) if path.is_dir() else []
    found = [Repository(path, card.name.removesuffix("_card")) for card in cards]
    found = [repository for repository in found if repository.versions()]
    if not found:
        raise RepositoryEmpty(f"repository {path}: no model in it; write one with: exporter merge --to onnx")
    return found


def stage(staging: Path, name: str, version: int, models: Mapping[str, bytes]) -> None:
    """Write one version's three files under a staging folder, flushed to disk."""
    for kind, content in models.items():
        folder = staging / f"{name}_{kind}" / str(version)
        folder.mkdir(parents=True)
        with open(folder / MODEL_FILE, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def config(name: str, kind: str, model: ModelProto) -> str:
    """The text of ``config.pbtxt``, from the graph alone: equal for every version of one architecture.

    One instance, as Triton's default for this backend is two a version on a CPU: twice the memory, and sessions that
    fight over the same cores. Its kind is left open: a GPU where there is one.
    """
    ends = (("input", model.graph.input), ("output", model.graph.output))
    tensors = "\n".join(_tensors(field, values) for field, values in ends)
    return f"""\
name: "{name}_{kind}"
backend: "onnxruntime"
max_batch_size: {MAX_BATCH_SIZE[kind]}
{tensors}
instance_group [ {{ count: 1 }} ]
dynamic_batching {{ }}
version_policy {{ all {{ }} }}
"""


def _tensors(field: str, values: list[ValueInfoProto]) -> str:
    lines = []
    for value in values:
        tensor = value.type.tensor_type
        # A dimension without a fixed value is dynamic; the first is the batch, which Triton leaves out.
        dims = ", ".join(str(d.dim_value or -1) for d in tensor.shape.dim[1:])
        lines.append(f'{field} [ {{ name: "{value.name}" data_type: {TYPES[tensor.elem_type]} dims: [ {dims} ] }} ]')
    return "\n".join(lines)


def _numbers(model: Path) -> set[int]:
    return {int(p.name) for p in model.glob("*") if p.name.isdecimal() and p.is_dir()}
