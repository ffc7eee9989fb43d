"""The method: one LoRA per linear layer, treated as a pool of rank-1 experts."""

from clipweld.trainer.method.experts import ExpertPool
from clipweld.trainer.method.injection import PoolSet, attach_pools, detach_pools
from clipweld.trainer.method.losses import contrastive_loss, orthogonality_loss
from clipweld.trainer.method.router import Router, RoutingPosition

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
