"""Checkpoint files that anyone may have written: what is looked at before open_clip reads one."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import open_clip
import torch
from open_clip.pretrained import get_pretrained_url

from trainer.records import sha256_of

# OpenAI's own TorchScript archives, by the hash in their addresses.
OPENAI_SHA256 = frozenset(
    found[1]
    for model, tag in open_clip.list_pretrained()
    if (found := re.search(r"/([0-9a-f]{64})/[^/]+\.pt$", get_pretrained_url(model, tag)))
)


def is_torchscript(file: Path) -> bool:
    """Whether a file is a TorchScript archive; a checkpoint of torch.save is a zip too, without constants.pkl."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(Path(name).name == "constants.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError):
        return False


def check_weights_file(file: Path) -> None:
    """Prove that reading a file runs no program and takes no memory beyond its own size.

    Raises:
        ValueError: a TorchScript archive that isn't OpenAI's own, NumPy's arrays, or tensors larger than the file.
        Exception: torch's own, where it is no checkpoint of weights alone.
    """
    if is_torchscript(file):
        if sha256_of(file) not in OPENAI_SHA256:
            raise ValueError("a TorchScript archive is a program, and this is none of OpenAI's own")
        return
    if file.suffix in (".npy", ".npz"):
        raise ValueError("NumPy's arrays are no checkpoint of these models")
    if file.suffix == ".safetensors":
        return
    size, zipped = file.stat().st_size, zipfile.is_zipfile(file)
    if zipped:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > size or any(entry.compress_type for entry in entries):
            raise ValueError("its parts are compressed or overlap, which torch.save never does")
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError("no dictionary of tensors, nor one in its 'state_dict'")
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.nbytes > size:
            raise ValueError(f"tensor {name!r} {tuple(tensor.shape)} is larger than the file")
