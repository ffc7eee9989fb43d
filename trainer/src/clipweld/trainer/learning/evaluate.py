"""Zero-shot accuracy of a model on tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor

from clipweld.trainer.base.backbone import Backbone, encode_classes
from clipweld.trainer.config import LABEL_SPACES, LabelSpace
from clipweld.trainer.errors import NotFinite
from clipweld.trainer.finite import has_direction
from clipweld.trainer.tasks import Images, Task
from clipweld.trainer.tasks.prompts import as_read

BATCH_SIZE = 128

Accuracies = dict[LabelSpace, dict[str, float]]


@torch.inference_mode()
def evaluate(backbone: Backbone, tasks: Sequence[Task], fabric: Fabric | None = None) -> Accuracies:
    """Return the top-1 accuracy in percent on each task's test images, for both label spaces.

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
    accuracies: Accuracies = {space: {} for space in LABEL_SPACES}
    for task, own in zip(tasks, classes, strict=True):
        images = task.load("test")
        correct, unusable = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        for start in range(rank * BATCH_SIZE, len(images), world_size * BATCH_SIZE):
            indices = range(start, min(start + BATCH_SIZE, len(images)))
            features = encode_images(backbone, images, indices)
            unusable += int((~has_direction(features.norm(dim=-1))).sum())
            truth = [task.class_names[images.labels[index]] for index in indices]
            in_task, in_union = ((features @ w.T).argmax(dim=-1).tolist() for w in (own, union))
            correct[0] += sum(task.class_names[a] == name for a, name in zip(in_task, truth, strict=True))
            correct[1] += sum(read[names[a]] == read[name] for a, name in zip(in_union, truth, strict=True))
        if fabric:
            correct, unusable = (
                cast("Tensor", fabric.all_reduce(count, reduce_op="sum")) for count in (correct, unusable)
            )
        if unusable:
            raise NotFinite(
                f"task {task.name!r}: the features of {int(unusable)} of {len(images)} test images are NaN, infinite "
                "or zero; the weights can't be used: take others, or learn again with a lower --lr"
            )
        for space, right in zip(LABEL_SPACES, correct.tolist(), strict=True):
            accuracies[space][task.name] = round(100 * right / len(images), 2)
    return accuracies


def encode_images(backbone: Backbone, images: Images, indices: Iterable[int]) -> Tensor:
    """Return image features (batch, embed_dim), L2-normalised."""
    pixels = torch.stack([images.pixels(index, backbone.preprocess) for index in indices])
    return F.normalize(backbone.model.encode_image(pixels.to(backbone.device)), dim=-1)
