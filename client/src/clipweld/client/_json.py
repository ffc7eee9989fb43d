"""JSON from a file or a server, refused before it costs memory."""

from __future__ import annotations

import json
from typing import Any

MAX_VALUES = 250_000  # a list of one number costs fifty times its three bytes


def read_json(text: bytes, max_bytes: int) -> Any:
    """What JSON says.

    Raises:
        ValueError: larger than ``max_bytes``, of more than ``MAX_VALUES``, or not JSON in UTF-8.
        RecursionError: nested too deeply.
    """
    if len(text) > max_bytes:
        raise ValueError(f"it has {len(text):,} bytes, at most {max_bytes:,} are read")
    if (values := sum(map(text.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise ValueError(f"it has {values:,} values, at most {MAX_VALUES:,} are read")
    return json.loads(text.decode())  # of bytes, json would take what is not UTF-8
