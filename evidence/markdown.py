"""The one writer of Markdown tables: those in the documents are what the commands here print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, text: int) -> Iterator[str]:
    """The lines of a table.

    Args:
        rows: cells, one per heading; None and "" are empty ones.
        text: how many columns, from the left, are text; the others are numbers, and flush right.
    """
    yield _line(headings)
    yield f"|{'---|' * text}{'---:|' * (len(headings) - text)}"
    for row in rows:
        if len(row) != len(headings):
            raise ValueError(f"{len(row)} cells under {len(headings)} headings: {row}")
        yield _line(row)


def _line(cells: Sequence[object]) -> str:
    return "|" + "".join(" |" if cell in (None, "") else f" {cell} |" for cell in cells)
