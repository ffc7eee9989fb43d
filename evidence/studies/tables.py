"""Print the runs of a study as the tables of RESULTS.md.

Run: python -m evidence.studies.tables runs/results/methods
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from clipweld.trainer.config import MEASURES
from clipweld.trainer.report.groups import Group, Section, sections
from clipweld.trainer.report.page import as_text, signed
from clipweld.trainer.report.runs import read_runs
from evidence import command_line, markdown

HEADINGS = (
    "", "runs", "Transfer", "to zero-shot", "Average", "Last", "over classes", "to the first row", "Forgetting",
    "trained", "kept per task",
)  # fmt: skip


def main(run: tuple[Path, ...], /, *, space: str = "task") -> None:
    """Print one Markdown table for each model and set of tasks.

    Args:
        run: folders that hold runs of 'trainer sequence'.
        space: label space, 'task' or 'union'.
    """
    print("\n".join(table(run, space)))


def table(folders: Sequence[Path], space: str) -> Iterator[str]:
    """Yield Markdown with a row per method and settings: mean and standard deviation over seeds and orders."""
    for section in sections([run for folder in folders for run in read_runs(folder)]):
        before, end = as_text(section.zero_shot_transfer(space)), as_text(section.zero_shot(space))
        last = ("zero-shot", None, before, None, None, end, None, None, None, None, None)
        yield from markdown.table(HEADINGS, [*(_row(group, section, space) for group in section.groups), last], text=1)
        yield ""


def _row(group: Group, section: Section, space: str) -> tuple[object, ...]:
    """Return the cells of one group; "to the first row" is the mean over pairs of runs with equal seed and order."""
    transfer, average, last, forgetting = (as_text(group.measure(space, name)) for name in MEASURES)
    gain = signed(group.gain(space))
    ahead = "" if group is section.reference else signed(group.against(section.reference, space, "last"))
    classes = as_text(group.last_classes(space))
    trained, kept = group.runs[0].result.trainable_parameters, round(group.kept_parameters)
    return (
        group.label, len(group.runs), transfer, gain, average, last, classes, ahead, forgetting,
        f"{trained:,}", f"{kept:,}",
    )  # fmt: skip


if __name__ == "__main__":
    command_line.run(main, consume_multiple=True)
