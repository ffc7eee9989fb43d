"""Draw the figure of RESULTS.md: what is kept of tasks not learned yet, against the accuracy at the end.

Run: python -m evidence.studies.trade_off --out docs/trade-off.png
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from clipweld.trainer.report.figures import INK, Picture, draw
from clipweld.trainer.report.groups import sections
from clipweld.trainer.report.runs import read_runs
from evidence import command_line

RECORDS = Path(__file__).parents[1] / "records" / "studies" / "long"
# Folders of runs, each with its label, where that stands in points from the mean, and which of its ends.
POINTS = {
    "methods/pool": ("the default", (0, -14), "center"),
    "attribution/coefficients": ("chosen coefficients", (4, 9), "right"),
    "attribution/lora-both-losses": ("LoRA with both losses", (-20, -3), "right"),
    "attribution/pool-no-losses": ("neither loss", (8, 6), "left"),
    "ablations/no-drift": ("anchors alone", (-20, -3), "right"),
    "ablations/no-anchors": ("drift loss alone", (8, 6), "left"),
    "ablations/anchor-16": ("heavier anchors", (6, -24), "right"),
    "methods/lora": ("plain LoRA", (8, 6), "left"),
    "methods/finetune": ("fine-tuning", (8, 6), "left"),
}
SIZE = (7.6, 4.4)  # inches


def main(*, out: Path, records: Path = RECORDS) -> None:
    """Draw the trade-off as a PNG.

    Args:
        out: the PNG file to write.
        records: folder with the runs.
    """
    out.write_bytes(picture(records).png)


def picture(records: Path) -> Picture:
    """Return the figure: a point for each folder of runs, at their mean, with their standard deviations."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for folder, (label, place, end) in POINTS.items():
            [section] = sections(read_runs(records / folder))
            [group] = section.groups
            gain, last = group.gain("task"), group.last("task")
            assert gain is not None
            color = "C0" if folder == "methods/pool" else INK
            axes.errorbar(gain.mean, last.mean, last.sd, gain.sd, fmt="o", color=color, elinewidth=0.8, markersize=4)
            axes.annotate(label, (gain.mean, last.mean), place, textcoords="offset points", ha=end, color=color)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel("Transfer minus zero-shot, points")
        axes.set_ylabel("Last, %")

    return draw("trade-off.png", "Accuracy at the end against change on tasks not learned yet", SIZE, paint)


if __name__ == "__main__":
    command_line.run(main)
