"""Read the metadata of our safetensors files, without reading the tensors or importing torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from clipweld.trainer.schemas import Json, read_json

ENTRY = "clipweld"  # the one metadata entry of our safetensors files
MAX_HEADER = 8 << 20  # bytes: metadata, and the names and shapes of all tensors


class ForeignFile(ValueError):
    """A safetensors file that clipweld did not write."""


def read_entry(path: Path) -> str:
    """Return our metadata entry, which is JSON.

    Raises:
        OSError, SafetensorError, ValueError: it is not a safetensors file of ours, or its header is too large.
    """
    check_header(path)
    with safe_open(path, "np") as file:
        return entry_of(file.metadata())


def read_claims(path: Path) -> dict[str, Any] | None:
    """Return an adapter's metadata, unverified; None if it can't be read, in which case ``load_lineage`` says why."""
    try:
        claims = read_json(Json, read_entry(path))
    except (SafetensorError, OSError, ValueError):
        return None
    return claims


def check_header(path: Path) -> None:
    """Check that a file is a regular file with a header of at most MAX_HEADER bytes.

    Raises:
        OSError, ValueError: it is not, or it can't be read.
    """
    if not path.is_file():
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > MAX_HEADER:
        raise ValueError(f"a header of {header:,} bytes, at most {MAX_HEADER:,} are read")


def entry_of(metadata: dict[str, str] | None) -> str:
    """Return our entry in a file's metadata.

    Raises:
        ForeignFile: there is no such entry.
    """
    if metadata is None or ENTRY not in metadata:
        raise ForeignFile(f"no {ENTRY!r} in its metadata")
    return metadata[ENTRY]
