"""Draw the figure of README.md: accuracy on every task after each learned task, for three methods side by side.

Run: python -m evidence.studies.heat_maps evidence/records/studies/long/methods --out docs/forgetting.png
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from clipweld.trainer.report.accuracy import heat_map
from clipweld.trainer.report.figures import Picture, draw
from clipweld.trainer.report.runs import read_runs
from evidence import command_line

PANELS = {"pool": "clipweld", "lora": "plain LoRA", "finetune": "fine-tuning"}
SIZE = (10.6, 3.0)  # inches


def main(runs: Path, /, *, out: Path) -> None:
    """Draw the heat maps as a PNG.

    Args:
        runs: folder with the runs of all methods.
        out: the PNG file to write.
    """
    out.write_bytes(picture(runs).png)


def picture(runs: Path) -> Picture:
    """Return the figure, with one run of each method, all with the same seed and order of tasks."""
    first = {run.method: run for run in reversed(read_runs(runs)) if run.order_seed == 0}
    results = {title: first[method].results["task"] for method, title in PANELS.items()}
    assert len({tuple(result.tasks) for result in results.values()}) == 1

    def paint(figure: Figure) -> None:
        axes = figure.subplots(1, len(PANELS), sharey=True)
        for ax, (title, result) in zip(axes, results.items(), strict=True):
            heat_map(ax, title, result, 1 + len(result.tasks), SIZE[0] / len(PANELS) / (len(result.tested) + 0.6))

    return draw("forgetting.png", "Heat maps of accuracy after each learned task, one per method", SIZE, paint)


if __name__ == "__main__":
    command_line.run(main, consume_multiple=True)
