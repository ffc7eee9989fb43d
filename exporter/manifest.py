"""The manifest: where a version comes from, how it was checked, and what its files must be."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from exporter.config import OPSET
from exporter.errors import VersionDamaged
from exporter.repository import KINDS, Repository

if TYPE_CHECKING:  # reading a manifest needs neither torch nor open_clip
    from exporter.parity import Parity
    from trainer.adapter import Adapter

FORMAT = 1
TOOLS = ("clipweld", "torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")


def manifest(
    card: dict, architecture: str, adapters: Sequence[Adapter], models: Mapping[str, bytes], parity: Parity
) -> dict:
    """Everything about a version that its files don't say themselves.

    Args:
        card: what the version says of itself to clients.
        architecture: the name by which open_clip builds its model.
        models: by kind, the bytes of each ``model.onnx``.
    """
    return {
        "format": FORMAT,
        "model": card["model"],
        "version": card["version"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "base": {**card["base"], "architecture": architecture},
        "lineage": [{"task": adapter.task, "sha256": adapter.sha256} for adapter in adapters],
        "precision": "fp32",
        "opset": OPSET,
        "parity": asdict(parity),
        "files": {
            kind: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for kind, content in models.items()
        },
        "tools": {"python": platform.python_version(), **{tool: found for tool in TOOLS if (found := _version(tool))}},
    }


def to_text(manifest: Mapping) -> str:
    """The file's content."""
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def check_files(repository: Repository, number: int) -> None:
    """Hold a version's files, in the store and where they stand, against its manifest.

    Raises:
        VersionDamaged: a file is missing or not what was written.
        RepositoryError: the manifest can't be read.
    """
    expected = repository.manifest(number).get("files", {})
    for kind in KINDS:
        stored = repository.file(kind, number)
        standing = repository.model(kind) / str(number) / stored.name
        files = [stored]
        if standing.exists() and not (stored.exists() and standing.samefile(stored)):
            files.append(standing)
        for file in files:
            _check_file(file, expected.get(kind, {}).get("sha256"))


def _check_file(file: Path, expected: str | None) -> None:
    try:
        with file.open("rb") as opened:
            digest = _sha256(opened)
    except OSError as exc:
        raise VersionDamaged(f"{file}: can't be read ({exc.strerror}); merge again, or restore it") from exc
    if digest != expected:
        raise VersionDamaged(
            f"{file}: its SHA-256 is {digest[:8]}, the manifest says {str(expected)[:8]}: it was altered "
            "or cut off; merge again, or restore it"
        )


def _sha256(opened: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := opened.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _version(tool: str) -> str | None:
    try:
        return version(tool)
    except PackageNotFoundError:
        return None
