"""Files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to: it takes the place of ``path`` when the block ends well, else it is removed.

    What a killed process leaves behind is one hidden file, which the next write of the same path overwrites.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.tmp")
    try:
        yield staged
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all."""
    with replacing(path) as staged:
        staged.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))
