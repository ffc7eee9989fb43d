"""The words of a task: what it and its classes are called, and its prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.records import printable

MAX_NAME_BYTES = 200  # adapters are files of their task's name


def task_name(name: str) -> str:
    """A name that is also a file's, and never a path.

    Raises:
        ValueError: other characters, or too long.
    """
    if not re.fullmatch(r"\w[\w .-]*", name) or len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(
            f"task name {name[:MAX_NAME_BYTES]!r}: use letters, digits, spaces, '_', '-' and '.', at most "
            f"{MAX_NAME_BYTES} bytes"
        )
    return name


def check_words(class_names: Sequence[str], templates: Sequence[str]) -> None:
    """Raises:
    ValueError: fewer than two classes, one that stands twice, or prompts without exactly one ``{}``.
    """
    if len(class_names) < 2:
        raise ValueError(f"it has {len(class_names)} class; it takes two or more")
    seen: set[str] = set()
    for name in class_names:
        if name in seen:
            raise ValueError(f"class name {name!r} stands twice; rename one")
        seen.add(name)
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} must hold exactly one {{}} for the class name")
    if not templates:
        raise ValueError("no prompt templates; give at least one, such as 'a photo of a {}'")
    for text in (*class_names, *templates):
        printable(text)
