"""The rank-1 expert pool of one linear layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipweld.trainer.config import PoolConfig
from clipweld.trainer.method.dropout import ByteDropout
from clipweld.trainer.method.router import Router


class ExpertPool(nn.Module):
    """A frozen linear layer with ``rank`` parallel rank-1 experts.

    Expert i adds ``scaling * b_i a_i^T`` to the weight, with a_i a row of ``lora_A`` and b_i a column of ``lora_B``.
    In training the router's active experts serve the batch. In eval mode the pool computes what the merged weights will
    compute: the ``k_merge`` most activated experts, without router or votes, independent of the batch.

    Attributes:
        lora_A: (rank, d_in), Kaiming-uniform.
        lora_B: (d_out, rank), zeros, so that a fresh pool changes nothing.
        router: picks the experts; several layers may share one.
        leads: whether the router decides on this layer's input. Only the first of the layers that share a router leads.
    """

    def __init__(self, base_layer: nn.Linear, config: PoolConfig, router: Router, *, leads: bool = True) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.router = router
        self.leads = leads
        self.scaling = config.alpha / config.rank
        self.dropout = ByteDropout(config.dropout)
        weight = base_layer.weight
        self.lora_A = nn.Parameter(torch.empty(config.rank, weight.shape[1], device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], config.rank, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, because open_clip reads a block's dtype from ``c_fc.weight``."""
        return self.base_layer.weight

    def forward(self, x: Tensor, dropped: Tensor | None = None) -> Tensor:
        """x (batch, seq_len, d_in) -> (batch, seq_len, d_out).

        Args:
            x: the layer's input.
            dropped: x after dropout, if the caller has computed it already.
        """
        out = self.base_layer(x)
        if not self.training:
            lora_A, lora_B = self.merged_experts()  # noqa: N806
            return out + F.linear(F.linear(x, lora_A), lora_B) * self.scaling
        if self.leads:
            self.router(x)
        dropped = self.dropout(x) if dropped is None else dropped
        hidden = F.linear(dropped, self.lora_A[self.router.active]) * (self.scaling / self.dropout.kept)
        if self.router.gate is not None:
            hidden = hidden * self.router.gate[:, None, :]
        # Experts as rows: with columns the backward products take ten times longer on a CPU.
        return out + hidden @ self.lora_B.T[self.router.active]

    def merged_experts(self) -> tuple[Tensor, Tensor]:
        """Return ``lora_A (k_merge, d_in)`` and ``lora_B (d_out, k_merge)`` of the most activated experts."""
        experts = self.router.most_activated()
        return self.lora_A[experts], self.lora_B[:, experts]
