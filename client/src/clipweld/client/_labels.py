"""Labels and their prompts: validation, and filling in templates.

An article directly before ``{}`` is dropped if the label has its own: "a photo of a {}" with "the number seven" becomes
"a photo of the number seven". Nothing else in a template or a label is changed ("a apple" remains, as in CLIP). In
training, class names are put into templates by the same rule (`clipweld.trainer.text`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipweld.client.errors import InvalidRequest, TooManyLabels

Labels = Iterable[str] | Mapping[str, str | Sequence[str]]
"""What images may show: labels, or a mapping of each label to its prompt or prompts."""

DEFAULT_TEMPLATES = ("a photo of a {}",)
MAX_PROMPTS = 1_000_000
_OWN_ARTICLE = re.compile(r"\s*(?:an?|the)\s+\S", re.IGNORECASE)
_ARTICLE_BEFORE_LABEL = re.compile(r"(?<![\w'-])(?:an?|the)\s+\{\}", re.IGNORECASE)


@dataclass(frozen=True)
class Wording:
    """Labels, and the prompts that represent them to the text tower.

    Attributes:
        labels: the labels.
        templates: prompts for every label, with ``{}``.
        own: prompts of each label, in the order of the labels, with or without ``{}``; they replace the templates.
        learned: whether the labels come from a task, not from the caller.
    """

    labels: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    own: tuple[tuple[str, ...], ...] | None = None
    learned: bool = False

    def prompts(self) -> list[list[str]]:
        """Return the prompts of each label.

        Raises:
            TooManyLabels: there are more than ``MAX_PROMPTS``, whose features would not fit into memory.
        """
        own = self.own or (self.templates,) * len(self.labels)
        count = sum(map(len, own))
        if count > MAX_PROMPTS:
            each = "prompts of their own" if self.own else f"{len(self.templates):,} templates"
            raise TooManyLabels(
                f"{len(self.labels):,} labels with {each} are {count:,} prompts; expected at most "
                f"{MAX_PROMPTS:,}: give fewer, or several calls"
            )
        return [
            [prompt_of(template, label) for template in templates]
            for label, templates in zip(self.labels, own, strict=True)
        ]

    def check_told_apart(self, tokens: Sequence[np.ndarray], context_length: int) -> None:
        """Refuse labels from the caller that the model can't tell apart.

        Args:
            tokens: tokens of each label's prompts, int32 (num_prompts, seq_len), zero-padded.
            context_length: longest text of the model, in tokens.

        Raises:
            InvalidRequest: all prompts of two labels have the same tokens; the message names the labels.
        """
        if self.learned:  # users of a version can't change its tasks
            return
        seen: dict[tuple[bytes, ...], str] = {}
        for label, rows in zip(self.labels, tokens, strict=True):
            other = seen.setdefault(tuple(sorted(row.tobytes() for row in rows)), label)
            if other != label:
                cut = rows.shape[1] == context_length and rows[:, -1].all()
                why = f", cut at {context_length} tokens," if cut else ""
                raise InvalidRequest(
                    f"labels {other!r} and {label!r} become the same tokens{why} in every prompt, so the model can't "
                    "tell them apart; leave one out, or word it differently"
                )


def prompt_of(template: str, label: str) -> str:
    """Put a label into a template, with only one article."""
    if _OWN_ARTICLE.match(label):
        template = _ARTICLE_BEFORE_LABEL.sub("{}", template)
    return template.replace("{}", label)


def checked_labels(labels: Labels, templates: tuple[str, ...] | None) -> Wording:
    """Validate labels and return them in a form that can be a key of a cache.

    Args:
        labels: a mapping gives prompts too. A set is sorted, since its own order is arbitrary.
        templates: as returned by `checked_templates`; None: the default.

    Raises:
        InvalidRequest: there are none, one is blank or given twice, they are not a list of strings, or there are both
            prompts and templates.
    """
    names = _texts(labels, "label", "labels", "expected a list of strings, or a mapping of each to its prompts")
    if not names:
        raise InvalidRequest("labels is empty; expected at least one")
    seen = set()
    for label in names:
        if not label.strip():
            raise InvalidRequest(f"label {label!r} is not text; expected a word or more")
        if label in seen:
            raise InvalidRequest(f"label {label!r} is given twice; expected each label once")
        seen.add(label)
    if not isinstance(labels, Mapping):
        return Wording(names, DEFAULT_TEMPLATES if templates is None else templates)
    if templates is not None:
        raise InvalidRequest("labels bring their own prompts, and templates are given too; give one of both")
    own = ((value,) if isinstance(value := labels[name], str) else value for name in labels)
    return Wording(names, own=tuple(_checked_prompts(name, value) for name, value in zip(names, own, strict=True)))


def checked_templates(templates: Iterable[str]) -> tuple[str, ...]:
    """Validate templates and return them in a form that can be part of a cache's key.

    Raises:
        InvalidRequest: there are none, one has no ``{}``, or they are not a list of strings.
    """
    checked = _texts(templates, "template", "templates", "expected a list of strings")
    if not checked:
        raise InvalidRequest("templates is empty; expected at least one, or None for the default")
    for template in checked:
        if "{}" not in template:
            raise InvalidRequest(f"template {template!r} has no {{}}; expected {{}} where the label goes")
    return checked


def _checked_prompts(label: str, prompts: Iterable[str]) -> tuple[str, ...]:
    checked = _texts(prompts, f"prompt of label {label!r}", f"prompts of label {label!r}", "expected a list of strings")
    if not checked or not all(prompt.strip() for prompt in checked):
        raise InvalidRequest(f"label {label!r} has no prompt, or an empty one; expected one or more")
    return checked


def _texts(values: Any, one: str, all_of_them: str, expected: str) -> tuple[str, ...]:
    """Return plain strings, in order; a set is sorted.

    Raises:
        InvalidRequest: the values are one string, an array of several dimensions, or not strings.
    """
    if isinstance(values, str):
        raise InvalidRequest(f"{all_of_them} is one string, {values!r}; {expected}")
    if not isinstance(values, Iterable) or isinstance(values, bytes) or getattr(values, "ndim", 1) != 1:
        raise InvalidRequest(f"{all_of_them} is of type {type(values).__name__}; {expected}")
    listed = list(values)
    for value in listed:
        if not isinstance(value, str):
            raise InvalidRequest(f"{one} {value!r} is not text but {type(value).__name__}; {expected}")
    texts = (str.__str__(value) for value in listed)  # turns subclasses of str, such as NumPy's, into plain strings
    return tuple(sorted(texts) if isinstance(values, (set, frozenset)) else texts)
