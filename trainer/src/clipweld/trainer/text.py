"""The words of a task: what it and its classes are called, and its prompts.

A template's article directly before ``{}`` goes where the class name brings its own: "a photo of a {}" with "the number
seven" is "a photo of the number seven". Nothing else is changed ("a apple" stays, as in CLIP). The client words labels
by the same rule.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from clipweld.trainer.schemas import printable

MAX_NAME_BYTES = 200  # adapters are files of their task's name
_OWN_ARTICLE = re.compile(r"\s*(?:an?|the)\s+\S", re.IGNORECASE)
_ARTICLE_BEFORE_NAME = re.compile(r"(?<![\w'-])(?:an?|the)\s+\{\}", re.IGNORECASE)


def prompt_of(template: str, class_name: str) -> str:
    """The template with the class name in it, under one article."""
    if _OWN_ARTICLE.match(class_name):
        template = _ARTICLE_BEFORE_NAME.sub("{}", template)
    return template.replace("{}", class_name)


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
    ValueError: fewer than two classes, one that is listed twice, or prompts without exactly one ``{}``.
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
