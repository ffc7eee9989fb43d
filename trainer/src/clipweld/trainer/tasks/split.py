"""Split data sets that have no test split, and set training images aside for validation."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

from clipweld.trainer.errors import TaskInvalid
from clipweld.trainer.tasks.task import Images, Task

SEED = 42
TRAIN_SHARE = 0.8


def split_by_seed(images: Images, of: str = "a task") -> dict[str, Images]:
    """Split images into 80% train and 20% test, drawn per class with SEED; a class of two images has one in each.

    Args:
        of: what the images belong to, for the error message.

    Raises:
        TaskInvalid: no class has two images, so none is left for testing.
    """
    draw = random.Random(SEED)
    by_class = defaultdict(list)
    for index, label in enumerate(images.labels):
        by_class[label].append(index)
    parts: dict[str, list[int]] = {"train": [], "test": []}
    for _, members in sorted(by_class.items()):
        draw.shuffle(members)
        cut = max(1, min(len(members) - 1, round(TRAIN_SHARE * len(members))))
        parts["train"] += members[:cut]
        parts["test"] += members[cut:]
    if not parts["test"]:
        raise TaskInvalid(
            f"{of}: its {len(by_class)} classes have one image each, and none is left to test on; give two or more per "
            "class, or test images in a folder of their own: train/<class>/ and test/<class>/"
        )
    return {split: images.subset(sorted(indices)) for split, indices in parts.items()}


def validation(task: Task) -> Task:
    """Return the same task with its training images only: 80% to train on, 20% instead of the test images.

    This allows choosing settings without using a test image.

    Raises:
        TaskInvalid: no class has two training images.
    """
    parts = split_by_seed(task.load("train"), f"task {task.name!r}, training images ({task.source})")
    return replace(task, load=parts.__getitem__, source=f"{task.source}, validation")


def untouched(task: Task) -> Task:
    """Return the same task with all its training images instead of the test images.

    As long as the task is not learned, none of them has been trained on, so all serve for validation.
    """
    return replace(task, load=lambda split: task.load("train"), source=f"{task.source}, validation")
