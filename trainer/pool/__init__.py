"""The method: a single LoRA in every linear layer, seen as a pool of rank-1 experts."""

from trainer.pool.experts import ExpertPool
from trainer.pool.injection import PoolSet, attach_pools, detach_pools
from trainer.pool.losses import contrastive_loss, orthogonality_loss
from trainer.pool.router import Router, RoutingPosition

__all__ = [
    "ExpertPool",
    "PoolSet",
    "Router",
    "RoutingPosition",
    "attach_pools",
    "contrastive_loss",
    "detach_pools",
    "orthogonality_loss",
]
