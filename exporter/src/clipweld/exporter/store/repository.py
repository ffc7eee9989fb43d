"""Versions on disk: the store of all released versions, and the active ones in the repository that Triton reads.

A version is three models of one number and a manifest. In the store, a folder beside the repository, each version is
one folder that is renamed in complete and never changed. A version is *active* while the folders of the three models
have it too, as hard links to the store's files (copies where links are not possible), so activating and deactivating
are cheap. No temporary file is ever put in a model's folder, because any change there makes Triton reload every
version. The card is activated last and deactivated first, so a version without a card was interrupted half-way; the
next process that locks the repository deactivates it.
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
    """One CLIP's three models in a Triton model repository, and the store of its versions: the methods that write.

    Args, attributes, errors: as ``Layout``.
    """

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the repository against other exporters; clean up half-finished changes before and after the block.

        Raises:
            RepositoryBusy: another process has the lock.
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
        """Lock the repository and yield an empty staging folder on its file system, removed at the end.

        Raises:
            RepositoryBusy: another process has the lock.
            RepositoryError: the repository or the folder beside it can't be written.
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
        """Activate a version, or some of its models; those already active are left alone.

        Raises:
            ConfigChanged: a model's config would change; nothing was activated.
            RepositoryError: it can't be written; some models may be active.
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
        """Deactivate a version, or some of its models, the card first. Needs no disk space.

        Foreign files in its folders are moved away too: call ``check_retirable`` first.
        """
        for kind in reversed(KINDS):
            folder = self.model(kind) / str(version)
            if kind in kinds and folder.exists():
                with changing(folder):
                    try:
                        os.rename(folder, staging / f"{kind}-{version}-taken-out")
                    except OSError as exc:
                        if exc.errno != errno.EXDEV:  # overlayfs can't rename a folder of a lower image layer
                            raise
                        shutil.rmtree(folder)
                    flush(self.model(kind))

    def record(self, history: Sequence[int], following: Sequence[int] = ()) -> None:
        """Write which versions were served, in order, and that list as it will be after a switch.

        ``os.replace`` is atomic, so a kill leaves the old file or the new one, whole.
        """
        temporary, file = self.store / f".{HISTORY_FILE}", self.store / HISTORY_FILE
        with changing(file):
            write(temporary, json.dumps({"now": list(history), "next": list(following)}).encode())
            os.replace(temporary, file)

    def remove(self, version: int) -> None:
        """Delete an inactive version from the store, if it is there. Needs no disk space, for it frees some.

        Foreign files in its folder are deleted too: call ``check_removable`` first.
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
        """Delete all versions, with the models' folders: Triton fails to start on a model without versions.

        If the block, which writes their replacements, fails, they are restored. Call ``check_replaceable`` first.
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
        """Remove staging folders, half-deleted versions, and models that are half activated or deactivated."""
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
        """Remove models that contain only the store's config: Triton fails to start on a model without versions."""
        for version in self.versions()[:1]:
            for kind in KINDS:
                model, config = self.model(kind), self.store / str(version) / kind / CONFIG_FILE
                if model.is_dir() and not unlike(model, {CONFIG_FILE: config}):
                    with changing(model):
                        (model / CONFIG_FILE).unlink(missing_ok=True)
                        model.rmdir()


def repositories(path: Path) -> list[Repository]:
    """Return every CLIP in a model repository with an active version.

    Raises:
        RepositoryEmpty: there is none.
    """
    return _with_versions(path, lambda repository: bool(repository.standing()))


def known_repositories(path: Path) -> list[Repository]:
    """Return every CLIP in a model repository with an active or stored version.

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
    """Delete a version's folder, its manifest last: after a kill that still shows that clipweld wrote it."""
    for path in folder.iterdir():
        if path.name != MANIFEST_FILE:
            shutil.rmtree(path)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    folder.rmdir()
