"""Which images and prompts a training step sees: a function of the seed and the step's number alone.

So an interrupted run resumes exactly where it stopped, and every process of a run draws the same batch and
takes its own share.
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
    """Images with their prompts. Of the images each process has its share; labels and prompts are those of all.

    Attributes:
        indices: which of the drawn training images this process has.
        pixels: float32 (share, 3, S, S), those images.
        labels: int64 (batch,), of the images of all processes, in the order of the processes.
        tokens: int64 (distinct prompts, context_length).
        text_of: int64 (batch,), which of the prompts belongs to which image.
    """

    indices: list[int]
    pixels: Tensor
    labels: Tensor
    tokens: Tensor
    text_of: Tensor


def check_batch_size(config: TrainConfig, world_size: int) -> None:
    """Raises:
    ConfigError: a batch of one image, whose loss is zero whatever the model answers.
    """
    if config.batch_size * world_size < 2:
        raise ConfigError(
            f"batch_size {config.batch_size} on one device: the loss compares the images of a batch, so that a single "
            "one teaches nothing; give --batch-size 2 or more"
        )


class Batches:
    """The training batches of one task; few-shot images are decoded once and kept.

    Images are drawn without replacement until all were seen, then anew; one template is drawn per batch. A batch holds
    fewer classes than images, and each prompt is encoded once.

    Args:
        rank, world_size: which share of each batch of ``world_size * batch_size`` images is wanted here.
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
        """How many images there are to draw from and the start of a SHA-256 over them, to tell others from them.

        Few-shot images are identified by their pixels, which are in memory anyway; full sets by their paths.
        """
        digest = hashlib.sha256()
        for index, label in enumerate(self._images.labels):
            digest.update(f"{label} {'' if self.few_shot else self._images.name_of(index)}\n".encode())
            if self.few_shot:
                digest.update(self.pixels([index]).numpy().data)
        return f"{len(self)} drawn, SHA-256 {digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        """How many images there are to draw from."""
        return len(self._images)

    def __getitem__(self, number: int) -> Batch:
        """The batch of a step, counted from 1."""
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
        """Training images (batch, 3, S, S) by their place among those drawn, preprocessed, in main memory."""
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
        """``count`` images from ``start`` on of an endless row of permutations."""
        chosen: list[int] = []
        while len(chosen) < count:
            epoch, offset = divmod(start + len(chosen), len(self))
            order = random.Random(f"order {self._seed} {epoch}").sample(range(len(self)), len(self))
            chosen += order[offset : offset + count - len(chosen)]
        return chosen
