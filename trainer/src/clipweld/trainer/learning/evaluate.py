"""Zero-shot accuracy of a model on tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor

from clipweld.trainer.base.backbone import Backbone, encode_classes
from clipweld.trainer.config import MEASURED, Measured
from clipweld.trainer.errors import NotFinite
from clipweld.trainer.finite import has_direction
from clipweld.trainer.tasks import Images, Task
from clipweld.trainer.tasks.prompts import as_read

BATCH_SIZE = 128

Accuracies = dict[Measured, dict[str, float]]


@torch.inference_mode()
def evaluate(backbone: Backbone, tasks: Sequence[Task], fabric: Fabric | None = None) -> Accuracies:
    """Return the top-1 accuracy in percent on each task's test images, for both label spaces.

    ``task`` and ``union`` are accuracies over images; ``task_classes`` and ``union_classes`` are means over classes, in
    which a class with few images counts as much as one with many. Classes without test images don't count.

    In the union, class names that several tasks share count as one class, and so do names with the same tokens, because
    the model can't tell them apart.

    Args:
        backbone: the model to test.
        tasks: the tasks whose class names make up the union.
        fabric: splits the images among its processes; each returns the whole result.

    Raises:
        NotFinite: the features of images or class names are NaN, infinite or zero; names the task or the class.
    """
    rank, world_size = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)
    classes = [encode_classes(backbone, task.class_names, task.templates) for task in tasks]
    names = [name for task in tasks for name in task.class_names]
    read = dict(zip(names, as_read(backbone.tokenizer, names), strict=True)) if names else {}
    union = torch.cat(classes) if classes else torch.empty(0, backbone.embed_dim)
    accuracies: Accuracies = {measured: {} for measured in MEASURED}
    for task, own in zip(tasks, classes, strict=True):
        images = task.load("test")
        labels = torch.tensor(images.labels)
        correct, unusable = torch.zeros(2, len(own), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        for start in range(rank * BATCH_SIZE, len(images), world_size * BATCH_SIZE):
            indices = range(start, min(start + BATCH_SIZE, len(images)))
            features = encode_images(backbone, images, indices)
            unusable += int((~has_direction(features.norm(dim=-1))).sum())
            truth = [task.class_names[images.labels[index]] for index in indices]
            in_task, in_union = ((features @ w.T).argmax(dim=-1).tolist() for w in (own, union))
            hits = [
                [task.class_names[a] == name for a, name in zip(in_task, truth, strict=True)],
                [read[names[a]] == read[name] for a, name in zip(in_union, truth, strict=True)],
            ]
            correct.index_add_(1, labels[indices.start : indices.stop], torch.tensor(hits, dtype=torch.int64))
        if fabric:
            correct, unusable = (
                cast("Tensor", fabric.all_reduce(count, reduce_op="sum")) for count in (correct, unusable)
            )
        if unusable:
            raise NotFinite(
                f"task {task.name!r}: the features of {int(unusable)} of {len(images)} test images are NaN, infinite "
                "or zero; the weights can't be used: take others, or learn again with a lower --lr"
            )
        there = labels.bincount(minlength=len(own))
        over_classes = (100 * correct / there)[:, there > 0].mean(dim=1).tolist()
        over_images = [100 * right / len(images) for right in correct.sum(dim=1).tolist()]
        for measured, value in zip(MEASURED, over_images + over_classes, strict=True):
            accuracies[measured][task.name] = round(value, 2)
    return accuracies


def encode_images(backbone: Backbone, images: Images, indices: Iterable[int]) -> Tensor:
    """Return image features (batch, embed_dim), L2-normalised."""
    pixels = torch.stack([images.pixels(index, backbone.preprocess) for index in indices])
    return F.normalize(backbone.model.encode_image(pixels.to(backbone.device)), dim=-1)
