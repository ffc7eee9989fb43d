"""Versions on disk: a store of everything that was ever released, and what of it stands where Triton looks.

A version is three models of one number and a manifest. The store, a folder beside the repository, has each version
whole from the moment it is there: one folder, renamed in once, never changed. A version *stands* while the three
models have it among theirs too, as hard links to the store's files (copies where there can be no links): what stands
can be taken out and put back at will. A model's folder never holds a foreign file of ours, not even for a moment: any
change there makes Triton reload every version. The card goes in last and comes out first, so a version without one was
caught half-way; whoever next holds the repository takes it out.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from clipweld.exporter.disk import (
    changing,
    flush,
    is_regular,
    is_staging,
    link_or_copy,
    move_into,
    new_staging,
    remove_staging,
    unlike,
    write,
)
from clipweld.exporter.errors import RepositoryBusy, RepositoryEmpty, RepositoryError
from clipweld.exporter.store.layout import (
    BASE_VERSION,
    CONFIG_FILE,
    EXACT,
    HISTORY_FILE,
    KINDS,
    MANIFEST_FILE,
    MODEL_FILE,
    REMOVED,
    TOWERS,
    Layout,
    entries,
    is_model_name,
    store_of,
    towers,
    version_numbers,
)
from clipweld.trainer.os_errors import cause

__all__ = [
    "BASE_VERSION", "CONFIG_FILE", "EXACT", "HISTORY_FILE", "KINDS", "MANIFEST_FILE", "MODEL_FILE", "TOWERS",
    "Repository", "is_model_name", "known_repositories", "repositories", "store_of", "towers",
]  # fmt: skip

_log = logging.getLogger(__name__)


class Repository(Layout):
    """One CLIP's three models in a Triton model repository, and the store of its versions: what changes them.

    Args, attributes, errors: as ``Layout``.
    """

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
            self._hold(lock)
            self._clean()
            try:
                yield
            finally:
                try:
                    self._clean()
                except RepositoryError as exc:  # the block's own outcome is what counts; the next run cleans up
                    _log.warning("not cleaned up yet: %s", exc)
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

    def add(self, staged: Path, version: int) -> None:
        """Move a version, complete in a staging folder, into the store."""
        self.check_free(version)
        with changing(self.store):
            self.store.mkdir(parents=True, exist_ok=True)
            move_into(staged, self.store / str(version))
            flush(self.store)

    def put_in(self, version: int, staging: Path, kinds: Sequence[str] = KINDS) -> None:
        """Have a version stand, or some of its models; what stands already stays.

        Raises:
            ConfigChanged: a model's config would change; nothing has been put in.
            RepositoryError: it can't be written; some may have been put in.
        """
        for kind in kinds:
            self.check_config(kind, self.config(kind, version))
        for kind in kinds:
            model = self.model(kind)
            if (model / str(version)).exists():
                continue
            with changing(model):
                staged = new_staging(staging, f"{kind}-") / model.name
                folder = staged / str(version)
                folder.mkdir(parents=True)
                for name, source in self.sources(kind, version).items():
                    link_or_copy(source, folder / name)
                if model.exists():
                    os.rename(folder, model / str(version))
                else:
                    shutil.copy(self.store / str(version) / kind / CONFIG_FILE, staged)
                    os.rename(staged, model)
                flush(model)

    def take_out(self, version: int, staging: Path, kinds: Sequence[str] = KINDS) -> None:
        """Have a version stand no more, or some of its models; the card comes out first. Needs no room.

        What was put in there by others goes with it: ``check_retirable`` comes first.
        """
        for kind in reversed(KINDS):
            folder = self.model(kind) / str(version)
            if kind in kinds and folder.exists():
                with changing(folder):
                    try:
                        os.rename(folder, staging / f"{kind}-{version}-taken-out")
                    except OSError as exc:
                        if exc.errno != errno.EXDEV:  # as for a folder in a lower layer of a container's image
                            raise
                        shutil.rmtree(folder)
                    flush(self.model(kind))

    def record(self, history: Sequence[int], following: Sequence[int] = ()) -> None:
        """Write down which versions were served, one after the other, and what that will be after a switch."""
        temporary, file = self.store / f".{HISTORY_FILE}", self.store / HISTORY_FILE
        with changing(file):
            write(temporary, json.dumps({"now": list(history), "next": list(following)}).encode())
            os.replace(temporary, file)

    def remove(self, version: int) -> None:
        """Delete a version that doesn't stand for good, if the store has it. Needs no room: it may be to make some.

        What was put in there by others goes with it: ``check_removable`` comes first.
        """
        folder = removed = self.store / str(version)
        with changing(folder):
            if folder.exists():
                try:
                    removed = self.store / f".{version}{REMOVED}"
                    os.rename(folder, removed)
                except OSError as exc:
                    if exc.errno != errno.EXDEV:
                        raise
                    removed = folder
                _remove_version(removed)

    @contextmanager
    def replacing(self, staging: Path) -> Iterator[None]:
        """Take out and delete all versions for good, models whole: one without a version would stop Triton.

        Where the block that puts others in their place fails, they come back. ``check_replaceable`` comes first.
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
        except OSError as exc:
            raise RepositoryError(
                f"repository {self.path}: its file system can't lock it ({cause(exc, self.path)}), and two exporters "
                "at once would ruin it; put it on one that can, such as a local disk"
            ) from exc

    def _new_staging(self) -> Path:
        beside = self.path.resolve()
        with changing(beside.parent):
            staging = new_staging(beside.parent, self._staging_prefix())
        if staging.stat().st_dev != beside.stat().st_dev:
            remove_staging(staging)
            raise RepositoryError(
                f"repository {self.path}: is a mount point, and a version must be staged beside it on the same file "
                "system; give a folder inside the mount"
            )
        return staging

    def _clean(self) -> None:
        """Remove staging folders, versions half removed, and models that were put in or taken out half-way."""
        self.check_links()
        for stale in self.leftovers():
            if is_staging(stale):
                remove_staging(stale)
        with changing(self.path):
            for stale in entries(self.store):
                if found := re.fullmatch(rf"\.([1-9][0-9]*){REMOVED}", stale.name):
                    number, is_empty = int(found[1]), not any(stale.iterdir())
                    if is_empty or not (self.fault(stale, number) or self.others_in(stale, number)):
                        _remove_version(stale)
                elif stale.name == f".{HISTORY_FILE}" and is_regular(stale):
                    stale.unlink()
            numbers = {kind: version_numbers(self.model(kind)) for kind in KINDS}
            stored, complete = self.versions(), set.intersection(*map(set, numbers.values()))
            for kind in KINDS:
                for version in set(numbers[kind]) & set(stored) - complete:
                    if not unlike(self.model(kind) / str(version), self.sources(kind, version)):
                        shutil.rmtree(self.model(kind) / str(version))
        if not complete:
            self.remove_empty()

    def remove_empty(self) -> None:
        """Remove models that have nothing but a config of the store's: without a version they would stop Triton."""
        for version in self.versions()[:1]:
            for kind in KINDS:
                model, config = self.model(kind), self.store / str(version) / kind / CONFIG_FILE
                if model.is_dir() and not unlike(model, {CONFIG_FILE: config}):
                    with changing(model):
                        (model / CONFIG_FILE).unlink(missing_ok=True)
                        model.rmdir()


def repositories(path: Path) -> list[Repository]:
    """Every CLIP in a model repository of which a version stands.

    Raises:
        RepositoryEmpty: there is none.
    """
    return _with_versions(path, lambda repository: bool(repository.standing()))


def known_repositories(path: Path) -> list[Repository]:
    """Every CLIP of which a version stands, or is in the store.

    Raises:
        RepositoryEmpty: there is none.
    """
    return _with_versions(path, lambda repository: bool(repository.standing() or repository.versions()))


def _with_versions(path: Path, has: Callable[[Repository], bool]) -> list[Repository]:
    names = {entry.name.removesuffix("_card") for entry in entries(path) if entry.name.endswith("_card")}
    names |= {entry.name for entry in entries(store_of(path)) if entry.is_dir()}
    found = [repository for name in sorted(names) if is_model_name(name) and has(repository := Repository(path, name))]
    if not found:
        raise RepositoryEmpty(f"repository {path}: no model in it; write one with: exporter merge --to onnx")
    return found


def _remove_version(folder: Path) -> None:
    """Delete a version's folder: killed on the way, it still says by its manifest whose it was."""
    for path in folder.iterdir():
        if path.name != MANIFEST_FILE:
            shutil.rmtree(path)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    folder.rmdir()
