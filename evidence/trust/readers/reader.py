"""A reader puts a corrupted file into a folder of its own and reads it as the product does.

Refusals are errors of the product's families. What is accepted must mean what its bytes say.
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
    """A file was accepted as something that it doesn't say."""


class Reader(ABC):
    """One kind of file.

    Args:
        folder: empty, to work in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def spoil(self, draw: random.Random) -> int:
        """Put a corrupted file in place; its size in bytes."""

    @abstractmethod
    def read(self) -> None:
        """Read it as the product does.

        Raises:
            REFUSALS: it is refused.
            OtherMeaning: it is accepted for what it isn't.
        """


@contextmanager
def reader(kind: type[Reader], folder: Path) -> Iterator[Reader]:
    """A reader in a folder that is removed at the end."""
    folder.mkdir(parents=True)
    try:
        yield kind(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(file: Path, value: Any, draw: random.Random) -> int:
    """A file of JSON that is corrupted, as JSON mostly, else as bytes."""
    if draw.random() < 0.8:
        content = json_text(corrupted_json(value, draw), draw).encode("utf-8", "surrogatepass")
    else:
        content = corrupted_bytes(json.dumps(value).encode(), draw)
    if draw.random() < 0.005:
        content = b" " * (5 << 20)
    file.write_bytes(content)
    return len(content)
