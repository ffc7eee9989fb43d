"""Class folders and the image files below them, listed without opening any; what is left out is counted."""

from __future__ import annotations

import functools
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clipweld.trainer.errors import TaskInvalid
from clipweld.trainer.preprocessing import FORMATS
from clipweld.trainer.schemas import printable

# What systems and shares leave in folders, besides names that begin with a dot.
CLUTTER = {
    "@eadir", "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
    "#recycle", "#snapshot", "@recycle", "@tmp", "@recently-snapshot", "lost+found", "icon\r",
}  # fmt: skip
SHOWN = 5  # of many names in one message


@dataclass(frozen=True)
class Tree:
    """As torchvision's ImageFolder, which follows links in circles.

    Attributes:
        classes: names of the class folders in Unicode's composed form (NFC), sorted.
        files: of all classes, class after class, each folder's sorted.
        labels: index of the class of every file.
        left_out: how many entries were left out, by kind.
    """

    classes: tuple[str, ...]
    files: list[str]
    labels: list[int]
    left_out: Counter[str]

    def empty(self) -> list[str]:
        """Names of the classes without an image."""
        found = set(self.labels)
        return [name for label, name in enumerate(self.classes) if label not in found]


@functools.cache
def suffixes() -> frozenset[str]:
    """What the names of images end with: all that Pillow gives the formats that are decoded, in lower case."""
    read = {*FORMATS, "MPO"}  # a JPEG of several images
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in read)


def is_hidden(name: str) -> bool:
    """Whether an entry was left by a system or a program, so that it is neither a class nor an image."""
    return name.startswith(".") or name.casefold() in CLUTTER


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in a folder that aren't hidden, sorted; links to folders count.

    Raises:
        TaskInvalid: it can't be read.
    """
    return sorted(name for name, is_folder in _entries(folder) if is_folder and not is_hidden(name))


def class_folders(folder: Path) -> dict[str, str]:
    """Class names in NFC -> names of their folders, sorted by the former.

    Raises:
        TaskInvalid: there are none, two are one name, or one that is no text.
    """
    found: dict[str, str] = {}
    for name in folders_in(folder):
        try:
            composed = unicodedata.normalize("NFC", printable(name))
        except ValueError as exc:
            raise TaskInvalid(f"task folder {folder}: {_no_text(name)}; rename it") from exc
        if composed in found:
            raise TaskInvalid(
                f"task folder {folder}: class folders {found[composed]!a} and {name!a} are one name in two "
                "Unicode forms; merge them"
            )
        found[composed] = name
    if not found:
        loose = sum(_is_image(name) for name, _ in _entries(folder))
        has = f"{loose:,} images and no class folders" if loose else "no class folders"
        raise TaskInvalid(f"task folder {folder}: {has} in it; give each class a folder of its own")
    return dict(sorted(found.items()))


def read_tree(folder: Path, known: Sequence[str] = ()) -> Tree:
    """The images below the class folders; links to folders within them are not followed.

    Args:
        known: files beside them that aren't left out, by their names in lower case.

    Raises:
        TaskInvalid: no class folders, or one that can't be read or is another.
    """
    found = class_folders(folder)
    _check_places(folder, list(found.values()))
    left_out = beside(folder, known)
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(found.values()):
        images = image_files(folder / name, left_out)
        files += images
        labels += [label] * len(images)
    return Tree(tuple(found), files, labels, left_out)


def listed(names: Sequence[str]) -> str:
    """Some of many names, for a message."""
    shown = ", ".join(map(repr, names[:SHOWN]))
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN:,} more"


def _check_places(folder: Path, names: list[str]) -> None:
    """Refuse links among the class folders that make one folder two classes, or the whole tree a class."""
    around = [(status.st_dev, status.st_ino) for status in map(os.stat, (folder, *folder.resolve().parents))]
    seen = dict.fromkeys(around, "the folder that holds it")
    for name in names:
        status = os.stat(folder / name)
        place = (status.st_dev, status.st_ino)
        if place in seen:
            raise TaskInvalid(f"task folder {folder}: class folder {name!r} is a link to {seen[place]}; remove it")
        seen[place] = repr(name)


def beside(folder: Path, known: Sequence[str] = ()) -> Counter[str]:
    """Count the entries beside the class folders, by kind, except files of these names (in lower case)."""
    left_out: Counter[str] = Counter()
    for name, is_folder in _entries(folder):
        if is_hidden(name):
            left_out["hidden"] += 1
        elif not is_folder and name.lower() not in known:
            left_out["images outside class folders" if _is_image(name) else _kind(name)] += 1
    return left_out


def image_files(folder: Path, left_out: Counter[str]) -> list[str]:
    """Image files below a folder, sorted by their folders, then their names; counts the rest in ``left_out``."""

    def refuse(exc: OSError) -> None:
        raise _unreadable(Path(exc.filename), exc) from exc

    walked = []
    for path, folders, names in os.walk(folder, onerror=refuse):
        visible = [name for name in folders if not is_hidden(name)]
        left_out["hidden"] += len(folders) - len(visible)
        left_out["linked folders"] += sum(os.path.islink(os.path.join(path, name)) for name in visible)
        folders[:] = visible
        walked.append((path, names))
    found = []
    for path, names in sorted(walked):
        for name in sorted(names):
            if is_hidden(name):
                left_out["hidden"] += 1
            elif _is_image(name):
                found.append(os.path.join(path, name))
            else:
                left_out[_kind(name)] += 1
    return found


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """Names in a folder, each with whether it is a folder or a link to one.

    Raises:
        TaskInvalid: it can't be read.
    """
    try:
        with os.scandir(folder) as entries:
            return [(entry.name, _is_folder(entry)) for entry in entries]
    except OSError as exc:
        raise _unreadable(folder, exc) from exc


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(name: str) -> bool:
    return not is_hidden(name) and os.path.splitext(name)[1].lower() in suffixes()


def _kind(name: str) -> str:
    """What to call a file that is left out: by its suffix."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if suffix.isascii() and suffix.isprintable() and 1 < len(suffix) <= 10 else "without a known suffix"


def _no_text(name: str) -> str:
    """What is wrong with a folder's name, and the name with its odd characters escaped."""
    raw = os.fsencode(name)
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return f"the folder name {raw!r} is not valid UTF-8"
    return f"the folder name {name!a} is blank or holds control characters"


def _unreadable(folder: Path, exc: OSError) -> TaskInvalid:
    return TaskInvalid(f"task folder {folder}: can't be read ({exc.strerror}); make it readable")
