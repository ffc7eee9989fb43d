"""Merge coefficients: how much of an update is merged into each tower, chosen on images held out of the training set.

In the manner of WiSE-FT (arXiv 2109.01903), but per tower and per task: a half of an update that doesn't help its own
task only harms others. The coefficient is multiplied into ``lora_B``, so that inference is unchanged.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clipweld.trainer.adapters.adapter import Adapter, Coefficients
from clipweld.trainer.adapters.merge import merge
from clipweld.trainer.base.backbone import Backbone, encode_classes, with_weights
from clipweld.trainer.learning.evaluate import BATCH_SIZE, encode_images
from clipweld.trainer.method.injection import tower_of
from clipweld.trainer.tasks import Images, Task, validation

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


def held_out(task: Task, shots: int, seed: int) -> Task:
    """Return the task with four fifths of its drawn training images to train on, and the rest to test on.

    Raises:
        TaskInvalid: no class has two images.
    """
    few: dict[str, Images] = {"train": task.load("train").few_shot(shots, seed)}
    return validation(replace(task, load=few.__getitem__))


@torch.no_grad()
def smallest_update(adapter: Adapter, before: Backbone, task: Task) -> Coefficients:
    """Return the smallest update that a task's test images don't speak against.

    By the one-standard-error rule (Breiman et al., *Classification and Regression Trees*, 1984): of all pairs of
    coefficients whose loss is less than a standard error above the lowest, the one with the smallest update. The loss
    is the cross-entropy of an image's class; the standard error is that of its mean difference to the lowest.

    Args:
        adapter: what was learned on the task's training images.
        before: the model that it was learned on.
        task: from ``held_out``.
    """
    towers: dict[tuple[str, float], Tensor] = {}
    images = task.load("test")
    for tower, coefficient in itertools.product(("image", "text"), GRID):
        only: Coefficients = {"image": 0.0, "text": 0.0}
        only["image" if tower == "image" else "text"] = coefficient
        scaled = replace(adapter, tensors=scale(adapter.tensors, only))
        model = with_weights(before, merge(before.model.state_dict(), [scaled]))
        if tower == "text":
            towers[tower, coefficient] = encode_classes(model, task.class_names, task.templates)
        else:
            chunks = torch.arange(len(images)).split(BATCH_SIZE)
            towers[tower, coefficient] = torch.cat([encode_images(model, images, c.tolist()) for c in chunks])
    labels = torch.tensor(images.labels, device=before.device)
    logit_scale = before.model.logit_scale.exp()

    losses = {
        (image, text): F.cross_entropy(
            logit_scale * towers["image", image] @ towers["text", text].T, labels, reduction="none"
        )
        for image, text in itertools.product(GRID, GRID)
    }
    lowest = min(losses.values(), key=lambda loss: loss.mean().item())
    excesses = {pair: loss - lowest for pair, loss in losses.items()}
    good = [pair for pair, own in excesses.items() if own.mean() <= own.std(correction=0) / len(own) ** 0.5]
    image, text = min(good, key=lambda pair: (math.hypot(*pair), excesses[pair].mean().item()))
    return {"image": image, "text": text}


def scale(tensors: dict[str, Tensor], coefficients: Coefficients) -> dict[str, Tensor]:
    """Return an adapter's tensors with the coefficients multiplied into ``lora_B``."""
    return {
        name: tensor * coefficients[tower_of(name)] if name.endswith(".lora_B") else tensor
        for name, tensor in tensors.items()
    }
