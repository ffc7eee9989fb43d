"""A user's own images: a folder in torchvision's ImageFolder layout.

The layout is ``FOLDER/train/<class>/*`` and ``FOLDER/test/<class>/*``, or a single tree ``FOLDER/<class>/*`` that is
split 80/20 with a fixed seed. The split folders may also be called ``training``, ``testing``, ``val``, ``valid`` or
``validation``, in any case; validation images become the test images if there is no test split, and are left out
otherwise. Class names are the folders' names, with ``_`` and ``-`` read as spaces, unless ``classes.txt`` lists others,
one per line, in the folders' sorted order. Prompt templates come from ``templates.txt``, one per line; the default is
``a photo of a {}``.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from clipweld.trainer.errors import TaskDataMissing, TaskInvalid
from clipweld.trainer.preprocessing import open_image
from clipweld.trainer.schemas import one_line, printable
from clipweld.trainer.tasks.naming import LISTS, folded, lines_of, names_of
from clipweld.trainer.tasks.split import split_by_seed
from clipweld.trainer.tasks.task import Images, Origin, Task
from clipweld.trainer.tasks.tree import (
    Tree,
    beside,
    class_folders,
    folders_in,
    image_files,
    listed,
    read_tree,
    suffixes,
)
from clipweld.trainer.text import task_name

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TEMPLATES = ("a photo of a {}",)
SPELLINGS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "val": "val", "valid": "val", "validation": "val",
}  # fmt: skip


def load(folder: Path, name: str | None = None, templates: tuple[str, ...] = ()) -> Task:
    """Load the task in a folder.

    Args:
        name: name of the task; the folder's if None.
        templates: prompt templates; those of ``templates.txt``, or the default, if empty.

    Raises:
        TaskDataMissing: there is no such folder.
        TaskInvalid: fewer than two classes, a class without training images, a test class that is not a training class,
            or no test images.
    """
    name = _task_name(folder, name)
    layout = _layout(folder)
    train = read_tree(layout.train, () if layout.test else LISTS)
    warnings = [*layout.warnings, *_nesting(layout.train, train)]
    if len(train.classes) < 2:
        raise TaskInvalid(
            f"task folder {layout.train}: it has 1 class, {train.classes[0]!r}; it takes two or more, each with a "
            "folder of its own"
        )
    if empty := train.empty():
        raise _no_images(layout.train, empty[0])
    if layout.test:
        test = _matched(read_tree(layout.test), train, layout.train, layout.test)
        left_out = beside(folder, LISTS) + train.left_out + test.left_out
        images = {"train": _images(train), "test": _images(test)}
    else:
        left_out = train.left_out
        images = split_by_seed(_images(train), f"task folder {folder}")
    names, doubts = names_of(folder, train.classes)
    return Task(
        name=name,
        class_names=names,
        templates=templates or lines_of(folder, "templates.txt") or TEMPLATES,
        load=images.__getitem__,
        source=str(folder),
        origin=Origin(train.classes, +left_out, layout.notes, (*warnings, *doubts)),
    )


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the class names of a folder's task, without listing what is in the class folders.

    Raises:
        TaskInvalid: there are no classes.
    """
    return names_of(folder, tuple(class_folders(_layout(folder).train)))[0]


@dataclass(frozen=True)
class _Layout:
    """Where the splits of a folder are.

    Attributes:
        train: folder with the class folders of the training images.
        test: the same for the test images; None if they are drawn from ``train``.
        notes: what a user should know about the layout.
        warnings: what a user should check.
    """

    train: Path
    test: Path | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def _layout(folder: Path) -> _Layout:
    """Find the splits by their folders' names, in any case.

    Raises:
        TaskInvalid: the training or test split is missing, two folders are the same split, or there are class folders
            beside a single split.
    """
    splits: dict[str, str] = {}
    others = []
    for name in folders_in(folder):
        split = _split(name)
        if split is None:
            others.append(name)
        elif split in splits:
            raise TaskInvalid(
                f"task folder {folder}: {splits[split]!r} and {name!r} are both its {split} split; merge or rename one"
            )
        else:
            splits[split] = name
    if not splits:
        return _Layout(folder)
    named = ", ".join(map(repr, splits.values()))
    if others and not ("train" in splits and len(splits) > 1):
        raise TaskInvalid(
            f"task folder {folder}: {named} is named like a split, but lies beside {listed(others)}; give train/ and "
            f"test/, or rename it, if it is a class ({next(iter(splits.values()))}_ is read as the same class name)"
        )
    for split in ("train", "test"):
        if split not in splits and (split == "train" or "val" not in splits):
            raise TaskInvalid(f"task folder {folder}: {split}/ is missing beside {named}; give both train/ and test/")
    notes: tuple[str, ...] = ()
    if "val" in splits:
        notes = (f"{splits['val']}/ {'is left out' if 'test' in splits else 'is its test split'}",)
    return _Layout(
        train=folder / splits["train"],
        test=folder / splits.get("test", splits.get("val", "")),
        notes=notes,
        warnings=(f"left out beside {named}: folder {listed(others)}",) if others else (),
    )


def _split(name: str) -> str | None:
    """Return the split that a folder of this name holds, if any."""
    return SPELLINGS.get(unicodedata.normalize("NFKC", name).strip().casefold())


def _nesting(folder: Path, tree: Tree) -> list[str]:
    """Refuse class folders that hold splits; return a warning if they only look as if they did.

    Raises:
        TaskInvalid: a class folder holds splits; names it.
    """
    inner = {name: folders_in(folder / place) for name, place in class_folders(folder).items()}
    for name, within in inner.items():
        if len({_split(other) for other in within} - {None}) > 1:
            raise TaskInvalid(
                f"task folder {folder}: class folder {name!r} holds splits ({listed(within)}); if it is the task, give "
                f"{folder / name}, else move the splits up: train/<class>/ and test/<class>/"
            )
    same = {tuple(within) for within in inner.values()}
    direct = {os.path.dirname(file) for file in tree.files} & {str(folder / place) for place in inner}
    if len(inner) > 1 and len(same) == 1 and len(min(same)) > 1 and not direct:
        return [
            f"classes {listed(list(inner))} hold the same folders ({listed(min(same))}); if they are splits, name them "
            "train and test"
        ]
    return []


def _matched(test: Tree, train: Tree, train_folder: Path, test_folder: Path) -> Tree:
    """Return the test images with the labels of the training classes.

    Raises:
        TaskInvalid: a test class is not a training class, or there are no test images.
    """
    place = {name: label for label, name in enumerate(train.classes)}
    for name in test.classes:
        if name not in place:
            near = [other for other in train.classes if folded(other) == folded(name)]
            step = f"{train_folder.name}/ has {near[0]!r}: spell both alike" if near else "add it, or remove it there"
            raise TaskInvalid(
                f"task folder {train_folder.parent}: class {name!r} is in one of {train_folder.name}/ and "
                f"{test_folder.name}/ only, the latter; {step}"
            )
    if not test.files:
        raise TaskInvalid(f"task folder {test_folder}: no images in any class; known: {_known()}")
    labels = [place[test.classes[label]] for label in test.labels]
    return Tree(train.classes, test.files, labels, test.left_out)


def _no_images(folder: Path, name: str) -> TaskInvalid:
    """Return the error for a class without images, which says what its folder holds instead."""
    held: Counter[str] = Counter()
    image_files(folder / class_folders(folder)[name], held)
    instead = ", ".join(f"{count:,} {kind}" for kind, count in held.most_common(3) if count) or "nothing"
    return TaskInvalid(f"task folder {folder}: no images in class {name!r}, but {instead}; known: {_known()}")


def _known() -> str:
    return " ".join(sorted(suffixes()))


def _task_name(folder: Path, name: str | None) -> str:
    """Return the name of a folder's task, in Unicode's composed form (NFC).

    Raises:
        TaskDataMissing: there is no such folder.
        TaskInvalid: the folder's path is not printable, or the name is not valid for a task.
    """
    if not os.path.isdir(folder):  # pathlib's is_dir raises for some invalid names
        step = "give one with train/<class>/ and test/<class>/"
        if os.path.exists(folder):
            raise TaskDataMissing(f"task folder {folder}: is a file; unpack it, or {step}")
        raise TaskDataMissing(f"task folder {one_line(str(folder))}: no such folder; {step}")
    try:
        printable(str(folder))
    except ValueError as exc:
        raise TaskInvalid(f"task folder {os.fsencode(folder)!r}: its path is no printable UTF-8; rename it") from exc
    try:
        return task_name(unicodedata.normalize("NFC", folder.resolve().name if name is None else name))
    except ValueError as exc:
        raise TaskInvalid(f"task folder {folder}: {exc}; name it with --name NAME or as NAME=FOLDER") from exc


def _images(tree: Tree) -> Images:
    return Images(
        labels=tree.labels,
        open=lambda index: open_image(tree.files[index]),
        name_of=lambda index: one_line(tree.files[index]),
        files=tree.files,
    )
