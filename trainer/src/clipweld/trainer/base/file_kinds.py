"""The format of a weights file, detected from its first bytes because its suffix may be wrong."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path
from typing import Literal

from clipweld.trainer.base.model_names import WEIGHTS_SUFFIXES
from clipweld.trainer.errors import WeightsError

Kind = Literal["safetensors", "zip", "pickle", "torchscript"]

HEAD = 1024  # bytes
MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, safetensors' own limit
FETCH = "fetch the file itself, again"
UNPACK = "unpack it, and give the checkpoint that is in it"
OTHER = "give a checkpoint of open_clip: safetensors, or torch.save(model.state_dict(), FILE)"

# First bytes of foreign formats, the reason for the refusal, and the next step.
BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "it is a Git LFS pointer, not the file itself", "run: git lfs pull"),
    (b"/annex/objects/", "it is a pointer of git-annex, not the file itself", "run: git annex get"),
    (b"\x1f\x8b", "it is compressed (gzip)", UNPACK),
    (b"BZh", "it is compressed (bzip2)", UNPACK),
    (b"\xfd7zXZ\x00", "it is compressed (xz)", UNPACK),
    (b"\x28\xb5\x2f\xfd", "it is compressed (zstd)", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "it is a 7z archive", UNPACK),
    (b"Rar!", "it is a RAR archive", UNPACK),
    (b"\x93NUMPY", "it is an array of NumPy", OTHER),
    (b"\x89HDF", "it is HDF5, as Keras and TensorFlow write it", OTHER),
    (b"GGUF", "it is GGUF, of llama.cpp", OTHER),
    (b"\x89PNG", "it is an image (PNG)", OTHER),
    (b"\xff\xd8\xff", "it is an image (JPEG)", OTHER),
    (b"%PDF", "it is a PDF", OTHER),
    (b"\x7fELF", "it is a program", OTHER),
)


def kind_of(file: Path) -> Kind:
    """Return the format of a weights file.

    Raises:
        WeightsError: it is missing, can't be opened, or is no checkpoint; names its format and the next step.
    """
    try:
        size = _size(file)
        with file.open("rb") as opened:
            head = opened.read(HEAD)
    except OSError as exc:
        raise refusal(file, f"it can't be read ({exc.strerror})", "make it readable, or give another file") from exc
    _check_foreign(file, head, size)
    if _is_safetensors(file, head, size):
        return "safetensors"
    if head.startswith(b"PK"):
        return _kind_of_zip(file)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "pickle"
    raise refusal(file, f"it begins with {head[:8].hex(' ')}, as no checkpoint does", OTHER)


def refusal(file: Path, what: str, step: str) -> WeightsError:
    """Return the error for a file that holds no weights, or unusable ones."""
    return WeightsError(f"weights {str(file)!r} could not be loaded: {what}; {step}")


def _size(file: Path) -> int:
    """Return the size in bytes of a regular file."""
    if not file.exists():
        if file.is_symlink():
            raise refusal(file, f"it is a link to {os.readlink(file)}, which is not there", FETCH)
        raise refusal(file, "there is no such file", "see to the path")
    status = file.stat()
    if file.is_dir():
        inside = sorted(found for found in file.iterdir() if found.suffix in WEIGHTS_SUFFIXES)
        best = max(inside, key=lambda found: found.name.startswith("open_clip"), default=None)
        raise refusal(file, "it is a folder", f"give the file in it: --pretrained {best}" if best else "give a file")
    if not stat.S_ISREG(status.st_mode):
        raise refusal(file, "it is no regular file", "write the weights to a file first")
    if not status.st_size:
        raise refusal(file, "it is empty", FETCH)
    return status.st_size


def _check_foreign(file: Path, head: bytes, size: int) -> None:
    for beginning, what, step in BEGINNINGS:
        if head.startswith(beginning):
            raise refusal(file, what, step)
    if head[257:262] == b"ustar":
        raise refusal(file, "it is a tar archive", UNPACK)
    if head[4:8] == b"TFL3" or file.suffix.lower() == ".pb":
        raise refusal(file, "it is a model of TensorFlow", OTHER)
    if file.suffix.lower() == ".onnx" or (head[:1] == b"\x08" and head[2:3] == b"\x12" and b"pytorch" in head[:32]):
        raise refusal(file, "it is an ONNX graph", OTHER)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html")):
        raise refusal(file, "it is an HTML page, which a download gave in place of the file", FETCH)
    if text.startswith(b"<?xml"):
        raise refusal(file, "it is XML, such as a server's answer in place of the file", FETCH)
    if not _is_text(head):
        return
    if file.name.lower().endswith(".index.json"):
        raise refusal(file, "it lists the parts of a checkpoint in several files", "give the checkpoint as one file")
    raise refusal(file, f"it is {'JSON' if text[:1] in (b'{', b'[') else 'plain text'}, no checkpoint", OTHER)


def _is_text(head: bytes) -> bool:
    """Whether bytes are UTF-8 text, possibly cut off within a character."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as exc:
        if exc.start < len(head) - 3:
            return False
        text = head[: exc.start].decode("utf-8")
    return all(character.isprintable() or character in "\t\r\n\f\ufeff" for character in text)


def _is_safetensors(file: Path, head: bytes, size: int) -> bool:
    """Whether bytes begin as safetensors do: with the length of the header, then a JSON object."""
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{" or length > MAX_SAFETENSORS_HEADER:
        return False
    if length > size - 8:
        raise refusal(file, f"it is cut off: {size:,} bytes, its header alone has {length:,}", FETCH)
    return True


def _kind_of_zip(file: Path) -> Kind:
    try:
        with zipfile.ZipFile(file) as archive:
            names = [Path(name).name for name in archive.namelist()]
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as exc:
        raise refusal(file, "it is a zip archive, cut off or corrupted", FETCH) from exc
    if any(name.endswith(".npy") for name in names):
        raise refusal(file, "it holds arrays of NumPy", OTHER)
    if "constants.pkl" in names:
        return "torchscript"
    if "data.pkl" not in names:
        raise refusal(file, "it is a zip archive, and torch.save did not write it", UNPACK)
    return "zip"
