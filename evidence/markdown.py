"""The writer of Markdown tables. The tables in the documents are the output of the commands in this package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, text: int) -> Iterator[str]:
    """Yield the lines of a table.

    Args:
        rows: cells, one per heading; None and "" give an empty cell.
        text: number of text columns, counted from the left; the others hold numbers and are right-aligned.
    """
    yield _line(headings)
    yield f"|{'---|' * text}{'---:|' * (len(headings) - text)}"
    for row in rows:
        if len(row) != len(headings):
            raise ValueError(f"{len(row)} cells under {len(headings)} headings: {row}")
        yield _line(row)


def _line(cells: Sequence[object]) -> str:
    return "|" + "".join(" |" if cell in (None, "") else f" {cell} |" for cell in cells)
