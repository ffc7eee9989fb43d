"""Versions on disk: a store of everything that was ever released, and what of it stands where Triton looks.

A version is three models of one number and a manifest. The store, a folder beside the repository, has each version
whole from the moment it is there: one folder, renamed in once, never changed. A version *stands* while the three
models have it among theirs too, as hard links to the store's files: nothing is copied, and what stands can be taken out
and put back at will. A model's folder never holds a foreign file, not even for a moment: any change there makes Triton
reload every version. The card goes in last and comes out first, so a version without one was caught half-way; whoever
next holds the repository takes it out.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from exporter.card import read_card
from exporter.config import MODEL_NAME
from exporter.errors import ConfigChanged, RepositoryBusy, RepositoryEmpty, RepositoryError, VersionMissing
from exporter.records import History, Manifest
from trainer.records import one_line, read_json_file

MODEL_FILE, CONFIG_FILE, MANIFEST_FILE = "model.onnx", "config.pbtxt", "manifest.json"
HISTORY_FILE = "history.json"
REMOVED = "-removed"  # the ending of a version's folder that is being deleted
EXACT = "fp32"  # the folder in a version with those float32 towers that another precision was made of
TOWERS = ("image", "text")
KINDS = (*TOWERS, "card")  # the order in which they are put in
BASE_VERSION = 1


class Repository:
    """One CLIP's three models in a Triton model repository, and the store of its versions.

    Attributes:
        path: what Triton is given.
        name: common to the three models.
        store: ``<path>.store/<name>``, a folder a version.

    Raises:
        RepositoryError: not a name for models.
    """

    def __init__(self, path: Path, name: str) -> None:
        if not is_model_name(name):
            raise RepositoryError(f"model name {name[:100]!r}: letters, digits, - and _ only; give another --name")
        self.path, self.name = path, name
        self.store = store_of(path) / name

    def model(self, kind: str) -> Path:
        """The folder of the image tower, text tower or card."""
        return self.path / f"{self.name}_{kind}"

    def file(self, kind: str, version: int) -> Path:
        """A version's ONNX in the store."""
        return self.store / str(version) / kind / MODEL_FILE

    def exact_file(self, kind: str, version: int) -> Path:
        """A version's tower in float32: what it serves, or what that was made of."""
        kept = self.store / str(version) / EXACT / kind / MODEL_FILE
        return kept if kept.exists() else self.file(kind, version)

    def manifest_file(self, version: int) -> Path:
        """A version's manifest in the store."""
        return self.store / str(version) / MANIFEST_FILE

    def versions(self) -> list[int]:
        """All versions in the store, oldest first."""
        return sorted(_numbers(self.store))

    def standing(self) -> list[int]:
        """The versions that Triton serves when it looks, oldest first: all three models have them."""
        return sorted(set.intersection(*(_numbers(self.model(kind)) for kind in KINDS)))

    @property
    def served(self) -> int | None:
        """The newest standing version: what requests get that name none."""
        return max(self.standing(), default=None)

    def check_released(self) -> None:
        """Raises:
        RepositoryEmpty: there is no version at all.
        """
        if not self.versions():
            raise RepositoryEmpty(
                f"repository {self.path}: no version of {self.name!r}; write one with: exporter merge --to onnx"
            )

    def check(self, version: int) -> None:
        """Raises:
        VersionMissing: the store has no such version.
        """
        if version not in (there := self.versions()):
            listed = ", ".join(map(str, there)) or "none"
            raise VersionMissing(f"{self.name} version {version}: not in {self.store}; versions there: {listed}")

    def card(self, version: int) -> dict:
        """What a version says of itself to clients."""
        return read_card(self.file("card", version))

    def manifest(self, version: int) -> Manifest:
        """What was recorded when a version was made.

        Raises:
            RepositoryError: it can't be read, or is of another version.
        """
        file = self.manifest_file(version)
        try:
            manifest = read_json_file(Manifest, file)
            if (manifest["model"], manifest["version"]) != (self.name, version):
                raise ValueError(f"it is of {manifest['model']} version {manifest['version']}")
        except (OSError, ValueError) as exc:
            raise RepositoryError(
                f"manifest {file}: can't be read ({one_line(str(exc))}); restore it, or remove the version"
            ) from exc
        return manifest

    def is_unmerged(self, version: int) -> bool:
        """Whether a version has its adapters as branches in its graph (``exporter.unmerged``)."""
        return self.manifest(version)["unmerged"]

    def history(self) -> list[int]:
        """Versions in the order in which they were served; each came after the one before it, the last is served now.

        What stands has the last word: a switch that was cut off has happened or not.
        """
        file, served = self.store / HISTORY_FILE, self.served
        recorded: History = {"now": [], "next": []}
        try:
            if os.path.lexists(file):
                recorded = read_json_file(History, file)
        except (OSError, ValueError) as exc:
            raise RepositoryError(f"{file}: can't be read ({one_line(str(exc))}); remove it") from exc
        for history in (recorded["next"], recorded["now"]):
            if history[-1:] == [served]:
                return history
        return [*recorded["now"], *([] if served is None else [served])]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other exporters out. What is half-way, from a killed one or where the block fails, is removed.

        Raises:
            RepositoryBusy: another process holds it.
            RepositoryError: it can't be created or written.
        """
        with changing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with changing(self.path):
                self._hold(lock)
            self._clean()
            try:
                yield
            finally:
                self._clean()
        finally:
            os.close(lock)

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Hold the repository and lend an empty staging folder on its file system, removed at the end.

        Raises:
            RepositoryBusy: another process holds it.
            RepositoryError: it can't be created or written beside.
        """
        with self.held():
            yield self._new_staging()

    def check_config(self, kind: str, config: str) -> None:
        """Raises:
        ConfigChanged: a model stands here with another config.
        """
        there = self.model(kind) / CONFIG_FILE
        if self.model(kind).exists() and (not there.is_file() or there.read_text(encoding="utf-8") != config):
            raise ConfigChanged(
                f"{there}: the new version needs another config (other architecture, or the file was edited), and a "
                "changed config makes Triton reload every version; give another --name or --repository"
            )

    def add(self, staged: Path, version: int) -> None:
        """Rename a version, complete in a staging folder, into the store."""
        with changing(self.store):
            self.store.mkdir(parents=True, exist_ok=True)
            os.rename(staged, self.store / str(version))
            _flush(self.store)

    def put_in(self, version: int, staging: Path, kinds: Sequence[str] = KINDS) -> None:
        """Have a version stand, or some of its models; what stands already stays.

        Raises:
            ConfigChanged: a model's config would change; nothing has been put in.
            RepositoryError: it can't be written; some may have been put in.
        """
        for kind in kinds:
            self.check_config(kind, (self.store / str(version) / kind / CONFIG_FILE).read_text(encoding="utf-8"))
        for kind in kinds:
            model, parts = self.model(kind), self.store / str(version) / kind
            if (model / str(version)).exists():
                continue
            with changing(model):
                staged = Path(tempfile.mkdtemp(dir=staging)) / model.name
                folder = staged / str(version)
                folder.mkdir(parents=True)
                os.link(parts / MODEL_FILE, folder / MODEL_FILE)
                os.link(self.manifest_file(version), folder / MANIFEST_FILE)
                if model.exists():
                    os.rename(folder, model / str(version))
                else:
                    shutil.copy(parts / CONFIG_FILE, staged)
                    os.rename(staged, model)
                _flush(model)

    def take_out(self, version: int, staging: Path, kinds: Sequence[str] = KINDS) -> None:
        """Have a version stand no more, or some of its models; the card comes out first. Needs no room."""
        for kind in reversed(KINDS):
            folder = self.model(kind) / str(version)
            if kind in kinds and folder.exists():
                with changing(folder):
                    os.rename(folder, staging / f"{kind}-{version}-taken-out")
                    _flush(self.model(kind))

    def record(self, history: Sequence[int], following: Sequence[int] = ()) -> None:
        """Write down which versions were served, one after the other, and what that will be after a switch."""
        temporary, file = self.store / f".{HISTORY_FILE}", self.store / HISTORY_FILE
        with changing(file):
            write(temporary, json.dumps({"now": list(history), "next": list(following)}).encode())
            os.replace(temporary, file)

    def remove(self, version: int) -> None:
        """Delete a version that doesn't stand for good, if the store has it. Needs no room: it may be to make some."""
        folder = self.store / str(version)
        with changing(folder):
            if folder.exists():
                removed = self.store / f".{version}{REMOVED}"
                os.rename(folder, removed)
                shutil.rmtree(removed)

    @contextmanager
    def replacing(self, staging: Path) -> Iterator[None]:
        """Take out and delete all versions for good, models whole: one without a version would stop Triton.

        Where the block that puts others in their place fails, they come back.
        """
        folders = (*map(self.model, reversed(KINDS)), self.store)
        before = {folder: staging / f"{folder.name}-before" for folder in folders}
        cleared: list[Path] = []
        try:
            for folder in folders:
                if folder.exists():
                    with changing(folder):
                        os.rename(folder, before[folder])
                cleared.append(folder)
            yield
        except BaseException:
            for folder in reversed(cleared):
                with changing(folder):
                    if folder.exists():
                        os.rename(folder, staging / f"{folder.name}-failed")
                    if before[folder].exists():
                        os.rename(before[folder], folder)
            raise

    def _hold(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise RepositoryBusy(
                f"repository {self.path}: another exporter is writing to it; wait until it has finished"
            ) from exc

    def _new_staging(self) -> Path:
        beside = self.path.resolve()
        with changing(beside.parent):
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
        """Remove staging folders, versions half removed, and models that were put in or taken out half-way."""
        staged = self.path.resolve().parent.glob(f"{self._staging_prefix()}*")
        for stale in (*staged, *self.store.glob(f".*{REMOVED}")):
            shutil.rmtree(stale, ignore_errors=True)
        standing = set(self.standing())
        with changing(self.path):
            for half_written in self.store.glob(f".{HISTORY_FILE}"):
                half_written.unlink()
            for kind in KINDS:
                for version in _numbers(self.model(kind)) - standing:
                    shutil.rmtree(self.model(kind) / str(version))
                if not standing and self.model(kind).is_dir():
                    (self.model(kind) / CONFIG_FILE).unlink(missing_ok=True)
                    self.model(kind).rmdir()


def repositories(path: Path) -> list[Repository]:
    """Every CLIP in a model repository of which a version stands.

    Raises:
        RepositoryEmpty: there is none.
    """
    names = [card.name.removesuffix("_card") for card in path.glob("*_card")] if path.is_dir() else []
    found = [Repository(path, name) for name in sorted(names) if is_model_name(name)]
    found = [repository for repository in found if repository.standing()]
    if not found:
        raise RepositoryEmpty(f"repository {path}: no model in it; write one with: exporter merge --to onnx")
    return found


def store_of(path: Path) -> Path:
    """The folder beside a model repository that has every version of its models."""
    resolved = path.resolve()
    return resolved.with_name(f"{resolved.name}.store")


def towers(version: Path) -> tuple[Path, Path]:
    """The files of the image and the text tower in a version's folder."""
    image, text = (version / kind / MODEL_FILE for kind in TOWERS)
    return image, text


def write(file: Path, content: bytes) -> None:
    """Write a file, in a folder that is made if need be, and flush it to disk.

    Raises:
        RepositoryError: it can't be written.
    """
    with changing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())


def is_model_name(name: str) -> bool:
    """Whether three models may have this name in common."""
    return re.fullmatch(MODEL_NAME, name) is not None


def _numbers(folder: Path) -> set[int]:
    """The versions below a folder of ours.

    Raises:
        RepositoryError: one is a link, which may lead anywhere.
    """
    found = [path for path in folder.glob("*") if re.fullmatch("[1-9][0-9]{0,17}", path.name)]
    for path in (folder, *found):
        if path.is_symlink():
            raise RepositoryError(f"{path}: is a link, which clipweld never makes there; put the folder in its place")
    return {int(path.name) for path in found if path.is_dir()}


@contextmanager
def changing(place: Path) -> Iterator[None]:
    """What the operating system has against a change, as an error of ours.

    Raises:
        RepositoryError: in place of any OSError.
    """
    try:
        yield
    except OSError as exc:
        raise RepositoryError(
            f"{place}: can't be written ({exc.strerror or exc}); make room, or have it writable, and run it again"
        ) from exc


def _flush(folder: Path) -> None:
    """Have renames in a folder survive a power cut, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
