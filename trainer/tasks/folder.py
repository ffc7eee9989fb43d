"""A user's own images: a folder in torchvision's ImageFolder layout.

``FOLDER/train/<class>/*`` and ``FOLDER/test/<class>/*``, or one tree ``FOLDER/<class>/*`` that is split 80/20 by a
fixed seed. Class names are the folders' names, with ``_`` and ``-`` read as spaces, unless ``classes.txt`` lists
others, one a line, in the folders' sorted order. Prompt templates come from ``templates.txt``, one a line, else
``a photo of a {}``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import TaskDataMissing, TaskInvalid
from trainer.preprocessing import open_image
from trainer.records import MAX_BYTES, one_line
from trainer.tasks.split import split_by_seed
from trainer.tasks.task import SPLITS, Images, Task

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
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
        class_names=_class_names(folder, classes),
        templates=templates or _lines(folder / "templates.txt") or TEMPLATES,
        load=images.__getitem__,
        source=str(folder),
    )


def class_names(folder: Path) -> tuple[str, ...]:
    """What the classes of a folder are called, found without looking into theirs.

    Raises:
        TaskInvalid: no classes.
    """
    train = folder / "train"
    return _class_names(folder, _classes(train if train.is_dir() else folder))


def _class_names(folder: Path, classes: Sequence[str]) -> tuple[str, ...]:
    written = _lines(folder / "classes.txt", len(classes))
    return written or tuple(name.replace("_", " ").replace("-", " ") for name in classes)


@dataclass(frozen=True)
class _Tree:
    """As torchvision's ImageFolder, which follows links in circles.

    Attributes:
        classes: names of the class folders, sorted.
        files: of all classes, class after class, each folder's sorted.
        labels: index of the class of every file.
    """

    classes: list[str]
    files: list[str]
    labels: list[int]


def _tree(folder: Path) -> _Tree:
    """The images below the class folders; links to folders within them are not followed."""
    classes, files, labels = _classes(folder), [], []
    for label, name in enumerate(classes):
        found = list(_image_files(folder / name))
        if not found:
            raise TaskInvalid(f"task folder {folder}: no images in class {name!r}; known: {' '.join(IMG_EXTENSIONS)}")
        files += found
        labels += [label] * len(found)
    return _Tree(classes, files, labels)


def _classes(folder: Path) -> list[str]:
    """Names of the class folders, sorted."""
    try:
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as exc:
        raise TaskInvalid(f"task folder {folder}: can't be read ({exc.strerror}); make it readable") from exc
    if not classes:
        raise TaskInvalid(f"task folder {folder}: no class folders in it; give one folder a class")
    return classes


def _image_files(folder: Path) -> Iterator[str]:
    def refuse(exc: OSError) -> None:
        raise TaskInvalid(f"task folder {exc.filename}: can't be read ({exc.strerror}); make it readable") from exc

    for path, _, names in sorted(os.walk(folder, onerror=refuse)):
        for name in sorted(names):
            if name.lower().endswith(IMG_EXTENSIONS):
                yield os.path.join(path, name)


def _images(tree: _Tree) -> Images:
    return Images(
        labels=tree.labels,
        open=lambda index: open_image(tree.files[index]),
        name_of=lambda index: one_line(tree.files[index]),
    )


def _lines(path: Path, expected: int | None = None) -> tuple[str, ...]:
    """The lines of an optional text file that aren't blank."""
    if not path.exists():
        return ()
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise TaskInvalid(f"{path}: not a regular file of at most {MAX_BYTES:,} bytes; give one line of text each")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise TaskInvalid(f"{path}: can't be read ({exc}); save it as UTF-8") from exc
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if expected is not None and len(lines) != expected:
        raise TaskInvalid(f"{path}: {len(lines)} class names for {expected} class folders; give one line a class")
    return lines
