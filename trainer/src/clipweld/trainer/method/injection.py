"""Pools into both towers, and out again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import open_clip
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clipweld.trainer.config import PoolConfig
from clipweld.trainer.method.attention import split_attention
from clipweld.trainer.method.experts import ExpertPool
from clipweld.trainer.method.router import Router, RoutingPosition


@dataclass
class PoolSet:
    """The pools of a model, by the open_clip path of the layer each one sits on."""

    pools: dict[str, ExpertPool]
    _originals: list[tuple[nn.Module, str, nn.Module]] = field(repr=False)
    _hook: RemovableHandle = field(repr=False)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name: experts, routers, counts. The live ones, not copies."""
        state: dict[str, Tensor] = {}
        for module, pool in self.pools.items():
            state |= {f"{module}.lora_A": pool.lora_A, f"{module}.lora_B": pool.lora_B}
            if pool.leads:
                state |= {f"{module}.router.{name}": value for name, value in pool.router.named_parameters()}
                state[f"{module}.router.activation_counts"] = pool.router.activation_counts
        return state

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that is trained: experts and routers."""
        return (tensor for tensor in self.state().values() if isinstance(tensor, nn.Parameter) and tensor.requires_grad)

    @property
    def num_trainable(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def consolidate(self) -> None:
        """From here on train exactly the experts that will be merged."""
        for pool in self.pools.values():
            pool.router.consolidating = True

    def merged_tensors(self) -> dict[str, Tensor]:
        """What the task leaves behind: ``<module>.lora_A`` and ``<module>.lora_B`` of the merged experts, float32."""
        tensors = {}
        for module, pool in self.pools.items():
            lora_A, lora_B = pool.merged_experts()  # noqa: N806
            tensors[f"{module}.lora_A"] = lora_A.detach().float().cpu().contiguous()
            tensors[f"{module}.lora_B"] = lora_B.detach().float().cpu().contiguous()
        return tensors

    def activation_counts(self) -> dict[str, list[int]]:
        """By layer, the votes that each expert of its pool got."""
        return {module: pool.router.activation_counts.tolist() for module, pool in self.pools.items()}


def attach_pools(model: open_clip.CLIP, config: PoolConfig) -> PoolSet:
    """Put a pool on q, k, v, out, c_fc and c_proj of every block of both towers.

    The image tower is routed on token 0, the text tower on each prompt's EOT token, which a hook on the token
    embedding notes as the tokens come in. Base weights are used in place, not copied.
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
    """Leave the model as ``attach_pools`` found it."""
    pool_set._hook.remove()
    for parent, name, layer in reversed(pool_set._originals):
        setattr(parent, name, layer)


def _layers(block: ResidualAttentionBlock) -> list[tuple[nn.Module, str]]:
    """The six linear layers of a block, in the order they are called."""
    attention = [(block.attn, name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    return attention + [(block.mlp, name) for name in ("c_fc", "c_proj")]
