"""The tables of a comparison, for a terminal and for RESULTS.md.

Run: python -m evidence.benchmarks.table runs/compare.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from evidence.markdown import table

HEADINGS = ("", "batch", "images/s", "p50, ms", "times as long", "first answer, s", "memory, MB")


def main(arguments: Sequence[str]) -> None:
    """Print the tables of a file in Markdown."""
    figures = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    found = ((model, *row) for model, measured in figures["models"].items() for row in rows(measured))
    print(*table(("model", *HEADINGS), found, text=2), sep="\n")


def rows(measured: dict) -> Iterator[tuple[str, ...]]:
    """Yield the rows of one model, with cells in the order of ``HEADINGS``.

    There is one row per batch size and contender, then one per contender that failed.
    """
    for batch_size in dict.fromkeys(size for contender in measured.values() for size in contender["batches"]):
        for title, contender in measured.items():
            if found := contender["batches"].get(batch_size):
                yield (title, batch_size, *_figures(found, contender["start"]))
    for title, contender in measured.items():
        if "failed" in contender:
            yield (title, "", f"FAILED: {contender['failed']}", "", "", "", "")


def _figures(found: dict, start: dict) -> tuple[str, ...]:
    if "wrong" in found:
        return (f"WRONG: {found['wrong']}", "", "", "", "")
    return (
        f"{found['images_per_second']:.1f}",
        f"{1000 * found['p50_seconds']:,.0f}",
        f"{found['ratio']:.2f}" if found["ratio"] else "",
        _sum(start["client_seconds"], start["server_seconds"], ".1f"),
        _sum(found["peak_bytes"] / 1e6, found["server_peak_bytes"] / 1e6, ",.0f"),
    )


def _sum(client: float, server: float | None, form: str) -> str:
    """Format the client's figure, followed by "+" and the server's if there is a server."""
    return f"{client:{form}} + {server:{form}}" if server else f"{client:{form}}"


if __name__ == "__main__":
    main(sys.argv[1:])
