"""What a run of one of these commands found, kept for TRUST.md."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console


class Record:
    """Figures of a run and the promises that it saw broken, written to a file at the end.

    Args:
        out: where to.

    Attributes:
        figures: what was counted and measured, as JSON types.
        broken: one line for each promise that did not hold, with what is needed to see it again.
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
        """Write the file and print the figures; status 1 if anything was broken."""
        if exc is not None:
            return
        module = sys.modules["__main__"].__spec__
        command = ["python", "-m", module.name if module else "?", *sys.argv[1:]]
        record = {
            "command": shlex.join(command),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
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
