"""JSON from a file or a server, which is refused if parsing it would take too much memory."""

from __future__ import annotations

import json
from typing import Any

MAX_VALUES = 250_000  # limited too, as a list of one number takes fifty times the memory of its three bytes


def read_json(text: bytes, max_bytes: int) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it has more than ``max_bytes`` bytes or ``MAX_VALUES`` values, or is not JSON in UTF-8.
        RecursionError: it is nested too deeply.
    """
    if len(text) > max_bytes:
        raise ValueError(f"it has {len(text):,} bytes, at most {max_bytes:,} are read")
    if (values := sum(map(text.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise ValueError(f"it has {values:,} values, at most {MAX_VALUES:,} are read")
    return json.loads(text.decode())  # given bytes, json would also accept UTF-16 and UTF-32
