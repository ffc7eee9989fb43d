"""Word anchors: a loss that preserves a model's knowledge, without images or class names of earlier tasks.

Nine hundred common words (of ImageNet's class names, which come with open_clip) represent everything that the model is
not being taught; a hundred more are left to see what the loss doesn't look at. Two things must stay as they were before
the task: the features of the words (text tower), and the similarities of the task's images to the words (image tower).
The first is feature distillation, the second *Learning without Forgetting* (arXiv 1606.09282) with words in place of
classes. Both are measured in logits, because at CLIP's scale of 100 a cosine that is off by 0.01 moves a logit by one.
A step's words pass through the text tower in one batch with its prompts, so that they constrain the same experts that
the prompts train, and vote for experts too.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from clipweld.trainer.base.backbone import Backbone
from clipweld.trainer.base.batches import Batch, Batches
from clipweld.trainer.base.cls_block import cut_to_longest, encode_text
from clipweld.trainer.text import prompt_of

TEMPLATE = "a photo of a {}"
# Every tenth word is held out: ``learning.movement`` measures how far these have moved.
HELD_OUT = tuple(open_clip.IMAGENET_CLASSNAMES[::10])
WORDS = tuple(word for index, word in enumerate(open_clip.IMAGENET_CLASSNAMES) if index % 10)
WORDS_PER_STEP = 32
CHUNK = 256
# From cosines to logits: the scale of the published CLIPs, whatever the model's own is.
LOGIT_SCALE = 100.0


def word_tokens(backbone: Backbone, words: Sequence[str] = WORDS) -> Tensor:
    """Return the tokens of words: int64 (words, context_length)."""
    return backbone.tokenizer([prompt_of(TEMPLATE, word) for word in words]).to(backbone.device)


@torch.no_grad()
def encode_words(backbone: Backbone, tokens: Tensor) -> Tensor:
    """Return a model's features (words, embed_dim) of words, L2-normalised."""
    model = backbone.model.eval()
    return F.normalize(torch.cat([encode_text(model, cut_to_longest(c)) for c in tokens.split(CHUNK)]), dim=-1)


class WordAnchors:
    """Features of words and images as a model computed them before a task.

    Args:
        backbone: the model before its first step. Images that are kept in memory and don't change are encoded at
            once; otherwise a copy of the model is kept, which encodes each batch.
        batches: the task's images.
        seed: draws the words of each step.
    """

    @torch.no_grad()
    def __init__(self, backbone: Backbone, batches: Batches, seed: int) -> None:
        self._seed = seed
        self._tokens = word_tokens(backbone)
        self._words = encode_words(backbone, self._tokens)
        model = (backbone.model if batches.unchanging else copy.deepcopy(backbone.model)).eval()
        self._model = model
        self._images = None
        if batches.unchanging:
            self._images = torch.cat([self._encode(pixels) for pixels in batches.chunks(CHUNK)])
            self._model = None

    def tokens(self, number: int) -> Tensor:
        """Return the words of a step: int64 (WORDS_PER_STEP, context_length)."""
        return self._tokens[self._drawn(number)]

    def loss(self, number: int, batch: Batch, image_features: Tensor, word_features: Tensor) -> Tensor:
        """Return the anchor loss of a step.

        Args:
            number: the step, which determines the words.
            batch: the batch, of whose images this process has a share.
            image_features: (share, embed_dim), L2-normalised, of the model in training.
            word_features: (WORDS_PER_STEP, embed_dim), L2-normalised, of the step's words.

        Returns:
            a scalar: KL(before || now) of the images' distributions over all words, mean over the share, plus the drop
            of each word's logit with its own old features, mean over the step's words.
        """
        before = self._encode(batch.pixels) if self._images is None else self._images[batch.indices]
        described = (LOGIT_SCALE * before @ self._words.T).softmax(dim=-1)
        now = (LOGIT_SCALE * image_features @ self._words.T).log_softmax(dim=-1)
        cosines = (word_features * self._words[self._drawn(number)]).sum(dim=-1)
        return F.kl_div(now, described, reduction="batchmean") + LOGIT_SCALE * (1 - cosines).mean()

    def _drawn(self, number: int) -> list[int]:
        return random.Random(f"words {self._seed} {number}").sample(range(len(self._words)), WORDS_PER_STEP)

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        """Return the features (batch, embed_dim) of images before the task, L2-normalised."""
        return F.normalize(self._model.encode_image(pixels), dim=-1)
