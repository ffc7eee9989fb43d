"""The rank-1 expert pool of one linear layer."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import PoolConfig


class RoutingPosition:
    """Which token of a sequence a tower is routed on; shared by all pools of the tower.

    ``index`` is None for token 0 (the image tower's [CLS]), or an int64 tensor (batch,): the EOT token of each text.
    """

    def __init__(self) -> None:
        self.index: Tensor | None = None

    def pick(self, x: Tensor) -> Tensor:
        """The routing token's features (batch, width) of x (batch, seq_len, width)."""
        if self.index is None:
            return x[:, 0]
        return x[torch.arange(x.shape[0], device=x.device), self.index]


class ExpertPool(nn.Module):
    """A frozen linear layer with ``rank`` rank-1 experts beside it.

    Expert i adds ``scaling * b_i a_i^T`` to the weight, with a_i a row of ``lora_A`` and b_i a column of ``lora_B``.
    Training composes in two stages (METHOD: arXiv 2601.22828): each sample's router votes for its ``k_active`` most
    probable experts, and the ``k_active`` experts with most votes serve the whole batch. In eval mode the pool is what
    the merge will make of it: the ``k_merge`` most activated experts, no router, no votes, no dependence on the batch.

    Attributes:
        consolidating: train exactly the experts that will be merged; set for the last part of training, so that the
            merged model is the trained one.
        lora_A: (rank, d_in), Kaiming-uniform.
        lora_B: (d_out, rank), zeros, so that a fresh pool changes nothing.
        router: linear map d_in -> rank on the layer's own input at the routing token.
        activation_counts: int64 (rank,), votes summed over training.
    """

    def __init__(self, base_layer: nn.Linear, config: PoolConfig, position: RoutingPosition) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.position = position
        self.consolidating = False
        self.k_active = config.k_active
        self.k_merge = config.k_merge
        self.scaling = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)
        weight = base_layer.weight
        self.lora_A = nn.Parameter(torch.empty(config.rank, weight.shape[1], device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], config.rank, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.router = nn.Linear(weight.shape[1], config.rank, device=weight.device)
        self.register_buffer("activation_counts", torch.zeros(config.rank, dtype=torch.int64, device=weight.device))

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: open_clip asks a block's ``c_fc`` for its dtype."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, seq_len, d_in) -> (batch, seq_len, d_out)."""
        out = self.base_layer(x)
        if not self.training:
            lora_A, lora_B = self.merged_experts()  # noqa: N806
            return out + F.linear(F.linear(x, lora_A), lora_B) * self.scaling
        probabilities = self.router(self.position.pick(x)).softmax(dim=-1)
        active = self.most_activated() if self.consolidating else self.vote(probabilities)
        # Straight-through: exactly 1 in the forward pass, the gradient of the probability in the backward pass.
        chosen = probabilities[:, active]
        gate = 1 + (chosen - chosen.detach())
        hidden = F.linear(self.dropout(x), self.lora_A[active]) * gate[:, None, :]
        return out + F.linear(hidden, self.lora_B[:, active]) * self.scaling

    @torch.no_grad()
    def vote(self, probabilities: Tensor) -> Tensor:
        """Indices (k_active,) of the experts that serve this batch, from router probabilities (batch, rank).

        The votes of all ranks are summed first, so that every rank has the same active set.
        """
        choices = probabilities.topk(self.k_active, dim=-1).indices
        votes = torch.bincount(choices.flatten(), minlength=probabilities.shape[1])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(votes)
        self.activation_counts += votes
        return votes.topk(self.k_active).indices.sort().values

    def most_activated(self) -> Tensor:
        """Indices (k_merge,) of the experts that will be merged."""
        return self.activation_counts.topk(self.k_merge).indices.sort().values

    def merged_experts(self) -> tuple[Tensor, Tensor]:
        """``lora_A (k_merge, d_in)`` and ``lora_B (d_out, k_merge)`` of the most activated experts."""
        experts = self.most_activated()
        return self.lora_A[experts], self.lora_B[:, experts]
