"""NaN and infinity, found where they arise and named."""

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
    """Whether no number of any of them is NaN or infinite: one answer from the device, however many there are."""
    if get_total_norm(tensors).isfinite():  # a norm is quick, but may overflow where no number does
        return True
    return all(tensor.isfinite().all() for tensor in tensors)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None where all is well."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def unit(features: Tensor, names: Sequence[str]) -> Tensor:
    """Features (batch, embed_dim), L2-normalised.

    Args:
        names: what each row is of.

    Raises:
        NotFinite: names the first row without a direction: not finite, of length zero, or of one beyond float32.
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
    """Which vectors of these lengths can be normalised; bool, of the same shape."""
    return lengths.isfinite() & (lengths > 0)


@torch.no_grad()
def first_fault(model: nn.Module, pixels: Tensor, terms: Callable[[], Mapping[str, Tensor]], fabric: Fabric) -> str:
    """What is the first to hold NaN or infinity in a training step's forward pass, in words.

    In the order of use: the weights, the images, each layer's output, the terms of the loss. What any process sees
    counts, so that every one says the same; all of them call this.

    Args:
        pixels: the images of this process.
        terms: runs the forward pass once more; the terms of its loss by name.
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
