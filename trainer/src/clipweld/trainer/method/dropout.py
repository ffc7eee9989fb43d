"""Dropout whose random numbers are cheap."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ByteDropout(nn.Module):
    """Dropout that draws a random byte an element, and leaves it to the caller to scale up what is kept.

    torch's own draws a random number an element, on a CPU one after the other: a fifth of a training step's time. A
    byte is an eighth of one. What follows a dropout here is a product down to a few features, which are cheaper to
    scale than x.

    Attributes:
        p: the share of elements that is zeroed in training, in [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    @property
    def kept(self) -> float:
        """The share of elements that is kept in training: 1 - p, to a 256th. What x is to be divided by."""
        return 1 - min(round(256 * self.p), 255) / 256

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape and floating dtype -> the same shape and dtype."""
        if not self.training or self.kept == 1:
            return x
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        return x * (words.view(torch.uint8)[: x.numel()].view(x.shape) < 256 * self.kept)
