"""open_clip's towers, computed only for the token that is used: equal up to rounding, and cheaper."""

from __future__ import annotations

import open_clip
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn


class ClsBlock(ResidualAttentionBlock):  # type: ignore[misc]  # open_clip has no types
    """The last block of an image tower, computed for [CLS] only, the one token that is used after it.

    Only [CLS] is a query. The other tokens are keys and values, and skip the last attention's output layer and the last
    MLP, which leaves a sixth of the block's matrix products. Submodules and names of weights are those of the block.
    """

    def __init__(self, block: ResidualAttentionBlock) -> None:
        nn.Module.__init__(self)
        for name, part in block.named_children():
            self.add_module(name, part)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """x (batch, seq_len, width) -> (batch, 1, width)."""
        keys = self.ln_1(x)
        cls = x[:, :1] + self.ls_1(self.attention(keys[:, :1], keys, keys, attn_mask=attn_mask))
        return cls + self.ls_2(self.mlp(self.ln_2(cls)))


def read_at_cls(model: open_clip.CLIP) -> None:
    """Replace the image tower's last block, in place, by one that computes only [CLS]."""
    blocks = model.visual.transformer.resblocks
    if type(blocks[-1]) is ResidualAttentionBlock:  # open_clip's other block takes q, k and v from one input
        blocks[-1] = ClsBlock(blocks[-1])


def cut_to_longest(tokens: Tensor) -> Tensor:
    """Drop the columns after the last EOT in a batch of tokens (batch, seq_len).

    The text tower is causal and its features are those of EOT, so later tokens can't change the result. This is exact,
    and several times cheaper.
    """
    return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]


def encode_text(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """Return text features (batch, embed_dim), not normalised, of tokens (batch, seq_len).

    ``seq_len`` may be anything up to the context length. open_clip's own ``encode_text`` takes the full context only;
    the features are the same.
    """
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)
    x = x[torch.arange(x.shape[0], device=x.device), tokens.argmax(dim=-1)]
    if isinstance(model.text_projection, nn.Linear):
        return model.text_projection(x)
    return x if model.text_projection is None else x @ model.text_projection
