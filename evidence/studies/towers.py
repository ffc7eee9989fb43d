"""Measure what each half of an update does: a run's first adapter, merged into one tower alone and into both.

Run: python -m evidence.studies.towers runs/results/short/methods/pool/order-0-seed-0
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from clipweld.trainer.adapters.adapter import Adapter, load_lineage
from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import load_backbone, with_weights
from clipweld.trainer.files import replacing
from clipweld.trainer.learning.evaluate import evaluate
from clipweld.trainer.report.runs import RECORD
from clipweld.trainer.tasks import load_task
from evidence import command_line, markdown

HALVES = {"image tower": ("image",), "text tower": ("text",), "both": ("image", "text")}


def main(run: tuple[Path, ...] = (), /, *, out: Path = Path("runs/results/towers.json")) -> None:
    """Test the halves of each run's first adapter on all tasks, and print a Markdown table.

    Args:
        run: folders of runs of 'trainer sequence' with --method pool, on shipped tasks; without any, the figures in
            --out are printed.
        out: file for the figures.
    """
    if run:
        rows = [halves(folder) for folder in run]
        with replacing(out) as staged:
            staged.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(json.loads(out.read_text(encoding="utf-8")))))


def halves(run: Path) -> dict:
    """Return accuracies in percent on each task's own classes, by half and task, and the name of the learned task."""
    record = json.loads((run / RECORD).read_text(encoding="utf-8"))
    base = load_backbone(record["model"])
    first, *_ = load_lineage(run / "adapters", base.fingerprint)
    tasks = [load_task(name) for name in record["tasks"]]
    merged = {"nothing": base.model.state_dict()}
    for half, towers in HALVES.items():
        merged[half] = merge(base.model.state_dict(), [part(first, towers)])
    accuracy = {half: evaluate(with_weights(base, weights), tasks)["task"] for half, weights in merged.items()}
    return {"learned": first.task, "anchors": record["config"]["anchor_weight"], "accuracy": accuracy}


def part(adapter: Adapter, towers: Sequence[str]) -> Adapter:
    """Return the adapter with only its layers in these towers ("image", "text")."""
    kept = {
        name: tensor
        for name, tensor in adapter.tensors.items()
        if ("image" if name.startswith("visual.") else "text") in towers
    }
    return replace(adapter, tensors=kept)


def table(rows: Sequence[dict]) -> Iterator[str]:
    """Yield Markdown with a row per run and half, and a column per task."""
    tasks = sorted(rows[0]["accuracy"]["nothing"])
    cells = (
        (row["learned"], f"{row['anchors']:g}", half, *(f"{accuracy[task]:.1f}" for task in tasks))
        for row in rows
        for half, accuracy in row["accuracy"].items()
    )
    yield from markdown.table(("learned", "anchors", "merged into", *tasks), cells, text=3)


if __name__ == "__main__":
    command_line.run(main, consume_multiple=True)
