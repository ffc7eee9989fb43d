"""Files of tensors: safetensors with one metadata entry of ours, and the hash over all that such a file says."""

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
    """A safetensors file, whole or not at all.

    Raises:
        OutputError: it can't be written; ``path`` is what it was.
    """
    with replacing(path) as staged:
        staged.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def read_tensors(path: Path) -> tuple[str, dict[str, Tensor]]:
    """What ``write_tensors`` wrote: the metadata entry of ours, and the tensors, mapped from the file.

    Raises:
        ForeignFile: a safetensors file without an entry of ours.
        OSError, SafetensorError, ValueError: not such a file, or one with a header that no file of ours has.
    """
    check_header(path)
    with safe_open(path, "pt") as file:
        return entry_of(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


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
