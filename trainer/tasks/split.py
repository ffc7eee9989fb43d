"""Train and test where a data set has no split of its own, and validation where no test image may be seen."""

from __future__ import annotations

import random
from dataclasses import replace

from trainer.tasks.task import Images, Task

SEED = 42
TRAIN_SHARE = 0.8


def split_by_seed(images: Images) -> dict[str, Images]:
    """80% train, 20% test, drawn within every class by a recorded seed; a class of two images has one in each."""
    draw = random.Random(SEED)
    parts = {"train": [], "test": []}
    for label in sorted(set(images.labels)):
        members = [index for index, other in enumerate(images.labels) if other == label]
        draw.shuffle(members)
        cut = max(1, min(len(members) - 1, round(TRAIN_SHARE * len(members))))
        parts["train"] += members[:cut]
        parts["test"] += members[cut:]
    return {split: images.subset(sorted(indices)) for split, indices in parts.items()}


def validation(task: Task) -> Task:
    """The same task with its training images alone: 80% to learn from, 20% in the place of the test images.

    For choosing settings: no test image takes part.
    """
    return replace(task, load=split_by_seed(task.load("train")).__getitem__, source=f"{task.source}, validation")
