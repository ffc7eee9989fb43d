"""Labels from the command line: separated by commas, or from files, which may add prompts."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipweld.client._labels import DEFAULT_TEMPLATES
from clipweld.client.errors import InvalidRequest

MAX_BYTES = 64 << 20  # of a file of labels


def read_labels(values: Sequence[str]) -> tuple[list[str] | dict[str, Any], list[str]]:
    """Return all labels, in the order given.

    Args:
        values: each is either labels separated by commas, where a label that contains a comma is quoted as in a CSV
            file, or ``@FILE``: a file with one label per line, or a ``.json`` with a list of labels or an object of
            their prompts.

    Returns:
        The labels as a list or, if a file has prompts, as a dictionary from each label to its prompt or prompts, which
        are "a photo of a {}" for labels without any. And the labels that were given more than once, which count once.

    Raises:
        InvalidRequest: a file can't be read, or a label is given with two different sets of prompts.
    """
    found: dict[str, Any] = {}
    repeated: dict[str, None] = {}
    for value in values:
        for label, prompts in _of_file(value[1:]) if value.startswith("@") else _of_line(value):
            if label in found:
                if found[label] != prompts:
                    raise InvalidRequest(f"label {label!r} is given twice, with other prompts; give it once")
                repeated[label] = None
            found[label] = prompts
    if all(prompts is None for prompts in found.values()):
        return list(found), list(repeated)
    return {label: list(DEFAULT_TEMPLATES) if prompts is None else prompts for label, prompts in found.items()}, list(
        repeated
    )


def _of_line(value: str) -> list[tuple[str, Any]]:
    rows = csv.reader(_lines(value), skipinitialspace=True)
    return [(label.strip(), None) for row in rows for label in row if label.strip()]


def _of_file(name: str) -> list[tuple[str, Any]]:
    if not name:
        raise InvalidRequest("labels '@': no file is named; expected @FILE, with one label a line")
    try:
        with open(name, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as exc:
        raise InvalidRequest(
            f"labels file {name} cannot be read: {getattr(exc, 'strerror', None) or exc}; a label that itself begins "
            "with @ is given in quotes of its own: '\"@home\",work'"
        ) from exc
    if len(data) > MAX_BYTES:
        raise InvalidRequest(f"labels file {name} is too large: more than {MAX_BYTES:,} bytes")
    text = _decoded(data, name)
    if Path(name).suffix.lower() == ".json":
        found = _of_json(text, name)
    else:
        found = [(line.strip(), None) for line in _lines(text) if line.strip()]
    if not found:
        raise InvalidRequest(f"labels file {name} has no label; expected one a line")
    return found


def _decoded(data: bytes, name: str) -> str:
    """Decode UTF-8 with or without a byte order mark, or UTF-16 with one; Windows writes such files."""
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as exc:
        line = data[: exc.start].count(b"\n") + 1
        raise InvalidRequest(
            f"labels file {name}: line {line} is no {encoding.upper().removesuffix('-SIG')}; save it as UTF-8"
        ) from exc


def _of_json(text: str, name: str) -> list[tuple[str, Any]]:
    try:
        value = json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest(f"labels file {name} is no JSON that can be read ({exc})") from exc
    if isinstance(value, list) and all(isinstance(label, str) for label in value):
        return [(label, None) for label in value]
    if isinstance(value, dict):
        return list(value.items())
    raise InvalidRequest(
        f'labels file {name}: expected a list, ["cat", "dog"], or an object of prompts, {{"cat": "a photo of my cat"}}'
    )


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a label is listed twice")
    return found


def _lines(text: str) -> list[str]:
    return re.split(r"\r\n|\r|\n", text)
