"""How far a task has moved what was not learned: a number to watch where no other task's test images are at hand."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clipweld.trainer.adapters.adapter import Moved
from clipweld.trainer.base.backbone import Backbone, encode_classes
from clipweld.trainer.base.batches import Batches
from clipweld.trainer.errors import NotFinite
from clipweld.trainer.method.anchors import HELD_OUT, LOGIT_SCALE, encode_words, word_tokens
from clipweld.trainer.method.drift import CHUNK, MAX_IMAGES


@torch.no_grad()
def movement(before: Backbone, after: Backbone, batches: Batches) -> Moved:
    """Compare two models on common words that the anchor loss leaves out, and on a task's images and class names.

    Logits are at CLIP's scale of 100. A word's logit is that of its features after with its own features before: it
    falls by ``100 * (1 - cosine)``. Images are described by each model in its own words, softmax over all of them.

    Args:
        before, after: the model before and after the task.
        batches: the task's training images, of which at most ``MAX_IMAGES`` are used.

    Raises:
        NotFinite: features of either model are NaN or infinite.
    """
    tokens = word_tokens(before, HELD_OUT)
    old, new = (encode_words(model, tokens) for model in (before, after))
    fallen = _fallen(old, new)
    task = batches.task
    diverged = torch.cat(
        [
            F.kl_div(_described(after, pixels, new), _described(before, pixels, old), log_target=True, reduction="none")
            for pixels in batches.chunks(CHUNK, MAX_IMAGES)
        ]
    )
    found = fallen.mean(), fallen.quantile(0.95), diverged.sum(dim=-1).mean().clamp(min=0)
    words_mean, words_p95, images_kl = (value.item() for value in found)
    if not all(map(math.isfinite, (words_mean, words_p95, images_kl))):
        raise NotFinite(
            f"task {task.name!r}: after learning it, features of common words or of its images are NaN or "
            "infinite; learn it again with a lower --lr"
        )
    names = _fallen(*(encode_classes(model, task.class_names, task.templates) for model in (before, after)))
    return Moved(words_mean=words_mean, words_p95=words_p95, images_kl=images_kl, names_mean=names.mean().item())


def _fallen(old: Tensor, new: Tensor) -> Tensor:
    """Return by how much the logits (texts,) of texts with their own old features fell; both (texts, embed_dim)."""
    return LOGIT_SCALE * (1 - (old * new).sum(dim=-1)).clamp(min=0)


def _described(model: Backbone, pixels: Tensor, words: Tensor) -> Tensor:
    """Return the logarithm of the distribution of each image over all words: (images, words)."""
    features = F.normalize(model.model.encode_image(pixels), dim=-1)
    return (LOGIT_SCALE * features @ words.T).log_softmax(dim=-1)
