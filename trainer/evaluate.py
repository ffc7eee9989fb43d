"""Zero-shot accuracy of a model on tasks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.backbone import Backbone, encode_classes
from trainer.tasks import Images, Task

BATCH_SIZE = 128


def evaluate(backbone: Backbone, tasks: Iterable[Task]) -> dict[str, float]:
    """Top-1 accuracy in percent on each task's test images, classified among the class names of that task."""
    return {task.name: accuracy(backbone, task) for task in tasks}


@torch.inference_mode()
def accuracy(backbone: Backbone, task: Task) -> float:
    """Top-1 accuracy in percent on one task's test images."""
    images = task.load("test")
    classes = encode_classes(backbone, task.class_names, task.templates)
    correct = 0
    for start in range(0, len(images), BATCH_SIZE):
        indices = range(start, min(start + BATCH_SIZE, len(images)))
        predicted = (encode_images(backbone, images, indices) @ classes.T).argmax(dim=-1).cpu()
        correct += int((predicted == torch.tensor([images.labels[i] for i in indices])).sum())
    return round(100 * correct / len(images), 2)


def encode_images(backbone: Backbone, images: Images, indices: Iterable[int]) -> Tensor:
    """Image features (batch, embed_dim), L2-normalised."""
    pixels = torch.stack([backbone.preprocess(images[index][0]) for index in indices])
    return F.normalize(backbone.model.encode_image(pixels.to(backbone.device)), dim=-1)
