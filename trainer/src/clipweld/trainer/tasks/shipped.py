"""The small tasks that ship with clipweld: real images of 64 pixels in ZIP archives, without a download."""

from __future__ import annotations

import functools
import io
import json
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image

from clipweld.trainer import mini
from clipweld.trainer.tasks.task import Images, Task

FOLDER = mini.FOLDER / "tasks"


@functools.cache
def _catalogue() -> dict[str, dict[str, Any]]:
    return json.loads((FOLDER / "tasks.json").read_text(encoding="utf-8"))


def names() -> tuple[str, ...]:
    """Return the names of all shipped tasks."""
    return tuple(_catalogue())


def lists() -> dict[str, tuple[str, ...]]:
    """Return the shipped tasks by the list that they are in: ``mini``, and ``mini-unseen``, which no setting used."""
    found: dict[str, tuple[str, ...]] = {}
    for name, entry in _catalogue().items():
        found[entry["list"]] = (*found.get(entry["list"], ()), name)
    return found


def load(name: str) -> Task:
    """Load a shipped task by name."""
    entry = _catalogue()[name]
    class_names = tuple(entry["class_names"])
    return Task(
        name=name,
        class_names=class_names,
        templates=tuple(entry["templates"]),
        load=lambda split: _images(FOLDER / f"{name}.zip", split, class_names),
        source="shipped",
    )


def _images(path: Path, split: str, class_names: tuple[str, ...]) -> Images:
    """Read the members ``<split>/<class>/<file>`` of an archive into memory, all at once because it is small."""
    with zipfile.ZipFile(path) as archive:
        members = sorted(name for name in archive.namelist() if name.startswith(f"{split}/") and not name.endswith("/"))
        encoded = [archive.read(name) for name in members]
    return Images(
        labels=[class_names.index(name.split("/")[1]) for name in members],
        open=lambda index: Image.open(io.BytesIO(encoded[index])),
        name_of=lambda index: f"{path}:{members[index]}",
    )
