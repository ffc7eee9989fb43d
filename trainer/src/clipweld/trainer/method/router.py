"""The router: which experts of a pool serve a batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipweld.trainer.config import PoolConfig


class RoutingPosition:
    """The token of a sequence that a tower is routed on; shared by all routers of the tower.

    Attributes:
        index: None for token 0 (the image tower's [CLS]), or an int64 tensor (batch,): the EOT token of each text.
        sharded: whether each process sees different samples, so that votes must be summed over processes. Images are
            split among processes, texts are not.
    """

    def __init__(self, *, sharded: bool) -> None:
        self.index: Tensor | None = None
        self.sharded = sharded

    def pick(self, x: Tensor) -> Tensor:
        """Return the routing token's features (batch, width) of x (batch, seq_len, width)."""
        if self.index is None:
            return x[:, 0]
        return x[torch.arange(x.shape[0], device=x.device), self.index]


class Router(nn.Module):
    """Two-stage composition (arXiv 2601.22828): samples vote, and the experts with the most votes serve the batch.

    Each sample votes for its ``k_active`` most probable experts. The ``k_active`` experts with the most votes serve
    the whole batch. A router belongs to one pool, or to all pools of a block.

    Attributes:
        linear: width -> rank, on the routing token; None if the first ``k_active`` experts always serve.
        activation_counts: int64 (rank,), votes summed over training.
        consolidating: whether the experts to merge are active, regardless of the votes.
        active: int64 (experts,), the experts that serve the current batch.
        gate: (batch, experts), their weight: exactly 1 in the forward pass, with the gradient of the softmax
            probability in the backward pass (straight-through). None if the router is not trained.
    """

    activation_counts: Tensor

    def __init__(self, width: int, config: PoolConfig, position: RoutingPosition, device: torch.device) -> None:
        super().__init__()
        self.position = position
        self.k_active = config.k_active
        self.k_merge = config.k_merge
        self.consolidating = False
        self.linear = None
        if config.router != "none":
            self.linear = nn.Linear(width, config.rank, device=device).requires_grad_(config.router == "learned")
        self.register_buffer("activation_counts", torch.zeros(config.rank, dtype=torch.int64, device=device))
        self.active: Tensor | None = None
        self.gate: Tensor | None = None

    def forward(self, x: Tensor) -> None:
        """Set ``active`` and ``gate`` for a batch x (batch, seq_len, width)."""
        if self.linear is None:
            self.active = self.most_activated() if self.consolidating else self._first(self.k_active)
            return
        probabilities = self.linear(self.position.pick(x)).softmax(dim=-1)
        self.active = self.most_activated() if self.consolidating else self.vote(probabilities)
        if self.linear.weight.requires_grad:
            chosen = probabilities[:, self.active]
            self.gate = 1 + (chosen - chosen.detach())

    @torch.no_grad()
    def vote(self, probabilities: Tensor) -> Tensor:
        """Return the indices (k_active,) of the experts that serve this batch, from probabilities (batch, rank).

        Votes are summed over all processes first, so that all have the same active experts.
        """
        choices = probabilities.topk(self.k_active, dim=-1).indices
        votes = torch.bincount(choices.flatten(), minlength=probabilities.shape[1])
        if self.position.sharded and dist.is_available() and dist.is_initialized():
            dist.all_reduce(votes)
        self.activation_counts += votes
        return votes.topk(self.k_active).indices.sort().values

    def most_activated(self) -> Tensor:
        """Return the indices (k_merge,) of the experts to merge."""
        if self.linear is None:
            return self._first(self.k_merge)
        return self.activation_counts.topk(self.k_merge).indices.sort().values

    def _first(self, count: int) -> Tensor:
        return torch.arange(count, device=self.activation_counts.device)
