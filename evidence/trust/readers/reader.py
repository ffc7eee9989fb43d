"""The base class of readers, which write a corrupted file to a folder of their own and read it as clipweld does.

A file is refused with an error of one of the three packages. If it is accepted, the result must match its bytes.
"""

from __future__ import annotations

import json
import random
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipweld.client.errors import ClientError
from clipweld.exporter.errors import ExporterError
from clipweld.trainer.errors import TrainerError
from evidence.trust.mutations import corrupted_bytes, corrupted_json, json_text

REFUSALS = (TrainerError, ExporterError, ClientError)


class OtherMeaning(Exception):
    """A file was accepted, but the result differs from its content."""


class Reader(ABC):
    """The reader of one kind of file.

    Args:
        folder: an empty folder for the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def spoil(self, draw: random.Random) -> int:
        """Write a corrupted file, and return its size in bytes."""

    @abstractmethod
    def read(self) -> None:
        """Read the file as clipweld does.

        Raises:
            REFUSALS: the file is refused.
            OtherMeaning: the file is accepted, but the result differs from its content.
        """


@contextmanager
def reader(kind: type[Reader], folder: Path) -> Iterator[Reader]:
    """Yield a reader in a new folder, which is removed at the end."""
    folder.mkdir(parents=True)
    try:
        yield kind(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(file: Path, value: Any, draw: random.Random) -> int:
    """Write corrupted JSON to a file, and return its size; usually values are changed, otherwise bytes."""
    if draw.random() < 0.8:
        content = json_text(corrupted_json(value, draw), draw).encode("utf-8", "surrogatepass")
    else:
        content = corrupted_bytes(json.dumps(value).encode(), draw)
    if draw.random() < 0.005:
        content = b" " * (5 << 20)
    file.write_bytes(content)
    return len(content)
