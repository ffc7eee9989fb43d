"""Write the report on a folder of runs: ``report.html`` and ``figures/*.png``, each file whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from clipweld.trainer.files import output_errors, replacing
from clipweld.trainer.report.figures import Picture
from clipweld.trainer.report.groups import sections
from clipweld.trainer.report.page import render, view
from clipweld.trainer.report.runs import read_runs

# Matches every file name that a report gives to figures, so that those of an earlier report can be removed.
FIGURE_NAME = re.compile(r"(section\d+-)?(comparison|accuracy|votes|overlap|parameters)(-\w+)?\.png")


def write_report(run: Path) -> Path:
    """Report on every ``sequence.json`` below a folder, and on the adapters beside each.

    Writes ``report.html``, which needs no other file, and the same figures as ``figures/*.png``. Everything is drawn
    before anything is written. Figures that only an earlier report had are removed.

    Returns:
        the page's path.

    Raises:
        ReportError: no such folder, no record below it, or a record that can't be read.
        OutputError: the page or a figure can't be written.
        AdapterError: an adapter beside a record is corrupted or can't be read.
    """
    run = Path(run)
    found = sections(read_runs(run))
    views = [view(section, f"section{number}-" if len(found) > 1 else "") for number, section in enumerate(found, 1)]
    page = render(views)
    _publish(run, page, [picture for one in views for picture in one.pictures])
    return run / "report.html"


def _publish(run: Path, page: str, pictures: Sequence[Picture]) -> None:
    """Write all files to temporary paths, then rename them. The page is entered first, so it is renamed last."""
    figures = run / "figures"
    files = {run / "report.html": page.encode()} | {figures / one.file_name: one.png for one in pictures}
    with ExitStack() as stack:
        for path, content in files.items():
            stack.enter_context(replacing(path)).write_bytes(content)
    for path in figures.iterdir():
        if FIGURE_NAME.fullmatch(path.name) and path not in files:
            with output_errors(path):
                path.unlink()
