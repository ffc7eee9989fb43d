"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from trainer.errors import OutputError

ENTRY = "clipweld"  # the one metadata entry of our safetensors files
MAX_HEADER = 8 << 20  # bytes: metadata, and the names and shapes of all tensors


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to: it takes the place of ``path`` when the block ends well, else it is removed.

    What a killed process leaves behind is one hidden file, which the next write of the same path overwrites.

    Raises:
        OutputError: it can't be written; ``path`` is what it was.
    """
    staged = path.with_name(f".{path.name}.tmp")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield staged
            with staged.open("rb") as written:
                os.fsync(written.fileno())
            staged.replace(path)
        except BaseException:
            with suppress(OSError):
                staged.unlink()
            raise


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """What the operating system has against writing to ``path``, as an error of ours.

    Raises:
        OutputError: in place of any OSError.
    """
    try:
        yield
    except OSError as exc:
        raise OutputError(
            f"{path}: can't be written ({exc.strerror or exc}); make room, or give a place that can be written"
        ) from exc


def check_writable(folder: Path) -> None:
    """Refuse now what could not be written after hours.

    Raises:
        OutputError: not even a small file can be written to the folder, or where it would be made.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    with output_errors(folder), tempfile.TemporaryFile(dir=there) as file:
        file.write(b"-")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all.

    Raises:
        OutputError: it can't be written; ``path`` is what it was.
    """
    with replacing(path) as staged:
        staged.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def read_tensors(path: Path) -> tuple[str, dict[str, Tensor]]:
    """What ``write_tensors`` wrote: the metadata entry of ours, and the tensors, mapped from the file.

    Raises:
        OSError, SafetensorError, ValueError: not such a file, or one with a header that no file of ours has.
    """
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > MAX_HEADER:
        raise ValueError(f"a header of {header:,} bytes, at most {MAX_HEADER:,} are read")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if ENTRY not in metadata:
            raise ValueError(f"no {ENTRY!r} in its metadata")
        return metadata[ENTRY], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def canonical(said: dict[str, Any]) -> str:
    """JSON that is the same text whenever it says the same."""
    return json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def content_sha256(said: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Hash over all that a file says: its metadata, and names, shapes and numbers of its tensors."""
    digest = hashlib.sha256(canonical(said).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
