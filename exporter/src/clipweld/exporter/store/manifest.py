"""The manifest: a version's origin, its checks, and the hashes of its files."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path

from clipweld.exporter.errors import VersionDamaged
from clipweld.exporter.graph import onnx_file
from clipweld.exporter.graph.onnx_file import DATA_FILE
from clipweld.exporter.store.layout import KINDS, Layout, part_file
from clipweld.exporter.store.schemas import File
from clipweld.trainer.schemas import sha256_of


def to_text(manifest: Mapping) -> str:
    """Return the content of a manifest file."""
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def check_files(repository: Layout, number: int) -> None:
    """Compare a version's files, in the store and in the repository, with its manifest.

    Raises:
        VersionDamaged: a file is missing, altered, a link, or has data that is not in the manifest.
        RepositoryError: the manifest can't be read.
    """
    expected = repository.manifest(number)["files"]
    for part in dict.fromkeys((*KINDS, *expected)):
        stored, kind = part_file(repository.store / str(number), part), part.partition("/")[0]
        _check_file(stored, expected.get(part))
        standing = repository.model(kind) / str(number) / stored.name
        if kind in KINDS and standing.parent.exists() and not (standing.exists() and standing.samefile(stored)):
            _check_file(standing, expected.get(part))
    for part in expected:
        if not part.endswith(DATA_FILE):
            _check_data(part_file(repository.store / str(number), part), expected, part)


def _check_file(file: Path, expected: File | None) -> None:
    """Check type and size before hashing, because reading a device or pipe may never end."""
    if expected is None:
        raise VersionDamaged(f"{file}: the manifest doesn't say what it must be; merge again")
    try:
        found = file.lstat()
        if not stat.S_ISREG(found.st_mode) or file.parent.is_symlink():
            raise VersionDamaged(f"{file}: is a link, or not a regular file; merge again, or restore it")
        if found.st_size != expected["bytes"]:
            raise VersionDamaged(
                f"{file}: has {found.st_size:,} bytes, the manifest says {expected['bytes']:,}: it was altered or cut "
                "off; merge again, or restore it"
            )
        digest = sha256_of(file)
    except OSError as exc:
        raise VersionDamaged(f"{file}: can't be read ({exc.strerror}); merge again, or restore it") from exc
    if digest != expected["sha256"]:
        raise VersionDamaged(
            f"{file}: its SHA-256 is {digest[:8]}, the manifest says {expected['sha256'][:8]}: it was altered "
            "or cut off; merge again, or restore it"
        )


def _check_data(file: Path, expected: Mapping[str, File], part: str) -> None:
    """Require external weights of a graph to be listed in the manifest."""
    beside = any(tensor.external_data for tensor in onnx_file.load(file).graph.initializer)
    if beside and f"{part}/{DATA_FILE}" not in expected:
        raise VersionDamaged(f"{file}: the manifest doesn't say what its {DATA_FILE} must be; merge again")
