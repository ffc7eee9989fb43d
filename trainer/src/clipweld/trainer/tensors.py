"""Read and write safetensors files with one metadata entry of ours, and hash their content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from clipweld.trainer.files import replacing
from clipweld.trainer.header import check_header, entry_of


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        OutputError: it can't be written; ``path`` is unchanged.
    """
    with replacing(path) as staged:
        staged.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def read_tensors(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Read what ``write_tensors`` wrote: our metadata entry, and the tensors, mapped from the file.

    Raises:
        ForeignFile: it is a safetensors file without our entry.
        OSError, SafetensorError, ValueError: it is not a safetensors file, or its header is too large.
    """
    check_header(path)
    with safe_open(path, "pt") as file:
        return entry_of(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def canonical(said: dict[str, Any]) -> str:
    """Return JSON that is the same text for equal values."""
    return json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def content_sha256(said: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return a hash over a file's metadata, and the names, shapes and numbers of its tensors."""
    digest = hashlib.sha256(canonical(said).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
