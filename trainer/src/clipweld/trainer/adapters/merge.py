"""(weights, adapters) -> weights. Pure: nothing is changed in place, and nothing here knows a model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from clipweld.trainer.adapters.adapter import Adapter
from clipweld.trainer.errors import NotFinite, WrongBase

# nn.MultiheadAttention keeps q, k and v stacked in one matrix; an adapter names them apart.
STACKED = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:  # noqa: N803
    """``scaling * sum_i b_i a_i^T`` of rank-1 experts, float32.

    Args:
        lora_A: (num_experts, d_in), one expert per row.
        lora_B: (d_out, num_experts), one expert a column.
    """
    return scaling * (lora_B.float() @ lora_A.float())


def merge(state_dict: dict[str, Tensor], adapters: Iterable[Adapter]) -> dict[str, Tensor]:
    """Fold adapters, in the order given, into the weights they were trained on.

    Summed in float32 and cast back last, so the same adapters give the same bytes wherever they are merged.

    Args:
        state_dict: an open_clip CLIP's weights; not changed.

    Returns:
        a new dict; weights that no adapter touches are the very same tensors.

    Raises:
        WrongBase: an adapter names a layer that these weights don't have, or one of another shape.
        NotFinite: a merged weight is NaN, or beyond its dtype; names the adapter and the layer.
    """
    merged = dict(state_dict)
    for adapter in adapters:
        for module in adapter.modules():
            key, stacked_at = weight_of(module)
            if key not in merged:
                raise WrongBase(f"adapter {adapter.task!r}: layer {module} is not in these weights (no {key})")
            lora_A, lora_B = adapter.experts(module)  # noqa: N806
            shape, (rows, *rest) = (lora_B.shape[0], lora_A.shape[1]), merged[key].shape
            if shape != (rows if stacked_at is None else rows // len(STACKED), *rest):  # before a product of any size
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
    """The state_dict key that holds a layer's weight, and its place where three are stacked in one."""
    parent, _, name = module.rpartition(".")
    if name in STACKED:
        return f"{parent}.in_proj_weight", STACKED[name]
    return f"{module}.weight", None
