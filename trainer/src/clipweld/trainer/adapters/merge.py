"""Merging adapters into weights: a pure function of tensors, which needs no model and changes nothing in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from clipweld.trainer.adapters.adapter import Adapter
from clipweld.trainer.errors import NotFinite, WrongBase

# nn.MultiheadAttention stacks q, k and v in one matrix; an adapter has them separately.
STACKED = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:  # noqa: N803
    """Return the weight update ``scaling * sum_i b_i a_i^T`` of rank-1 experts, float32 (d_out, d_in).

    Args:
        lora_A: (num_experts, d_in), one expert per row.
        lora_B: (d_out, num_experts), one expert per column.
    """
    return scaling * (lora_B.float() @ lora_A.float())


def merge(state_dict: dict[str, Tensor], adapters: Iterable[Adapter]) -> dict[str, Tensor]:
    """Add adapters, in the given order, to the weights they were trained on.

    Each sum is computed in float32 and cast back to the weight's dtype, so that the same adapters always give the same
    bytes.

    Args:
        state_dict: an open_clip CLIP's weights; not changed.
        adapters: oldest first.

    Returns:
        a new dict, which shares the tensors that no adapter changes.

    Raises:
        WrongBase: an adapter has a layer that these weights don't have, or one of another shape.
        NotFinite: a merged weight is NaN or overflows its dtype; names the adapter and the layer.
    """
    merged = dict(state_dict)
    for adapter in adapters:
        for module in adapter.modules():
            key, stacked_at = weight_of(module)
            if key not in merged:
                raise WrongBase(f"adapter {adapter.task!r}: layer {module} is not in these weights (no {key})")
            lora_A, lora_B = adapter.experts(module)  # noqa: N806
            shape, (rows, *rest) = (lora_B.shape[0], lora_A.shape[1]), merged[key].shape
            # Checked before multiplying, because the product of foreign shapes could be of any size.
            if shape != (rows if stacked_at is None else rows // len(STACKED), *rest):
                raise WrongBase(
                    f"adapter {adapter.task!r}: layer {module} is {shape}, "
                    f"{key} is {tuple(merged[key].shape)}; it belongs to another model"
                )
            weight = merged[key].float()
            delta = delta_weight(lora_A, lora_B, adapter.scaling).to(weight.device)
            if stacked_at is not None:
                whole = torch.zeros_like(weight)
                whole.chunk(len(STACKED))[stacked_at].copy_(delta)
                delta = whole
            merged[key] = (weight + delta).to(merged[key].dtype)
            if not merged[key].isfinite().all():
                raise NotFinite(
                    f"adapter {adapter.task!r}: layer {module}: merged into {key}, a weight is NaN or beyond "
                    f"{str(merged[key].dtype).removeprefix('torch.')}; fit the task again with a lower --lr"
                )
    return merged


def weight_of(module: str) -> tuple[str, int | None]:
    """Return the state_dict key of a layer's weight, and its index in the stack if q, k and v are stacked."""
    parent, _, name = module.rpartition(".")
    if name in STACKED:
        return f"{parent}.in_proj_weight", STACKED[name]
    return f"{module}.weight", None
