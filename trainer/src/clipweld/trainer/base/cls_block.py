"""open_clip's towers, computed where they are read: equal to rounding, and cheaper."""

from __future__ import annotations

import open_clip
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn


class ClsBlock(ResidualAttentionBlock):  # type: ignore[misc]  # open_clip has no types
    """The last block of an image tower, for the one token that is read after it.

    Only [CLS] asks: other tokens are keys and values, and go neither through the last attention's output layer nor
    through the last MLP. Of a block's products a sixth is left. Parts and names of weights are the block's own.
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
    """Have the image tower compute no more of its last block than is read; in place."""
    blocks = model.visual.transformer.resblocks
    if type(blocks[-1]) is ResidualAttentionBlock:  # open_clip's other block has queries and keys from one input
        blocks[-1] = ClsBlock(blocks[-1])


def cut_to_longest(tokens: Tensor) -> Tensor:
    """Drop the columns after the last EOT of a batch of tokens (batch, seq_len).

    The text tower is causal and read at EOT, so what follows it can't matter: exact, and several times cheaper.
    """
    return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]


def encode_text(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """Text features (batch, embed_dim), not normalised, of tokens (batch, seq_len) of any length up to the context.

    open_clip's own ``encode_text`` takes the full context only; this one is equal to it on every length.
    """
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)
    x = x[torch.arange(x.shape[0], device=x.device), tokens.argmax(dim=-1)]
    if isinstance(model.text_projection, nn.Linear):
        return model.text_projection(x)
    return x if model.text_projection is None else x @ model.text_projection
