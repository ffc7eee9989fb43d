"""The runs of a study as the tables of RESULTS.md.

Run: python -m trainer.studies.tables runs/results/methods
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import tyro

from trainer.report.groups import MEASURES, Group, Spread, sections
from trainer.report.runs import read_runs


def main(run: tyro.conf.Positional[Path], space: str = "task") -> None:
    """Print one Markdown table for each model and set of tasks below a folder.

    Args:
        run: a folder that holds runs of 'trainer sequence'.
        space: label space, 'task' or 'union'.
    """
    print("\n".join(table(run, space)))


def table(folder: Path, space: str) -> Iterator[str]:
    """Markdown: a row for each method and settings, mean and standard deviation over seeds and orders."""
    for section in sections(read_runs(folder)):
        yield "| | runs | Transfer | to zero-shot | Average | Last | Forgetting | trained | kept a task |"
        yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
        before, end = _cell(section.zero_shot_transfer(space)), _cell(section.zero_shot(space))
        yield f"| zero-shot | | {before} | | | {end} | | | |"
        for group in section.groups:
            yield _row(group, space)
        yield ""


def _row(group: Group, space: str) -> str:
    transfer, average, last, forgetting = (_cell(group.measure(space, name)) for name in MEASURES)
    gain = _cell(group.gain(space), "+")
    trained, kept = group.runs[0].result.trainable_parameters, round(group.kept_parameters)
    cells = (group.label, len(group.runs), transfer, gain, average, last, forgetting, f"{trained:,}", f"{kept:,}")
    return f"| {' | '.join(map(str, cells))} |"


def _cell(values: Spread | None, sign: str = "") -> str:
    """``78.1 ± 0.4``; no spread where there is one value."""
    if values is None:
        return ""
    return f"{values.mean:{sign}.1f}" + ("" if values.sd is None else f" ± {values.sd:.1f}")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m trainer.studies.tables")
