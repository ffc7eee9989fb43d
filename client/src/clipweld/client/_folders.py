"""Folders of images. Whatever is left out of them is counted and reported."""

from __future__ import annotations

import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clipweld.client._image_files import FORMATS
from clipweld.client.errors import BadImage

# What operating systems, network drives and archives put beside people's files.
HIDDEN = frozenset(
    {
        "@eadir", "@recently-snapshot", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "__macosx",
        "desktop.ini", "ehthumbs.db", "icon\r", "lost+found", "system volume information", "thumbs.db",
    }
)  # fmt: skip
# Why something is left out, in singular and plural.
REASONS = {
    "unreadable folder": ("folder that cannot be read", "folders that cannot be read"),
    "linked folder": ("linked folder", "linked folders"),
    "dangling link": ("link that leads nowhere", "links that lead nowhere"),
    "special file": ("pipe, socket or device", "pipes, sockets or devices"),
    "no image": ("file that is no image", "files that are no images"),
    "named twice": ("image named twice", "images named twice"),
    "hidden": ("hidden file or folder", "hidden files and folders"),
}


@dataclass(frozen=True)
class LeftOut:
    """Something in a folder that is not classified: a file that is not an image, or a folder that is not entered.

    Attributes:
        path: its path.
        reason: "unreadable folder", "linked folder" (followed only if it is given itself), "dangling link", "special
            file", "no image" (by its ending) or "hidden" (its name begins with a dot, or is one that systems use, such
            as ``Thumbs.db`` and ``@eaDir``).
    """

    path: str
    reason: str


class Tally:
    """A count of what was left out, by reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, left_out: LeftOut) -> None:
        """Count one item."""
        self.counts[left_out.reason] += 1
        self._first.setdefault(left_out.reason, left_out.path)

    def __str__(self) -> str:
        parts = []
        for reason, (one, several) in REASONS.items():
            if count := self.counts[reason]:
                such_as = self._first[reason] if count == 1 else f"such as {self._first[reason]}"
                parts.append(f"{count:,} {one if count == 1 else several} ({such_as})")
        return ", ".join(parts)


def image_files(folder: Path, report: Callable[[LeftOut], object] | None = None) -> Iterator[Path]:
    """Yield the files below a folder that have an image's ending, sorted within each folder.

    Args:
        folder: walked with its subfolders; links to folders are not followed.
        report: called with whatever is left out. None: a warning at the end sums it up, unless all of it was hidden.

    Raises:
        BadImage: there is no image, or the folder itself can't be read.
    """
    tally, found, known = Tally(), False, endings()

    def leave_out(path: str, reason: str) -> None:
        left_out = LeftOut(path, reason)
        tally.add(left_out)
        if report is not None:
            report(left_out)

    def unreadable(error: OSError) -> None:
        if error.filename == str(folder):
            raise BadImage(f"folder {folder} cannot be read: {error.strerror}") from error
        leave_out(error.filename, "unreadable folder")

    for path, folders, files in os.walk(folder, onerror=unreadable):
        entered = []
        for name in sorted(folders):
            if reason := _folder_reason(path, name):
                leave_out(os.path.join(path, name), reason)
            else:
                entered.append(name)
        folders[:] = entered
        for name in sorted(files):
            if reason := _file_reason(path, name, known):
                leave_out(os.path.join(path, name), reason)
            else:
                found = True
                yield Path(path, name)
    if not found:
        others = f" (left out: {tally})" if tally.counts else ""
        raise BadImage(f"folder {folder} has no images; expected files such as .jpg or .png in it or below{others}")
    if report is None and tally.counts.keys() - {"hidden"}:
        warnings.warn(f"folder {folder}: left out {tally}", stacklevel=2)


def endings() -> frozenset[str]:
    """Return the endings of image names, in lower case: all that Pillow registers for the formats that are read."""
    read = {*FORMATS, "MPO"}  # what Pillow calls a JPEG of several images
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in read)


def is_hidden(name: str) -> bool:
    """Whether a system or a program created it, so that it neither is nor contains an image."""
    return name.startswith(".") or name.casefold() in HIDDEN


def _folder_reason(path: str, name: str) -> str:
    if is_hidden(name):
        return "hidden"
    return "linked folder" if os.path.islink(os.path.join(path, name)) else ""


def _file_reason(path: str, name: str, known: frozenset[str]) -> str:
    if is_hidden(name):
        return "hidden"
    if os.path.splitext(name)[1].lower() not in known:
        return "no image"
    whole = os.path.join(path, name)
    try:
        return "" if stat.S_ISREG(os.stat(whole).st_mode) else "special file"
    except OSError:  # a file that is not a link is kept: reading it will report why it can't be read
        return "dangling link" if os.path.islink(whole) else ""
