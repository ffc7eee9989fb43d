"""Learn the six tasks on a second CLIP with the settings that were chosen on the first.

Run: python -m evidence.studies.second --weights FILE --out runs/second

The second CLIP differs from the first in width, depth and the mix of its training pictures. ``python -m
evidence.mini_recipe train --work DIR --variant evidence/mini_recipe/second.json`` trains it; FILE is then
``DIR/training/mini.safetensors``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip

from clipweld.trainer.base.backbone import Backbone, load_backbone
from clipweld.trainer.config import FEW_SHOTS, FEWEST_STEPS, Method, train_config
from clipweld.trainer.sequence.run import run_sequence
from clipweld.trainer.tasks import load_tasks
from evidence import command_line
from evidence.studies.tables import table

MODEL = "second-mini"
VARIANT = Path(__file__).parents[1] / "mini_recipe" / "second.json"
# Name of a row: method, the model whose preset it takes, and settings that differ.
RUNS: dict[str, tuple[Method, str, dict[str, Any]]] = {
    "pool": ("pool", "mini", {}),
    "default-of-other-models": ("pool", "ViT-B-16", {"iterations": 500}),
    "lora": ("lora", "mini", {}),
    "joint": ("joint", "mini", {}),
}


def main(
    *,
    weights: Path,
    out: Path = Path("runs/second"),
    seeds: tuple[int, ...] = (0, 1, 2),
    runs: tuple[str, ...] = tuple(RUNS),
    iterations: int | None = None,
) -> None:
    """Run the methods, each seed in another order of tasks, and print a Markdown table. Finished runs aren't repeated.

    Args:
        weights: of the second CLIP.
        out: folder for the runs.
        seeds: of the training; also those of the order of tasks.
        runs: which rows to run.
        iterations: steps per task. Default: those of the preset.
    """
    base = load(weights, out)
    for seed in seeds:
        for name in runs:
            method, preset, differing = RUNS[name]
            chosen = {"shots": FEW_SHOTS["mini"], "iterations": FEWEST_STEPS["mini"], **differing}
            if iterations:
                chosen["iterations"] = iterations
            config = train_config(preset, method, seed=seed, **chosen)
            folder = out / "runs" / name / f"order-{seed}-seed-{seed}"
            run_sequence(load_tasks(["mini"]), base, config, folder, method=method, order_seed=seed, resume=True)
    print("\n".join(table([out / "runs"], "task")))


def load(weights: Path, folder: Path) -> Backbone:
    """Return the second CLIP; its architecture is written to a folder, from which open_clip reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    architecture = json.loads(VARIANT.read_text(encoding="utf-8"))["model"]
    (folder / f"{MODEL}.json").write_text(json.dumps(architecture), encoding="utf-8")
    open_clip.add_model_config(folder / f"{MODEL}.json")
    return replace(load_backbone(MODEL, str(weights)), pretrained=weights.name)  # records hold no path


if __name__ == "__main__":
    command_line.run(main, consume_multiple=True)
