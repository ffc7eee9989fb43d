"""The runs of a study as the tables of RESULTS.md.

Run: python -m trainer.studies.tables runs/results/methods
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import tyro

from trainer.config import MEASURES
from trainer.report.groups import Group, Section, sections
from trainer.report.page import as_text, signed
from trainer.report.runs import read_runs

HEADER = (
    "| | runs | Transfer | to zero-shot | Average | Last | to the first row | Forgetting | trained | kept a task |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def main(run: tyro.conf.Positional[tuple[Path, ...]], space: str = "task") -> None:
    """Print one Markdown table for each model and set of tasks.

    Args:
        run: folders that hold runs of 'trainer sequence'.
        space: label space, 'task' or 'union'.
    """
    print("\n".join(table(run, space)))


def table(folders: Sequence[Path], space: str) -> Iterator[str]:
    """Markdown: a row for each method and settings, mean and standard deviation over seeds and orders."""
    for section in sections([run for folder in folders for run in read_runs(folder)]):
        yield HEADER
        before, end = as_text(section.zero_shot_transfer(space)), as_text(section.zero_shot(space))
        for group in section.groups:
            yield _row(group, section, space)
        yield f"| zero-shot | | {before} | | | {end} | | | | |"
        yield ""


def _row(group: Group, section: Section, space: str) -> str:
    """``to the first row`` is over pairs of runs of the same seed and order."""
    transfer, average, last, forgetting = (as_text(group.measure(space, name)) for name in MEASURES)
    gain = signed(group.gain(space))
    ahead = "" if group is section.reference else signed(group.against(section.reference, space, "last"))
    trained, kept = group.runs[0].result.trainable_parameters, round(group.kept_parameters)
    cells = (
        group.label, len(group.runs), transfer, gain, average, last, ahead, forgetting, f"{trained:,}", f"{kept:,}"
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    tyro.cli(main, prog="python -m trainer.studies.tables")
