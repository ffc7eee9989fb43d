"""Learn many small synthetic tasks in a row: does the 50th cost as much to learn as the 2nd?

Run: python -m evidence.studies.scale --tasks 50 --out runs/scale
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter
from PIL import Image
from rich.console import Console

from clipweld.trainer.adapters.adapter import Adapter
from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import Backbone, load_backbone, with_weights
from clipweld.trainer.config import TrainConfig, train_config
from clipweld.trainer.files import replacing
from clipweld.trainer.learning.dry_run import peak_memory
from clipweld.trainer.learning.fit import Fitted, fit
from clipweld.trainer.tasks import Images, Task
from evidence import command_line

CLASSES, IMAGES_A_CLASS = 4, 8


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Learn synthetic tasks one after another with the small CLIP; print time and memory against learned tasks."""

    tasks: int = 50
    """Number of tasks."""
    iterations: int = 20
    """Steps per task."""
    pairs: int = 9
    """How often the second and the last task are learned again, in turn, to measure the ratio."""
    out: Path = Path("runs/scale")
    """Folder for scale.json."""


def main(settings: Annotated[Scale, Parameter(name="*")] = Scale()) -> None:
    """Learn all tasks, then time the second and the last in turn, so that changes of the machine's speed cancel out."""
    console = Console(stderr=True)
    base = load_backbone("mini")
    config = train_config("mini", iterations=settings.iterations, shots=IMAGES_A_CLASS)
    lineage: list[Adapter] = []
    model = base
    rows = []
    for number in range(1, settings.tasks + 1):
        seconds, fitted = learn(number, base, lineage, model, config)
        lineage.append(fitted.adapter)
        model = fitted.backbone
        del fitted
        rows.append(
            {
                "tasks_before": number - 1,
                "seconds": round(seconds, 3),
                "peak_mb": round(peak_memory(base.device) / 1e6, 1),
            }
        )
        console.print(f"task {number}: {seconds:.2f} s, {rows[-1]['peak_mb']:.0f} MB")
    first, all_but_last = (
        with_weights(base, merge(base.model.state_dict(), own)) for own in (lineage[:1], lineage[:-1])
    )
    ratios = []
    for _ in range(settings.pairs):
        second, _ = learn(2, base, lineage[:1], first, config)
        last, _ = learn(settings.tasks, base, lineage[:-1], all_but_last, config)
        ratios.append(last / second)
    result = {
        "settings": {name: value for name, value in asdict(settings).items() if name != "out"},
        "rows": rows,
        "ratio_last_to_second": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
    with replacing(settings.out / "scale.json") as staged:
        staged.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(
        f"The last of {settings.tasks} tasks took {result['ratio_last_to_second']:.3f} times as long as the second "
        f"(median of {settings.pairs} pairs in turn, {min(ratios):.3f} to {max(ratios):.3f}); peak memory "
        f"{rows[1]['peak_mb']:.0f} MB after the second, {rows[-1]['peak_mb']:.0f} MB after the last. "
        f"Written to {settings.out / 'scale.json'}"
    )


def learn(
    number: int, base: Backbone, lineage: list[Adapter], start: Backbone, config: TrainConfig
) -> tuple[float, Fitted]:
    """Learn a task on top of a lineage; return the seconds it took and the result of ``fit``.

    Tests are left out, because their number grows with the number of tasks.
    """
    task = synthetic(number)
    started = time.perf_counter()
    fitted = fit(task, base, lineage, config, test_on=[], start=start)
    return time.perf_counter() - started, fitted


def synthetic(number: int) -> Task:
    """Return a task of coarse colour patterns with noise, one pattern per class."""
    random = np.random.default_rng(number)
    patterns = random.uniform(0, 255, (CLASSES, 4, 4, 3))

    def picture(index: int) -> Image.Image:
        coarse = patterns[index % CLASSES] + np.random.default_rng((number, index)).normal(0, 30, (4, 4, 3))
        return Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)

    images = Images([i % CLASSES for i in range(CLASSES * IMAGES_A_CLASS)], picture, lambda index: f"pattern {index}")
    return Task(
        name=f"patterns {number}",
        class_names=tuple(f"pattern {number} {letter}" for letter in "abcd"),
        templates=("a picture of {}",),
        load=lambda split: images,
        source="synthetic",
    )


if __name__ == "__main__":
    command_line.run(main, consume_multiple=True)
