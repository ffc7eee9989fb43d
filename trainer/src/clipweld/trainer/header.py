"""What our safetensors files say besides their tensors, read without the tensors and without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from clipweld.trainer.schemas import Json, read_json

ENTRY = "clipweld"  # the one metadata entry of our safetensors files
MAX_HEADER = 8 << 20  # bytes: metadata, and the names and shapes of all tensors


class ForeignFile(ValueError):
    """A safetensors file that something else wrote."""


def read_entry(path: Path) -> str:
    """The metadata entry of ours, JSON.

    Raises:
        OSError, SafetensorError, ValueError: not such a file, or one with a header that no file of ours has.
    """
    check_header(path)
    with safe_open(path, "np") as file:
        return entry_of(file.metadata())


def read_claims(path: Path) -> dict[str, Any] | None:
    """What an adapter says of itself, unproven; None where it can't be read: ``load_lineage`` names what is wrong."""
    try:
        claims = read_json(Json, read_entry(path))
    except (SafetensorError, OSError, ValueError):
        return None
    return claims


def check_header(path: Path) -> None:
    """Raises:
    OSError, ValueError: no regular file, or one with a header that no file of ours has.
    """
    if not path.is_file():
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > MAX_HEADER:
        raise ValueError(f"a header of {header:,} bytes, at most {MAX_HEADER:,} are read")


def entry_of(metadata: dict[str, str] | None) -> str:
    """Raises:
    ForeignFile: there is no entry of ours.
    """
    if metadata is None or ENTRY not in metadata:
        raise ForeignFile(f"no {ENTRY!r} in its metadata")
    return metadata[ENTRY]
