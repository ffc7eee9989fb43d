"""Labels and prompts: checked, and encoded once."""

from __future__ import annotations

from collections.abc import Sequence

from client.errors import InvalidRequest, TooManyLabels

DEFAULT_TEMPLATES = ("a photo of a {}",)
MAX_PROMPTS = 1_000_000


def checked_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels as they are cached by.

    Raises:
        InvalidRequest: none, an empty one, one twice, or not a list of strings.
    """
    if isinstance(labels, str):
        raise InvalidRequest(f"labels is one string, {labels!r}; expected a list of strings")
    checked = tuple(labels)
    if not checked:
        raise InvalidRequest("labels is empty; expected at least one")
    seen = set()
    for label in checked:
        if not isinstance(label, str) or not label.strip():
            raise InvalidRequest(f"label {label!r} is not text; expected a word or more")
        if label in seen:
            raise InvalidRequest(f"label {label!r} is given twice; expected each label once")
        seen.add(label)
    return checked


def checked_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Templates as labels are cached by.

    Raises:
        InvalidRequest: none, one without ``{}``, or not a list of strings.
    """
    if isinstance(templates, str):
        raise InvalidRequest(f"templates is one string, {templates!r}; expected a list of strings")
    checked = tuple(templates)
    if not checked:
        raise InvalidRequest("templates is empty; expected at least one, or None for the default")
    for template in checked:
        if not isinstance(template, str) or "{}" not in template:
            raise InvalidRequest(f"template {template!r} has no {{}}; expected {{}} where the label goes")
    return checked


def prompts_of(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template with every label in it, the templates of one label side by side.

    Raises:
        TooManyLabels: their features would not fit into memory.
    """
    count = len(labels) * len(templates)
    if count > MAX_PROMPTS:
        raise TooManyLabels(
            f"{len(labels):,} labels with {len(templates):,} templates are {count:,} prompts; expected at most "
            f"{MAX_PROMPTS:,}: give fewer, or several calls"
        )
    return [template.replace("{}", label) for label in labels for template in templates]
