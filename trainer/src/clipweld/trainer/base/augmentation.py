"""Random changes to training images, drawn anew each time an image is used (torchvision's transforms)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2

from clipweld.trainer.base.backbone import Backbone
from clipweld.trainer.config import TrainConfig

SMALLEST_CROP = 0.8  # share of the image


class Augmentation:
    """The changes that the settings ask for.

    Args:
        backbone: its preprocessing says how pixels are normalised.
    """

    def __init__(self, backbone: Backbone, config: TrainConfig) -> None:
        changes: list[torch.nn.Module] = []
        if config.random_crop:
            changes.append(v2.RandomResizedCrop(backbone.image_size, scale=(SMALLEST_CROP, 1.0)))
        if config.random_flip:
            changes.append(v2.RandomHorizontalFlip())
        if config.color_jitter:
            mean, std = torch.tensor(backbone.mean), torch.tensor(backbone.std)
            # Colours are changed in [0, 1].
            raw = v2.Normalize((-mean / std).tolist(), (1 / std).tolist())
            changes += [raw, v2.ColorJitter(0.2, 0.2, 0.2, 0.05), v2.Normalize(mean.tolist(), std.tolist())]
        self._change = v2.Compose(changes) if changes else None
        self._seed = config.seed

    def __bool__(self) -> bool:
        return self._change is not None

    def __call__(self, pixels: Tensor, number: int, indices: Sequence[int]) -> Tensor:
        """Change images, each by the seed, the step and its index, so that a resumed run sees the same.

        Args:
            pixels: float32 (batch, 3, size, size), preprocessed, on the CPU.
            number: the step.
            indices: the images' indices in the training set.

        Returns:
            the same shape.
        """
        if self._change is None:
            return pixels
        changed = []
        with torch.random.fork_rng(devices=[]):
            for index, image in zip(indices, pixels, strict=True):
                torch.manual_seed(random.Random(f"augment {self._seed} {number} {index}").getrandbits(63))
                changed.append(self._change(image))
        return torch.stack(changed)
