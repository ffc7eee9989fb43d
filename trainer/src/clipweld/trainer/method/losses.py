"""What training minimises: CLIP's loss with soft targets, and the activation-guided orthogonality (AGO) of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipweld.trainer.method.experts import ExpertPool


def contrastive_loss(image_features: Tensor, text_features: Tensor, labels: Tensor, logit_scale: Tensor) -> Tensor:
    """Return CLIP's symmetric cross-entropy over a batch, in which all pairs of one class are positives.

    Args:
        image_features, text_features: (batch, embed_dim), L2-normalised, row i of both belonging together.
        labels: int64 (batch,), class of every pair.
        logit_scale: the frozen temperature, already exponentiated.

    Returns:
        a scalar: the mean of both directions; a row's targets are 1 / number of its positives.
    """
    logits = logit_scale * image_features @ text_features.T
    same = (labels[:, None] == labels[None, :]).to(logits.dtype)
    targets = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def orthogonality_loss(
    pools: Mapping[str, ExpertPool], past: Mapping[str, Tensor], reduce: Literal["sum", "mean"]
) -> Tensor:
    """AGO: ``|B_now^T B_past|``, summed or averaged within a layer, then averaged over layers.

    Args:
        past: by layer, the merged columns of all earlier tasks, concatenated (d_out, past_experts); empty for the first
            task, whose loss is 0. One matrix product per layer, however many tasks there were.
    """
    if not past:
        return next(iter(pools.values())).lora_B.new_zeros(())
    overlaps = []
    for module, pool in pools.items():
        overlap = (pool.lora_B[:, pool.router.most_activated()].T @ past[module]).abs()
        overlaps.append(overlap.sum() if reduce == "sum" else overlap.mean())
    return torch.stack(overlaps).mean()
