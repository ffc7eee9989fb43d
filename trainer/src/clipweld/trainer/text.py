"""The words of a task: its name, the names of its classes, and its prompts.

A template's article directly before ``{}`` is dropped if the class name has its own: "a photo of a {}" with "the number
seven" becomes "a photo of the number seven". Nothing else is changed ("a apple" stays, as in CLIP). The client follows
the same rule for its labels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from clipweld.trainer.schemas import printable

MAX_NAME_BYTES = 200  # an adapter's file is named after its task
_OWN_ARTICLE = re.compile(r"\s*(?:an?|the)\s+\S", re.IGNORECASE)
_ARTICLE_BEFORE_NAME = re.compile(r"(?<![\w'-])(?:an?|the)\s+\{\}", re.IGNORECASE)


def prompt_of(template: str, class_name: str) -> str:
    """Put a class name into a template, with only one article."""
    if _OWN_ARTICLE.match(class_name):
        template = _ARTICLE_BEFORE_NAME.sub("{}", template)
    return template.replace("{}", class_name)


def task_name(name: str) -> str:
    """Return the name, if it can be a file name and can't be a path.

    Raises:
        ValueError: it has other characters, or is too long.
    """
    if not re.fullmatch(r"\w[\w .-]*", name) or len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(
            f"task name {name[:MAX_NAME_BYTES]!r}: use letters, digits, spaces, '_', '-' and '.', at most "
            f"{MAX_NAME_BYTES} bytes"
        )
    return name


def check_words(class_names: Sequence[str], templates: Sequence[str]) -> None:
    """Check class names and templates.

    Raises:
        ValueError: there are fewer than two classes or no templates, a class name is listed twice, a template doesn't
            have exactly one ``{}``, or a text isn't printable.
    """
    if len(class_names) < 2:
        raise ValueError(f"it has {len(class_names)} class; it takes two or more")
    seen: set[str] = set()
    for name in class_names:
        if name in seen:
            raise ValueError(f"class name {name!r} is listed twice; rename one")
        seen.add(name)
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} must hold exactly one {{}} for the class name")
    if not templates:
        raise ValueError("no prompt templates; give at least one, such as 'a photo of a {}'")
    for text in (*class_names, *templates):
        printable(text)
