"""The images and prompts of each training step, a function of the seed and the step number only.

An interrupted run therefore resumes exactly where it stopped, and every process of a run draws the same batch and takes
its own share.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from clipweld.trainer.base.augmentation import Augmentation
from clipweld.trainer.base.backbone import Backbone
from clipweld.trainer.config import TrainConfig, shots_of
from clipweld.trainer.errors import ConfigError
from clipweld.trainer.tasks import Task
from clipweld.trainer.text import prompt_of

# A training set is kept in memory, decoded and preprocessed, if it is few-shot or takes no more than this.
KEPT_BYTES = 2 << 30


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
    """The training batches of one task. Few images are decoded once and kept, many are decoded again in every epoch.

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
        shots = shots_of(config, backbone.model_name, is_folder=task.origin is not None)
        self._images = task.load("train").few_shot(shots, config.seed)
        self.in_memory = shots > 0 or len(self._images) * 12 * backbone.image_size**2 <= KEPT_BYTES
        self._balance = config.balance
        self._augmentation = Augmentation(backbone, config)
        self._kept: dict[int, Tensor] = {}
        self._order = functools.lru_cache(maxsize=2)(self._permutation)
        self._ahead: dict[int, list[Future[Tensor]]] = {}
        self._readers = ThreadPoolExecutor()  # starts its threads when images are read ahead

    @property
    def unchanging(self) -> bool:
        """Whether an image has the same pixels in every step, and they are kept."""
        return self.in_memory and not self._augmentation

    def drawn(self) -> str:
        """Return the number of training images and the start of a SHA-256 over them, to detect other images.

        Images that are kept are identified by their pixels, which are in memory anyway; others by their paths.
        """
        digest = hashlib.sha256()
        for index, label in enumerate(self._images.labels):
            digest.update(f"{label} {'' if self.in_memory else self._images.name_of(index)}\n".encode())
            if self.in_memory:
                digest.update(self.pixels([index]).numpy().data)
        return f"{len(self)} drawn, SHA-256 {digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        """Return the number of training images."""
        return len(self._images)

    def __getitem__(self, number: int) -> Batch:
        """Return the batch of a step, counted from 1. If images are not kept, those of the next step are read ahead."""
        chosen, share = self._chosen(number)
        if self.in_memory:
            pixels = self.pixels(share)
        else:
            reading = self._ahead.pop(number, None) or self._read(share)
            self._ahead = {number + 1: self._read(self._chosen(number + 1)[1])}
            pixels = torch.stack([image.result() for image in reading])
        pixels = self._augmentation(pixels, number, share)
        labels = torch.tensor([self._images.labels[index] for index in chosen])
        classes, text_of = labels.unique(return_inverse=True)
        template = random.Random(f"template {self._seed} {number}").choice(self.task.templates)
        prompts = [prompt_of(template, self.task.class_names[label]) for label in classes]
        tokens = self._backbone.tokenizer(prompts)
        return Batch(share, *(t.to(self._backbone.device) for t in (pixels, labels, tokens, text_of)))

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Return training images by index, preprocessed: float32 (batch, 3, image_size, image_size), on the CPU."""
        decoded = []
        for index in indices:
            image = self._kept.get(index)
            if image is None:
                image = self._images.pixels(index, self._backbone.preprocess)
                if self.in_memory:
                    self._kept[index] = image
            decoded.append(image)
        return torch.stack(decoded)

    def chunks(self, size: int, most: int | None = None) -> Iterator[Tensor]:
        """Yield the first ``most`` training images (all by default) on the model's device, ``size`` at a time."""
        for chunk in torch.arange(min(len(self), most or len(self))).split(size):
            yield self.pixels(chunk.tolist()).to(self._backbone.device)

    def _read(self, indices: Sequence[int]) -> list[Future[Tensor]]:
        return [self._readers.submit(self._images.pixels, index, self._backbone.preprocess) for index in indices]

    def _chosen(self, number: int) -> tuple[list[int], list[int]]:
        """Return the indices of a step's images: those of all processes, and this process's share of them."""
        total = self._size * self._world_size
        start, chosen = (number - 1) * total, list[int]()
        while len(chosen) < total:
            epoch, offset = divmod(start + len(chosen), len(self))
            chosen += self._order(epoch)[offset : offset + total - len(chosen)]
        return chosen, chosen[self._rank * self._size : (self._rank + 1) * self._size]

    def _permutation(self, epoch: int) -> list[int]:
        order = random.Random(f"order {self._seed} {epoch}").sample(range(len(self)), len(self))
        return self._balanced(order) if self._balance else order

    def _balanced(self, order: list[int]) -> list[int]:
        """Return as many images, one of each class in turn: small classes repeat theirs, large ones show only some."""
        members = defaultdict(list)
        for index in order:
            members[self._images.labels[index]].append(index)
        turns = [itertools.cycle(own) for own in members.values()]
        return [next(turn) for _, turn in zip(order, itertools.cycle(turns), strict=False)]
