"""Train and test where a data set has no split of its own, and validation where no test image may be seen."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

from clipweld.trainer.errors import TaskInvalid
from clipweld.trainer.tasks.task import Images, Task

SEED = 42
TRAIN_SHARE = 0.8


def split_by_seed(images: Images, of: str = "a task") -> dict[str, Images]:
    """80% train, 20% test, drawn within every class by a recorded seed; a class of two images has one in each.

    Args:
        of: what they are the images of, for the error.

    Raises:
        TaskInvalid: no class has two images, so that none is left to test on.
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
    """The same task with its training images alone: 80% to learn from, 20% in the place of the test images.

    For choosing settings: no test image takes part.

    Raises:
        TaskInvalid: no class has two training images.
    """
    parts = split_by_seed(task.load("train"), f"task {task.name!r}, training images ({task.source})")
    return replace(task, load=parts.__getitem__, source=f"{task.source}, validation")
