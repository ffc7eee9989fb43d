"""The attention of open_clip's blocks as four linear layers, so that each can have a pool.

open_clip uses two classes: torch's nn.MultiheadAttention, and its own ``Attention``, which may normalise queries and
keys, scale heads and normalise the input of the output layer. Both stack q, k and v in one matrix.
"""

from __future__ import annotations

import torch.nn.functional as F
from open_clip.transformer import Attention
from torch import Tensor, nn

from clipweld.trainer.method.experts import ExpertPool


class SplitAttention(nn.Module):
    """Attention with separate q, k, v and out layers, and the interface of nn.MultiheadAttention."""

    q_proj: nn.Module  # nn.Linear, or the pool that replaces it

    def __init__(self, attention: nn.MultiheadAttention | Attention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        biases = attention.in_proj_bias.chunk(3) if attention.in_proj_bias is not None else (None,) * 3
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, bias) for weight, bias in zip(attention.in_proj_weight.chunk(3), biases, strict=True)
        )
        self.out_proj = attention.out_proj

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """query, key, value (batch, seq_len, width); attn_mask (seq_len, seq_len), added to the scores."""
        q, k, v = self._heads(query, key, value)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None

    def _heads(self, *inputs: Tensor) -> list[Tensor]:
        """Return q, k and v, each (batch, heads, seq_len, head_dim). Pools with the same input share its dropout."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if isinstance(self.q_proj, ExpertPool):  # then all three are
            dropout = self.q_proj.dropout
            # Not a set: its order would depend on memory addresses, and with it which input draws which dropout.
            dropped = {x: dropout(x) for x in dict.fromkeys(inputs)}
            outputs = [layer(x, dropped[x]) for layer, x in zip(layers, inputs, strict=True)]
        else:
            outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        return [out.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for out in outputs]


class SplitOwnAttention(SplitAttention):
    """The same for open_clip's own ``Attention``, with its interface, norms and head scales."""

    def __init__(self, attention: Attention) -> None:
        super().__init__(attention)
        self.ln_q, self.ln_k, self.ln_inner = attention.ln_q, attention.ln_k, attention.ln_inner
        self.head_scale = attention.head_scale

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]  # as open_clip's
        """x (batch, seq_len, width); attn_mask (seq_len, seq_len), added to the scores."""
        q, k, v = self._heads(x, x, x)
        out = F.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v, attn_mask=attn_mask)
        if self.head_scale is not None:
            out = out * self.head_scale
        return self.out_proj(self.ln_inner(out.transpose(1, 2).flatten(2)))


def split_attention(attention: nn.MultiheadAttention | Attention) -> SplitAttention:
    """Return an equivalent attention with separate q, k, v and out layers, which share its weights."""
    return SplitOwnAttention(attention) if isinstance(attention, Attention) else SplitAttention(attention)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a frozen linear layer around existing tensors."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer
