"""Words as anchors: hold what a model knows in place while it learns, without an image or a name of earlier tasks.

A thousand common words (ImageNet's class names, which come with open_clip) stand in for everything the model is not
being taught. Two things must stay as they were before the task: the features of the words themselves (text tower), and
how the words describe the task's own images (image tower). The first is feature distillation, the second *Learning
without Forgetting* (arXiv 1606.09282) with words in the place of classes. The words pass through the pools like any
batch: they are routed, and their votes count.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.backbone import Backbone, cut_to_longest, encode_text

TEMPLATE = "a photo of a {}"
WORDS_PER_STEP = 32
# How sharply words describe an image: the scale of the published CLIPs, whatever the model at hand has.
LOGIT_SCALE = 100.0


class WordAnchors:
    """A model as it was before a task, seen through words.

    Args:
        backbone: that model; it is kept and asked once about every image, never changed.
        seed: draws the words of each step.
        keep: remember what was said of an image; for sets that fit in memory.
    """

    def __init__(self, backbone: Backbone, seed: int, *, keep: bool) -> None:
        self._backbone = backbone
        self._draw = random.Random(seed)
        self._keep = keep
        self._described: dict[int, Tensor] = {}
        prompts = [TEMPLATE.replace("{}", word) for word in open_clip.IMAGENET_CLASSNAMES]
        self._tokens = backbone.tokenizer(prompts).to(backbone.device)
        with torch.no_grad():
            features = [encode_text(backbone.model, cut_to_longest(chunk)) for chunk in self._tokens.split(256)]
        self._words = F.normalize(torch.cat(features), dim=-1)

    def loss(self, model: open_clip.CLIP, indices: Sequence[int], pixels: Tensor, image_features: Tensor) -> Tensor:
        """How far a model in training has moved, as a scalar.

        Args:
            model: the model in training.
            indices: which training images the batch holds.
            pixels: (batch, 3, S, S), the images themselves.
            image_features: (batch, embed_dim), what the model makes of them, L2-normalised.

        Returns:
            KL divergence from the old to the new description of the images, mean over the batch, plus the mean of
            1 - cosine of old and new features of ``WORDS_PER_STEP`` words.
        """
        now = (LOGIT_SCALE * image_features @ self._words.T).log_softmax(dim=-1)
        images = F.kl_div(now, self._describe(indices, pixels), reduction="batchmean")
        drawn = self._draw.sample(range(len(self._words)), WORDS_PER_STEP)
        words = F.normalize(encode_text(model, cut_to_longest(self._tokens[drawn])), dim=-1)
        return images + (1 - (words * self._words[drawn]).sum(dim=-1)).mean()

    @torch.no_grad()
    def _describe(self, indices: Sequence[int], pixels: Tensor) -> Tensor:
        """Probabilities of the words (batch, num_words) for images, as the model saw them before the task."""
        new = [place for place, index in enumerate(indices) if index not in self._described]
        if new:
            features = F.normalize(self._backbone.model.encode_image(pixels[new]), dim=-1)
            self._described |= {indices[place]: feature for place, feature in zip(new, features, strict=True)}
        features = torch.stack([self._described[index] for index in indices])
        if not self._keep:
            self._described.clear()
        return (LOGIT_SCALE * features @ self._words.T).softmax(dim=-1)
