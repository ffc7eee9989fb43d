"""A user's own images: a folder in torchvision's ImageFolder layout.

``FOLDER/train/<class>/*`` and ``FOLDER/test/<class>/*``, or one tree ``FOLDER/<class>/*`` that is split 80/20 by a
fixed seed. Class names are the folders' names, with ``_`` and ``-`` read as spaces, unless ``classes.txt`` lists
others, one a line, in the folders' sorted order. Prompt templates come from ``templates.txt``, one a line, else
``a photo of a {}``.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten

from PIL import Image
from torchvision.datasets import ImageFolder

from trainer.errors import TaskDataMissing, TaskInvalid
from trainer.tasks.split import split_by_seed
from trainer.tasks.task import SPLITS, Images, Task

TEMPLATES = ("a photo of a {}",)


def load(folder: Path, name: str | None = None, templates: tuple[str, ...] = ()) -> Task:
    """The task that a folder holds.

    Args:
        name: what to call the task; the folder's name when None.
        templates: prompts; ``templates.txt`` or the default when empty.

    Raises:
        TaskDataMissing: no such folder.
        TaskInvalid: no classes, a class without images, or splits of different classes.
    """
    if not folder.is_dir():
        raise TaskDataMissing(f"task folder {folder}: no such folder; give one with train/<class>/ and test/<class>/")
    splits = {split: folder / split for split in SPLITS}
    if any(path.is_dir() for path in splits.values()):
        missing = [str(path) for path in splits.values() if not path.is_dir()]
        if missing:
            raise TaskInvalid(f"task folder {folder}: {missing[0]} is missing; give both train/ and test/, or neither")
        trees = {split: _tree(path) for split, path in splits.items()}
        if trees["train"].classes != trees["test"].classes:
            odd = sorted(set(trees["train"].classes) ^ set(trees["test"].classes))
            raise TaskInvalid(f"task folder {folder}: class {odd[0]!r} is in one of train/ and test/ only")
        images = {split: _images(tree) for split, tree in trees.items()}
        classes = trees["train"].classes
    else:
        tree = _tree(folder)
        images, classes = split_by_seed(_images(tree)), tree.classes
    return Task(
        name=name or folder.resolve().name,
        class_names=_lines(folder / "classes.txt", len(classes))
        or tuple(c.replace("_", " ").replace("-", " ") for c in classes),
        templates=templates or _lines(folder / "templates.txt") or TEMPLATES,
        load=images.__getitem__,
        source=str(folder),
    )


def _tree(folder: Path) -> ImageFolder:
    try:
        return ImageFolder(str(folder))
    except FileNotFoundError as exc:  # torchvision's word for no class folders and for a class without images
        raise TaskInvalid(f"task folder {folder}: {shorten(str(exc), 200, placeholder=' ...')}") from exc


def _images(tree: ImageFolder) -> Images:
    return Images(
        labels=tree.targets,
        open=lambda index: Image.open(tree.samples[index][0]),
        name_of=lambda index: tree.samples[index][0],
    )


def _lines(path: Path, expected: int | None = None) -> tuple[str, ...]:
    """The lines of an optional text file that aren't blank."""
    if not path.is_file():
        return ()
    lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if expected is not None and len(lines) != expected:
        raise TaskInvalid(f"{path}: {len(lines)} class names for {expected} class folders; give one line a class")
    return lines
