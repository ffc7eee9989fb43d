"""Attaching pools to both towers, and detaching them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import open_clip
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clipweld.trainer.adapters.adapter import Coefficients
from clipweld.trainer.config import PoolConfig
from clipweld.trainer.method.attention import split_attention
from clipweld.trainer.method.experts import ExpertPool
from clipweld.trainer.method.router import Router, RoutingPosition


@dataclass
class PoolSet:
    """The pools of a model, by the open_clip path of the layer that each one replaces."""

    pools: dict[str, ExpertPool]
    _originals: list[tuple[nn.Module, str, nn.Module]] = field(repr=False)
    _hook: RemovableHandle = field(repr=False)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that training changes, by name: experts, routers, counts. They are not copies."""
        state: dict[str, Tensor] = {}
        for module, pool in self.pools.items():
            state |= {f"{module}.lora_A": pool.lora_A, f"{module}.lora_B": pool.lora_B}
            if pool.leads:
                state |= {f"{module}.router.{name}": value for name, value in pool.router.named_parameters()}
                state[f"{module}.router.activation_counts"] = pool.router.activation_counts
        return state

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return all trained parameters: experts and routers."""
        return (tensor for tensor in self.state().values() if isinstance(tensor, nn.Parameter) and tensor.requires_grad)

    @property
    def num_trainable(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters())

    def consolidate(self) -> None:
        """Train only the experts that will be merged from now on."""
        for pool in self.pools.values():
            pool.router.consolidating = True

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return ``<module>.lora_A`` and ``<module>.lora_B`` of the experts to merge, float32, on the CPU."""
        tensors = {}
        for module, pool in self.pools.items():
            lora_A, lora_B = pool.merged_experts()  # noqa: N806
            tensors[f"{module}.lora_A"] = lora_A.detach().float().cpu().contiguous()
            tensors[f"{module}.lora_B"] = lora_B.detach().float().cpu().contiguous()
        return tensors

    @torch.no_grad()
    def scale(self, coefficients: Coefficients) -> None:
        """Multiply the update of each tower by its coefficient."""
        for module, pool in self.pools.items():
            pool.lora_B.mul_(coefficients[tower_of(module)])

    def activation_counts(self) -> dict[str, list[int]]:
        """Return by layer the number of votes for each expert of its pool."""
        return {module: pool.router.activation_counts.tolist() for module, pool in self.pools.items()}


def tower_of(module: str) -> Literal["image", "text"]:
    """Return the tower of a layer, by its path."""
    return "image" if module.startswith("visual.") else "text"


def attach_pools(model: open_clip.CLIP, config: PoolConfig) -> PoolSet:
    """Replace q, k, v, out, c_fc and c_proj in every block of both towers by pools.

    The image tower is routed on token 0, the text tower on each prompt's EOT token (or on token 0 too, with
    ``config.route_on`` "first"). A hook on the token embedding records the EOT positions, because the blocks don't see
    the tokens. Base weights are shared, not copied.
    """
    image, text = RoutingPosition(sharded=True), RoutingPosition(sharded=False)

    def note_eot(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        text.index = inputs[0].argmax(dim=-1) if config.route_on == "cls" else None

    hook = model.token_embedding.register_forward_pre_hook(note_eot)
    pools: dict[str, ExpertPool] = {}
    originals: list[tuple[nn.Module, str, nn.Module]] = []
    for tower, path, position in (
        (model.visual.transformer, "visual.transformer", image),
        (model.transformer, "transformer", text),
    ):
        for number, block in enumerate(tower.resblocks):
            originals.append((block, "attn", block.attn))
            block.attn = split_attention(block.attn)
            router: Router | None = None
            for parent, name in _layers(block):
                layer = getattr(parent, name)
                leads = router is None or config.router_per == "layer"
                if router is None or leads:
                    router = Router(layer.in_features, config, position, layer.weight.device)
                pool = ExpertPool(layer, config, router, leads=leads)
                originals.append((parent, name, layer))
                setattr(parent, name, pool)
                prefix = "attn" if parent is block.attn else "mlp"
                pools[f"{path}.resblocks.{number}.{prefix}.{name}"] = pool
    return PoolSet(pools, originals, hook)


def detach_pools(pool_set: PoolSet) -> None:
    """Restore the model to its state before ``attach_pools``."""
    pool_set._hook.remove()
    for parent, name, layer in reversed(pool_set._originals):
        setattr(parent, name, layer)


def _layers(block: ResidualAttentionBlock) -> list[tuple[nn.Module, str]]:
    """Return the six linear layers of a block as (parent, name), in the order they are called."""
    attention = [(block.attn, name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    return attention + [(block.mlp, name) for name in ("c_fc", "c_proj")]
