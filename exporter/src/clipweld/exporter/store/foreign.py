"""Files among clipweld's own that clipweld did not write: reported, never touched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from clipweld.exporter.disk import INCOMING, is_regular, is_staging, others
from clipweld.exporter.store.layout import CONFIG_FILE, HISTORY_FILE, KINDS, REMOVED, Layout, entries, numbered


@dataclass(frozen=True)
class Foreign:
    """A file or folder that clipweld did not write.

    Attributes:
        model: the common name of the three models in whose folders it is.
        version: the version number that it has or is in, if any.
        path: of the entry.
        reason: why it counts as foreign.
    """

    model: str
    version: int | None
    path: Path
    reason: str


def foreign_entries(repository: Layout) -> list[Foreign]:
    """List foreign entries in the three models' folders, in the store and beside the repository."""
    found: list[tuple[int | None, Path, str]] = []
    versions = repository.foreign_versions()
    found += [(int(path.name), path, reason) for path, reason in versions.items()]
    for kind in KINDS:
        model = repository.model(kind)
        if model.is_symlink():
            found.append((None, model, "it is a link"))
            continue
        for path in numbered(model):
            if path not in versions:
                names = repository.sources(kind, int(path.name))
                found += [(int(path.name), other, "no file of a version") for other in others(path, names)]
        found += _unknown(model, {CONFIG_FILE})
    for path in numbered(repository.store):
        if reason := repository.fault(path, int(path.name)):
            found.append((int(path.name), path, reason))
        else:
            inside = repository.others_in(path, int(path.name))
            found += [(int(path.name), other, "no file of a version") for other in inside]
    found += _unknown(repository.store, {HISTORY_FILE, f".{HISTORY_FILE}"})
    found += [(None, path, "not marked as clipweld's") for path in repository.leftovers() if not is_staging(path)]
    return [Foreign(repository.name, *one) for one in found]


def _unknown(folder: Path, files: set[str]) -> list[tuple[None, Path, str]]:
    """List what is neither a version, nor a leftover of clipweld's, nor one of these files."""
    known = {path.name for path in numbered(folder)} | {path.name for path in entries(folder) if _leftover(path)}
    return [
        (None, path, "no file of clipweld's")
        for path in entries(folder)
        if path.name not in known and not (path.name in files and is_regular(path))
    ]


def _leftover(path: Path) -> bool:
    return (INCOMING in path.name and is_staging(path)) or re.fullmatch(rf"\.[0-9]+{REMOVED}", path.name) is not None
