"""Class names for prompts: from the names of the class folders, or from ``classes.txt``."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from clipweld.trainer.errors import TaskInvalid
from clipweld.trainer.tasks.text_file import read_lines
from clipweld.trainer.tasks.tree import listed

LISTS = ("classes.txt", "templates.txt")
MAX_PAIRS = 12  # of folders and class names, in a warning


def names_of(folder: Path, classes: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Return the class names to use in prompts, and warnings about doubtful ones.

    Raises:
        TaskInvalid: two folders would have the same class name, or one an empty name, or ``classes.txt`` doesn't have
            one name per folder.
    """
    written = lines_of(folder, "classes.txt")
    if not written:
        names = tuple(map(spaced, classes))
        for name, count in Counter(names).items():
            if count > 1 or not name:
                alike = [own for own, other in zip(classes, names, strict=True) if other == name]
                raise TaskInvalid(
                    f"task folder {folder}: class folder {listed(alike)} would become class name {name!r}; rename one, "
                    "or give all their names in classes.txt"
                )
        return names, []
    if len(written) != len(classes):
        raise TaskInvalid(
            f"{folder / 'classes.txt'}: {len(written)} class names for {len(classes)} class folders; give one line a "
            "class"
        )
    keys, lines = ([folded(name) for name in names] for names in (classes, written))
    by_key = dict(zip(lines, written, strict=True))
    if by_key.keys() == set(keys) and len(by_key) == len(keys):  # the folders' own names, in any order
        return tuple(by_key[key] for key in keys), []
    misplaced = any(key in by_key and key != line for key, line in zip(keys, lines, strict=True))
    if not misplaced and sorted(classes, key=_natural) == list(classes):
        return written, []
    pairs = [f"{own!r} -> {name!r}" for own, name in zip(classes, written, strict=True)]
    more = f" and {len(pairs) - MAX_PAIRS} more" if len(pairs) > MAX_PAIRS else ""
    return written, [f"classes.txt names the folders in sorted order: {', '.join(pairs[:MAX_PAIRS])}{more}; check them"]


def spaced(name: str) -> str:
    """Return a folder's name as written in a prompt, with spaces for ``_`` and ``-``."""
    return " ".join(name.replace("_", " ").replace("-", " ").split())


def folded(name: str) -> str:
    """Return a key that different spellings of one class name share."""
    return spaced(unicodedata.normalize("NFKC", name)).casefold()


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key for natural sorting: 2 before 10, ignoring case."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts if part]


def lines_of(folder: Path, name: str) -> tuple[str, ...]:
    """Return the lines of an optional file in a task's folder; its name may be in any case.

    Raises:
        TaskInvalid: two files have this name, one has its suffix twice, or its content is not valid (``read_lines``).
    """
    found = sorted(entry for entry in os.listdir(folder) if entry.lower() == name)
    if len(found) > 1:
        raise TaskInvalid(f"task folder {folder}: {found[0]} and {found[1]} are both its {name}; remove one")
    if not found and (slip := [entry for entry in os.listdir(folder) if entry.lower() == f"{name}.txt"]):
        raise TaskInvalid(f"task folder {folder}: {slip[0]} has its suffix twice; rename it to {name}, or remove it")
    return read_lines(folder / found[0]) if found else ()
