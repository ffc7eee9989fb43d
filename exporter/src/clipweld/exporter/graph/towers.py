"""The towers as exported: raw inputs, L2-normalised features, and plain operators, which run fastest.

ONNX Runtime can't fuse what torch exports for its own attention and GELU. Written out as here the graph has a quarter
fewer nodes, and ONNX Runtime fuses BiasGelu and FusedMatMul by itself. Its contrib operator for attention was no faster
on a CPU; ``evidence.studies.speed`` compares with other exports.
"""

from __future__ import annotations

import copy
import math

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipweld.trainer.base.backbone import transformer_blocks
from clipweld.trainer.base.cls_block import encode_text


class ImageTower(nn.Module):
    """Pixels -> image features; scaling and normalisation by mean and std included."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: open_clip.CLIP, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.visual = model.visual
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """uint8 (batch, image_size, image_size, 3), RGB -> float32 (batch, embed_dim), L2-normalised."""
        pixels = image.permute(0, 3, 1, 2).to(torch.float32) / 255.0
        features = self.visual(((pixels - self.mean) / self.std).to(self.visual.conv1.weight.dtype))
        return F.normalize(features.to(torch.float32), dim=-1)


class TextTower(nn.Module):
    """Tokens of any length -> text features: the text half of a CLIP, its parts under open_clip's own names."""

    def __init__(self, model: open_clip.CLIP) -> None:
        super().__init__()
        self.context_length, self.vocab_size = model.context_length, model.vocab_size
        self.token_embedding = model.token_embedding
        self.positional_embedding = model.positional_embedding
        self.transformer = model.transformer
        self.ln_final = model.ln_final
        self.text_projection = model.text_projection
        self.register_buffer("attn_mask", model.attn_mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """int32 (batch, seq_len) -> float32 (batch, embed_dim), L2-normalised.

        Longer inputs are cut to the context and ids clamped to the vocabulary, because an error here would also fail
        the other requests of Triton's batch.
        """
        length = torch.sym_min(tokens.shape[1], self.context_length)
        tokens = tokens.narrow(1, 0, length).clamp(0, self.vocab_size - 1)
        return F.normalize(encode_text(self, tokens).to(torch.float32), dim=-1)


class PlainAttention(nn.Module):
    """Replacement for nn.MultiheadAttention, with its interface and weights, in matrix products and a softmax."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """query, key, value (batch, seq_len, width); attn_mask (seq_len, seq_len), added to the scores."""
        layers = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (F.linear(*layer).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in layers)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if attn_mask is not None:
            scores = scores + attn_mask
        return self.out_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)), None


class PlainGELU(nn.Module):
    """The exact GELU, in the order of operations that ONNX Runtime fuses."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def plain(model: open_clip.CLIP, dtype: torch.dtype) -> open_clip.CLIP:
    """Return an equivalent CLIP in plain operators; tensors that keep their dtype are shared, not copied."""
    parameters = {id(p): nn.Parameter(p.to(dtype), requires_grad=False) for p in model.parameters()}
    buffers = {id(b): b.to(dtype) for b in model.buffers()}
    copied = copy.deepcopy(model, parameters | buffers)
    for block in transformer_blocks(copied):
        if isinstance(block.attn, nn.MultiheadAttention):
            block.attn = PlainAttention(block.attn)
        mlp = block.get_submodule("mlp")
        if isinstance(mlp.gelu, nn.GELU) and mlp.gelu.approximate == "none":
            mlp.gelu = PlainGELU()
    return copied
