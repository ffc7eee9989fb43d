"""List class folders and the image files below them, without opening a file, and count what is left out."""

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

# Names, in lower case, that operating systems and network shares create in folders. Names with a leading dot are hidden
# anyway.
CLUTTER = {
    "@eadir", "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
    "#recycle", "#snapshot", "@recycle", "@tmp", "@recently-snapshot", "lost+found", "icon\r",
}  # fmt: skip
SHOWN = 5  # names in one message


@dataclass(frozen=True)
class Tree:
    """Image files by class, as in torchvision's ImageFolder, but links to folders aren't followed: they may form loops.

    Attributes:
        classes: names of the class folders in Unicode's composed form (NFC), sorted.
        files: paths of all images, class by class, sorted within a class.
        labels: class index of every file.
        left_out: how many entries were left out, by kind.
    """

    classes: tuple[str, ...]
    files: list[str]
    labels: list[int]
    left_out: Counter[str]

    def empty(self) -> list[str]:
        """Return the names of the classes without an image."""
        found = set(self.labels)
        return [name for label, name in enumerate(self.classes) if label not in found]


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of image files in lower case: all that Pillow knows for the supported formats."""
    read = {*FORMATS, "MPO"}  # a JPEG file with several images
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in read)


def is_hidden(name: str) -> bool:
    """Return whether an entry was created by a system or a program, and so is neither a class nor an image."""
    return name.startswith(".") or name.casefold() in CLUTTER


def folders_in(folder: Path) -> list[str]:
    """Return the names of the folders in a folder that aren't hidden, sorted; includes links to folders.

    Raises:
        TaskInvalid: the folder can't be read.
    """
    return sorted(name for name, is_folder in _entries(folder) if is_folder and not is_hidden(name))


def class_folders(folder: Path) -> dict[str, str]:
    """Return a mapping of class names in NFC to the names of their folders, sorted by class name.

    Raises:
        TaskInvalid: there are no class folders, two names are equal in NFC, or one is not printable text.
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
    """List the images below the class folders; links to folders within them are not followed.

    Args:
        known: names, in lower case, of files beside the class folders that don't count as left out.

    Raises:
        TaskInvalid: there are no class folders, one can't be read, or one is a link to another or to a folder that
            contains it.
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
    """Return the first of many names, for a message."""
    shown = ", ".join(map(repr, names[:SHOWN]))
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN:,} more"


def _check_places(folder: Path, names: list[str]) -> None:
    """Refuse class folders that link to another class folder, or to a folder that contains them all."""
    around = [(status.st_dev, status.st_ino) for status in map(os.stat, (folder, *folder.resolve().parents))]
    seen = dict.fromkeys(around, "the folder that holds it")
    for name in names:
        status = os.stat(folder / name)
        place = (status.st_dev, status.st_ino)
        if place in seen:
            raise TaskInvalid(f"task folder {folder}: class folder {name!r} is a link to {seen[place]}; remove it")
        seen[place] = repr(name)


def beside(folder: Path, known: Sequence[str] = ()) -> Counter[str]:
    """Count the entries beside the class folders, by kind, except files with a name in ``known`` (in lower case)."""
    left_out: Counter[str] = Counter()
    for name, is_folder in _entries(folder):
        if is_hidden(name):
            left_out["hidden"] += 1
        elif not is_folder and name.lower() not in known:
            left_out["images outside class folders" if _is_image(name) else _kind(name)] += 1
    return left_out


def image_files(folder: Path, left_out: Counter[str]) -> list[str]:
    """Return the image files below a folder, sorted by folder, then by name; count the rest in ``left_out``."""

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
    """Return the names in a folder, and whether each is a folder or a link to one.

    Raises:
        TaskInvalid: the folder can't be read.
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
    """Return the kind of a file that is left out: its suffix, if that is plain text."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if suffix.isascii() and suffix.isprintable() and 1 < len(suffix) <= 10 else "without a known suffix"


def _no_text(name: str) -> str:
    """Return what is wrong with a folder's name, which is quoted with unusual characters escaped."""
    raw = os.fsencode(name)
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return f"the folder name {raw!r} is not valid UTF-8"
    return f"the folder name {name!a} is blank or holds control characters"


def _unreadable(folder: Path, exc: OSError) -> TaskInvalid:
    return TaskInvalid(f"task folder {folder}: can't be read ({exc.strerror}); make it readable")
