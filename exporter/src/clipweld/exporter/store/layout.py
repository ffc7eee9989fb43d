"""The on-disk layout of a CLIP's versions. This module only reads.

Only what clipweld wrote may ever be deleted. A version is recognised by its manifest, its files by being byte for byte
those of the store or the manifest, and staging folders by a mark. All else is foreign
(``clipweld.exporter.store.foreign``): it is reported, never touched, and a command that would overwrite or delete it is
refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from clipweld.exporter.config import MODEL_NAME
from clipweld.exporter.disk import INCOMING, is_regular, others, unlike
from clipweld.exporter.errors import (
    ConfigChanged,
    ForeignFiles,
    RepositoryEmpty,
    RepositoryError,
    StoreMissing,
    VersionMissing,
)
from clipweld.exporter.graph.onnx_file import DATA_FILE, data_file
from clipweld.exporter.store.card import read_card
from clipweld.exporter.store.schemas import Card, History, Manifest
from clipweld.trainer.os_errors import cause, next_step
from clipweld.trainer.schemas import one_line, read_json_file, sha256_of

MODEL_FILE, CONFIG_FILE, MANIFEST_FILE = "model.onnx", "config.pbtxt", "manifest.json"
HISTORY_FILE = "history.json"
REMOVED = "-removed"  # suffix of a version's folder that is being deleted
EXACT = "fp32"  # folder in a version of lower precision with the float32 towers it was cast from
TOWERS = ("image", "text")
KINDS = (*TOWERS, "card")  # the order of activation
BASE_VERSION = 1


class Layout:
    """One CLIP's three models in a Triton model repository, and the store of its versions.

    Attributes:
        path: the model repository that Triton reads.
        name: common to the three models.
        store: ``<path>.store/<name>``, with a folder per version.

    Raises:
        RepositoryError: not a valid model name.
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
        """Return the path of a version's ONNX file in the store."""
        return self.store / str(version) / kind / MODEL_FILE

    def exact_file(self, kind: str, version: int) -> Path:
        """Return the path of a version's float32 tower: the served one, or the one it was cast from."""
        kept = self.store / str(version) / EXACT / kind / MODEL_FILE
        return kept if kept.exists() else self.file(kind, version)

    def manifest_file(self, version: int) -> Path:
        """Return the path of a version's manifest in the store."""
        return self.store / str(version) / MANIFEST_FILE

    def sources(self, kind: str, version: int) -> dict[str, Path]:
        """Map the names of the files in a version's folder in the repository to their sources in the store."""
        sources = {MODEL_FILE: self.file(kind, version), MANIFEST_FILE: self.manifest_file(version)}
        if (data := data_file(sources[MODEL_FILE])).exists() and f"{kind}/{data.name}" in self.manifest(version)[
            "files"
        ]:
            sources[data.name] = data
        return sources

    def versions(self) -> list[int]:
        """Return all versions in the store, oldest first."""
        return [number for number in version_numbers(self.store) if not self.fault(self.store / str(number), number)]

    def standing(self) -> list[int]:
        """Return the active versions, oldest first: those in the folders of all three models.

        If the store is missing, the manifests in the models' folders decide.
        """
        stored, common = self.versions(), set.intersection(*(set(version_numbers(self.model(kind))) for kind in KINDS))
        return [
            number
            for number in sorted(common)
            if (number in stored or not stored)
            and not any(self.fault(self.model(kind) / str(number), number) for kind in KINDS)
        ]

    @property
    def served(self) -> int | None:
        """The newest active version, which answers requests that name no version."""
        return max(self.standing(), default=None)

    def fault(self, folder: Path, version: int) -> str | None:
        """Return why a folder is not a version that clipweld wrote, judged by its manifest; None if it is one."""
        file = folder / MANIFEST_FILE
        if folder.is_symlink() or not is_regular(file):
            return "it is a link" if folder.is_symlink() else f"it has no {MANIFEST_FILE} of clipweld's"
        try:
            self._read_manifest(file, version)
        except (OSError, ValueError) as exc:
            return f"{MANIFEST_FILE}: {one_line(str(exc))}"
        return None

    def others_in(self, folder: Path, version: int) -> list[Path]:
        """List what a version's manifest doesn't name in its folder in the store, or in one being deleted."""
        return others(folder, stored_names(self._read_manifest(folder / MANIFEST_FILE, version)["files"]))

    def foreign_versions(self) -> dict[Path, str]:
        """Map each entry that Triton would load as a version, but clipweld did not write, to the reason."""
        stored, found = self.versions(), {}
        for kind in KINDS:
            for path in numbered(self.model(kind)):
                number = int(path.name)
                reason = self.fault(path, number)
                if not reason and stored and number not in stored:
                    kept = self.store / path.name
                    reason = f"{kept}: {self.fault(kept, number)}" if kept.exists() else f"{kept} is not there"
                if reason:
                    found[path] = reason
        return found

    def check_foreign(self) -> None:
        """Raises:
        ForeignFiles: Triton would load something as a version that clipweld did not write.
        """
        for path, reason in self.foreign_versions().items():
            raise ForeignFiles(
                f"{path}: clipweld did not put it there ({reason}), and Triton serves every version that it finds; "
                f"move it out of {self.path}, and run it again"
            )

    def check_free(self, version: int) -> None:
        """Raises:
        ForeignFiles: the path of a version that is to be written is taken.
        """
        for folder in (self.store, *map(self.model, KINDS)):
            if os.path.lexists(place := folder / str(version)):
                reason = self.fault(place, version) or "it belongs to no version of the store"
                raise ForeignFiles(
                    f"{place}: is no version of clipweld's ({reason}), and version {version} comes there; restore "
                    f"it, or move it out of {folder}"
                )

    def check_retirable(self, version: int) -> None:
        """Raises:
        ForeignFiles: an active version has files besides, or in place of, the store's.
        """
        for kind in KINDS:
            for path in unlike(self.model(kind) / str(version), self.sources(kind, version)):
                raise ForeignFiles(
                    f"{path}: is not what clipweld put there, and would be deleted with version {version}; move it out "
                    f"of {self.path}, and run it again"
                )

    def check_removable(self, version: int) -> None:
        """Raises:
        ForeignFiles: a version in the store has files besides, or in place of, those its manifest names.
        """
        folder, parts = self.store / str(version), self.manifest(version)["files"]
        found = others(folder, stored_names(parts))
        for part, expected in parts.items():
            file = part_file(folder, part)
            if not found and is_regular(file):
                as_written = file.stat().st_size == expected["bytes"] and sha256_of(file) == expected["sha256"]
                found += [] if as_written else [file]
        for path in found[:1]:
            raise ForeignFiles(
                f"{path}: is not what clipweld wrote, and would be deleted with version {version}; move it away, or "
                f"delete {folder} yourself"
            )

    def check_links(self) -> None:
        """Raises:
        RepositoryError: one of our folders is a symbolic link, which may lead anywhere.
        """
        for folder in (self.store, *map(self.model, KINDS)):
            for path in (folder, *numbered(folder)):
                if path.is_symlink():
                    raise RepositoryError(
                        f"{path}: is a link, which clipweld never makes there; put the folder in its place"
                    )

    def check_released(self) -> None:
        """Raises:
        RepositoryEmpty: there is no version at all.
        StoreMissing: versions are active but their store is missing.
        """
        self.check_links()
        if self.versions():
            return
        self.check_store()
        raise RepositoryEmpty(
            f"repository {self.path}: no version of {self.name!r}; write one with: exporter merge --to onnx"
        )

    def check_store(self) -> None:
        """Raises:
        StoreMissing: versions are active but their store is missing, as when only the repository was copied.
        """
        if not self.versions() and (standing := self.standing()):
            both = f"{self.path} and {self.store.parent}"
            raise StoreMissing(
                f"repository {self.path}: versions {', '.join(map(str, standing))} of {self.name!r} are served, but "
                f"their store {self.store} is missing; copy both folders from where they were made, {both}, as with "
                "rsync -aH (-H keeps hard links)"
            )

    def check(self, version: int) -> None:
        """Raises:
        VersionMissing: the store has no such version.
        RepositoryError: the entry of that number is not a valid version.
        """
        if version not in (there := self.versions()):
            if (self.store / str(version)).is_dir():
                self.manifest(version)  # says what is wrong
            listed = ", ".join(map(str, there)) or "none"
            raise VersionMissing(f"{self.name} version {version}: not in {self.store}; versions there: {listed}")

    def card(self, version: int) -> Card:
        """Read a version's card, which clients get."""
        return read_card(self.file("card", version))

    def manifest(self, version: int) -> Manifest:
        """Read a version's manifest; if the store is missing, from the card's folder.

        Raises:
            RepositoryError: it can't be read, or is of another version.
        """
        file = self.manifest_file(version)
        if not file.exists() and not self.versions():
            file = self.model("card") / str(version) / MANIFEST_FILE
        try:
            return self._read_manifest(file, version)
        except (OSError, ValueError) as exc:
            raise RepositoryError(
                f"manifest {file}: can't be read ({one_line(str(exc))}); restore it, or remove the version"
            ) from exc

    def is_unmerged(self, version: int) -> bool:
        """Whether a version has its adapters as branches in its graph (``clipweld.exporter.release.unmerged``)."""
        return self.manifest(version)["unmerged"]

    def history(self) -> list[int]:
        """Return versions in the order in which they were served; the last is served now.

        After an interrupted switch, the active version decides whether the switch happened.
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

    def config(self, kind: str, version: int) -> str:
        """Read the ``config.pbtxt`` that a version needs.

        Raises:
            RepositoryError: it can't be read.
        """
        file = self.store / str(version) / kind / CONFIG_FILE
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as exc:
            raise RepositoryError(f"{file}: can't be read ({one_line(str(exc))}); restore it") from exc

    def check_config(self, kind: str, config: str) -> None:
        """Raises:
        ConfigChanged: the model in the repository has another config.
        """
        there = self.model(kind) / CONFIG_FILE
        if self.model(kind).exists() and (not there.is_file() or there.read_text(encoding="utf-8") != config):
            raise ConfigChanged(
                f"{there}: the new version needs another config (other architecture, or the file was edited), and a "
                "changed config makes Triton reload every version; give another --name or --repository"
            )

    def check_replaceable(self) -> None:
        """Raises:
        ForeignFiles: ``replacing`` would delete something that clipweld did not write.
        """
        self.check_store()
        self.check_foreign()
        stored, standing = self.versions(), {kind: version_numbers(self.model(kind)) for kind in KINDS}
        for number in stored:
            self.check_removable(number)
        for number in set().union(*standing.values()):
            self.check_retirable(number)
        found = [p for p in entries(self.store) if p.name != HISTORY_FILE and p.name not in map(str, stored)]
        for kind, numbers in standing.items():
            ours = {CONFIG_FILE, *map(str, numbers)}
            found += [path for path in entries(self.model(kind)) if path.name not in ours]
        for path in found[:1]:
            raise ForeignFiles(
                f"{path}: is not what clipweld wrote, and would be deleted with the versions of {self.name!r}; move it "
                "away, and run it again"
            )

    def leftovers(self) -> Iterator[Path]:
        """Yield staging folders beside the repository and in the store, including those in use."""
        beside = self.path.resolve().parent
        for folder, start in ((beside, self._staging_prefix()), (self.store, ".")):
            for path in entries(folder):
                if path.name.startswith(start) and (folder is beside or INCOMING in path.name):
                    yield path

    def _staging_prefix(self) -> str:
        return f".{self.path.resolve().name}.staging-"

    def _read_manifest(self, file: Path, version: int) -> Manifest:
        manifest = read_json_file(Manifest, file)
        if (manifest["model"], manifest["version"]) != (self.name, version):
            raise ValueError(f"it is of {manifest['model']} version {manifest['version']}")
        return manifest


def store_of(path: Path) -> Path:
    """Return the store of a model repository: the folder beside it with every version of its models."""
    resolved = path.resolve()
    return resolved.with_name(f"{resolved.name}.store")


def part_file(version: Path, part: str) -> Path:
    """Return the file in a version's folder that a key of the manifest's ``files`` stands for (``schemas.Part``)."""
    return version / part if part.endswith(DATA_FILE) else version / part / MODEL_FILE


def stored_names(parts: Iterable[str]) -> set[str]:
    """Return the relative names of all files of a stored version, from the keys of its manifest's ``files``."""
    files = {part_file(Path(), part).as_posix() for part in parts}
    return {MANIFEST_FILE, *files, *(f"{kind}/{CONFIG_FILE}" for kind in KINDS)}


def towers(version: Path) -> tuple[Path, Path]:
    """The files of the image and the text tower in a version's folder."""
    image, text = (version / kind / MODEL_FILE for kind in TOWERS)
    return image, text


def is_model_name(name: str) -> bool:
    """Whether a name is valid as the common name of the three models."""
    return re.fullmatch(MODEL_NAME, name) is not None


def numbered(folder: Path) -> list[Path]:
    """List entries of any type that are named like versions, oldest first."""
    found = (path for path in entries(folder) if re.fullmatch("[1-9][0-9]{0,17}", path.name))
    return sorted(found, key=lambda path: int(path.name))


def version_numbers(folder: Path) -> list[int]:
    """Return the numbers of the version folders in a folder, oldest first; symbolic links don't count."""
    there = [] if folder.is_symlink() else numbered(folder)
    return [int(path.name) for path in there if path.is_dir() and not path.is_symlink()]


def entries(folder: Path) -> list[Path]:
    """List a folder; empty if it doesn't exist.

    Raises:
        RepositoryError: it can't be read.
    """
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        raise RepositoryError(f"{folder}: can't be read ({cause(exc, folder)}); {next_step(exc)}") from exc
