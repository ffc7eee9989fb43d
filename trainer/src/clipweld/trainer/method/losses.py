"""The losses: CLIP's with soft targets, and the activation-guided orthogonality (AGO) of experts."""

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
        image_features, text_features: (batch, embed_dim), L2-normalised; row i of both is one pair.
        labels: int64 (batch,), the class of each pair.
        logit_scale: the frozen scale, already exponentiated.

    Returns:
        a scalar, the mean over both directions. Each positive of a row has the target 1 / number of positives.
    """
    logits = logit_scale * image_features @ text_features.T
    same = (labels[:, None] == labels[None, :]).to(logits.dtype)
    targets = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def orthogonality_loss(
    pools: Mapping[str, ExpertPool], past: Mapping[str, Tensor], reduce: Literal["sum", "mean"]
) -> Tensor:
    """Return the AGO loss: ``|B_now^T B_past|``, summed or averaged within a layer, then averaged over layers.

    Args:
        pools: the pools in training, by layer; their most activated experts count.
        past: by layer, the merged columns of all earlier tasks, concatenated (d_out, past_experts), so that any number
            of tasks takes one matrix product per layer. Empty for the first task, whose loss is 0.
        reduce: how the overlaps are reduced within a layer.
    """
    if not past:
        return next(iter(pools.values())).lora_B.new_zeros(())
    overlaps = []
    for module, pool in pools.items():
        overlap = (pool.lora_B[:, pool.router.most_activated()].T @ past[module]).abs()
        overlaps.append(overlap.sum() if reduce == "sum" else overlap.mean())
    return torch.stack(overlaps).mean()
