"""Find NaN and infinity, and name where they first appear."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from clipweld.trainer.errors import NotFinite


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether all numbers are finite; if so, this usually waits for the device only once for all tensors."""
    if get_total_norm(tensors).isfinite():  # fast, but a norm may overflow although all numbers are finite
        return True
    return all(tensor.isfinite().all() for tensor in tensors)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity; None if there is none."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def unit(features: Tensor, names: Sequence[str]) -> Tensor:
    """Return features (batch, embed_dim), L2-normalised.

    Args:
        names: what each row describes, for the error.

    Raises:
        NotFinite: a row has no direction, because it is not finite, its length is zero, or its length overflows
            float32; names the first such row.
    """
    lengths = features.norm(dim=-1)
    usable = has_direction(lengths)
    if not usable.all():
        row = int((~usable).nonzero()[0])
        raise NotFinite(
            f"{names[row]}: expected features of a finite length above 0, got length {float(lengths[row]):g}; "
            "the weights can't be used: take others, or learn again with a lower --lr"
        )
    return F.normalize(features, dim=-1)


def has_direction(lengths: Tensor) -> Tensor:
    """Return which vectors with these lengths can be normalised, as bool of the same shape."""
    return lengths.isfinite() & (lengths > 0)


@torch.no_grad()
def first_fault(model: nn.Module, pixels: Tensor, terms: Callable[[], Mapping[str, Tensor]], fabric: Fabric) -> str:
    """Return, in words, what is the first to hold NaN or infinity in a training step's forward pass.

    The order is that of use: the weights, the images, each layer's output, the terms of the loss. A fault in any
    process counts, so that all processes return the same; all of them must call this.

    Args:
        pixels: the images of this process.
        terms: runs the forward pass again, and returns the terms of its loss by name.
    """
    seen = {f"weight {name}": _holds_fault(weight) for name, weight in model.state_dict().items()}
    seen["the batch's images"] = _holds_fault(pixels)

    def note(name: str) -> Callable:
        def hook(_layer: nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            seen[f"the output of layer {name}"] = any(_holds_fault(o) for o in outputs if isinstance(o, Tensor))

        return hook

    hooks = [layer.register_forward_hook(note(name)) for name, layer in model.named_modules()]
    try:
        found = terms()
    finally:
        for hook in hooks:
            hook.remove()
    seen |= {f"the {name} loss": _holds_fault(term) for name, term in found.items()}
    flags = torch.tensor([*seen.values()], device=pixels.device).float()
    flags = cast("Tensor", fabric.all_reduce(flags, reduce_op="sum"))
    return next((what for what, flag in zip(seen, flags.tolist(), strict=True) if flag), "the sum of the losses")


def _holds_fault(tensor: Tensor) -> bool:
    return not bool(tensor.isfinite().all())
