"""Checks of ``--out`` for another library's checkpoint, made before any weights are loaded."""

from __future__ import annotations

import os
from pathlib import Path

from clipweld.exporter.errors import CheckpointError

FILE = ".safetensors"
OTHER_FILES = (".pt", ".pth", ".bin", ".ckpt", ".onnx")


def check_out(target: str, out: Path) -> None:
    """Refuse a path that can't be written, that is taken, or whose extension does not fit the format.

    Raises:
        CheckpointError: says why, and what to give instead.
    """
    if not out.absolute().name or out == Path("."):
        raise CheckpointError(f"checkpoint {out}: it has no name; give the folder to make with --out")
    ending = out.suffix.lower()
    if ending in OTHER_FILES or (ending == FILE and (target != "open_clip" or out.suffix != FILE)):
        kinds = f"a folder, or a file that ends in {FILE}" if target == "open_clip" else "a folder"
        raise CheckpointError(f"checkpoint {out}: --to {target} writes {kinds}; give --out {out.with_suffix('')}")
    check_free(out)
    there = next(place for place in out.absolute().parents if place.exists())
    if not there.is_dir():
        raise CheckpointError(f"checkpoint {out}: {there} is no folder; give another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CheckpointError(f"checkpoint {out}: {there} can't be written to; give another --out")


def check_free(out: Path) -> None:
    """Raises:
    CheckpointError: the path is taken; an empty folder is free where a folder will be written.
    """
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir() or out.suffix == FILE:
        raise CheckpointError(f"checkpoint {out}: it is there already; remove it, or give another --out")
    if any(out.iterdir()):
        raise CheckpointError(f"checkpoint {out}: the folder is not empty; remove it, or give another --out")
