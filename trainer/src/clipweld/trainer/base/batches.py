"""The images and prompts of each training step, a function of the seed and the step number only.

An interrupted run therefore resumes exactly where it stopped, and every process of a run draws the same batch and takes
its own share.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipweld.trainer.base.backbone import Backbone
from clipweld.trainer.config import TrainConfig
from clipweld.trainer.errors import ConfigError
from clipweld.trainer.tasks import Task
from clipweld.trainer.text import prompt_of


@dataclass(frozen=True)
class Batch:
    """Images with their prompts. Each process has its share of the images, but all labels and prompts.

    Attributes:
        indices: this process's images, by their index in the training set (the few-shot one, where ``shots`` is set).
        pixels: float32 (share, 3, image_size, image_size), those images.
        labels: int64 (batch,), of the images of all processes, in the order of the processes.
        tokens: int64 (distinct prompts, context_length).
        text_of: int64 (batch,), for each image the row of ``tokens`` with its prompt.
    """

    indices: list[int]
    pixels: Tensor
    labels: Tensor
    tokens: Tensor
    text_of: Tensor


def check_batch_size(config: TrainConfig, world_size: int) -> None:
    """Refuse a batch of one image, because its contrastive loss is always zero.

    Raises:
        ConfigError: there is only one image in a batch over all processes.
    """
    if config.batch_size * world_size < 2:
        raise ConfigError(
            f"batch_size {config.batch_size} on one device: the loss compares the images of a batch, so that a single "
            "one teaches nothing; give --batch-size 2 or more"
        )


class Batches:
    """The training batches of one task; few-shot images are decoded once and kept.

    Images are drawn without replacement until all have been seen, then shuffled again. One template is drawn per batch.
    Images of one class share a prompt, which is encoded once.

    Args:
        rank, world_size: which share of each batch of ``world_size * batch_size`` images this process takes.
    """

    def __init__(
        self, task: Task, backbone: Backbone, config: TrainConfig, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self.task = task
        self._backbone = backbone
        self._seed = config.seed
        self._size = config.batch_size
        self._rank, self._world_size = rank, world_size
        self._images = task.load("train").few_shot(config.shots, config.seed)
        self.few_shot = config.shots > 0
        self._kept: dict[int, Tensor] = {}

    def drawn(self) -> str:
        """Return the number of training images and the start of a SHA-256 over them, to detect other images.

        Few-shot images are identified by their pixels, which are in memory anyway; full sets by their paths.
        """
        digest = hashlib.sha256()
        for index, label in enumerate(self._images.labels):
            digest.update(f"{label} {'' if self.few_shot else self._images.name_of(index)}\n".encode())
            if self.few_shot:
                digest.update(self.pixels([index]).numpy().data)
        return f"{len(self)} drawn, SHA-256 {digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        """Return the number of training images."""
        return len(self._images)

    def __getitem__(self, number: int) -> Batch:
        """Return the batch of a step, counted from 1."""
        total = self._size * self._world_size
        chosen = self._drawn((number - 1) * total, total)
        share = chosen[self._rank * self._size : (self._rank + 1) * self._size]
        labels = torch.tensor([self._images.labels[index] for index in chosen])
        classes, text_of = labels.unique(return_inverse=True)
        template = random.Random(f"template {self._seed} {number}").choice(self.task.templates)
        prompts = [prompt_of(template, self.task.class_names[label]) for label in classes]
        tokens = self._backbone.tokenizer(prompts)
        return Batch(share, *(t.to(self._backbone.device) for t in (self.pixels(share), labels, tokens, text_of)))

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Return training images by index, preprocessed: float32 (batch, 3, image_size, image_size), on the CPU."""
        decoded = []
        for index in indices:
            image = self._kept.get(index)
            if image is None:
                image = self._images.pixels(index, self._backbone.preprocess)
                if self.few_shot:
                    self._kept[index] = image
            decoded.append(image)
        return torch.stack(decoded)

    def _drawn(self, start: int, count: int) -> list[int]:
        """Return ``count`` indices from position ``start`` of an endless sequence of permutations."""
        chosen: list[int] = []
        while len(chosen) < count:
            epoch, offset = divmod(start + len(chosen), len(self))
            order = random.Random(f"order {self._seed} {epoch}").sample(range(len(self)), len(self))
            chosen += order[offset : offset + count - len(chosen)]
        return chosen
