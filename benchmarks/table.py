"""The tables of a comparison, for a terminal and for RESULTS.md.

Run: python -m benchmarks.table runs/compare.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

HEADINGS = (
    "",
    "batch",
    "images/s",
    "p50, ms",
    "times as long",
    "first answer, s",
    "memory, MB",
)


def main(arguments: Sequence[str]) -> None:
    """Print the tables of a file in Markdown."""
    figures = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    print(f"| {' | '.join(['model', *HEADINGS])} |")
    print(f"|---|---|{'---:|' * (len(HEADINGS) - 1)}")
    for model, measured in figures["models"].items():
        for row in rows(measured):
            print(f"| {' | '.join([model, *row])} |")


def rows(measured: dict) -> Iterator[tuple[str, ...]]:
    """One row a contender and batch size of one model, in the order of ``HEADINGS``."""
    for title, contender in measured.items():
        start = _start(contender["start"])
        if "failed" in contender:
            yield (title, "", f"FAILED: {contender['failed']}", "", "", start, "")
        for batch_size, found in contender.get("batches", {}).items():
            if "wrong" in found:
                yield (title, batch_size, f"WRONG: {found['wrong']}", "", "", start, "")
                continue
            memory = "".join(f" + {found[key] / 1e6:,.0f}" for key in ("server_peak_bytes",) if found[key])
            yield (
                title,
                batch_size,
                f"{found['images_per_second']:.1f}",
                f"{1000 * found['p50_seconds']:.0f}",
                f"{found['ratio']:.2f}" if found["ratio"] else "",
                start,
                f"{found['peak_bytes'] / 1e6:,.0f}{memory}",
            )


def _start(start: dict | None) -> str:
    """Seconds from a fresh process to the first answer; of a server and then of its client."""
    if not start:
        return ""
    server = f" + {start['server_seconds']:.1f}" if start["server_seconds"] else ""
    return f"{start['client_seconds']:.1f}{server}"


if __name__ == "__main__":
    main(sys.argv[1:])
