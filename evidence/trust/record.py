"""The record of one run of these commands, from which TRUST.md is made."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console


class Record:
    """The figures of a run and the broken promises that it found, written to a file at the end.

    Args:
        out: the file to write.

    Attributes:
        figures: counts and measurements, as JSON types.
        broken: one line per broken promise, with what is needed to reproduce it.
    """

    def __init__(self, out: Path) -> None:
        self.figures: dict[str, Any] = {}
        self.broken: list[str] = []
        self._out, self._began = out, time.monotonic()

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write the file and print the figures; exit with status 1 if a promise was broken."""
        if exc is not None:
            return
        module = sys.modules["__main__"].__spec__
        command = ["python", "-m", module.name if module else "?", *sys.argv[1:]]
        record = {
            "command": shlex.join(command),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._began, 1),
            "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
            "figures": self.figures,
            "broken": self.broken,
        }
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        Console().print_json(data=self.figures)
        for line in self.broken:
            print(f"BROKEN: {line}", file=sys.stderr)
        if self.broken:
            raise SystemExit(1)
