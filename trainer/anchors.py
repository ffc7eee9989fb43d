"""Anchors: hold what a model knows in place while it learns, without an image or a name of earlier tasks.

A thousand common words (ImageNet's class names, which come with open_clip) and drawn pictures of nothing in particular
stand in for everything the model is not being taught. What must stay as it was before the task: the features of the
words (text tower), and how the words describe the task's own images and the drawn pictures (image tower). The first is
feature distillation, the second *Learning without Forgetting* (arXiv 1606.09282) with words in the place of classes.
Words and pictures pass through the towers beside a step's prompts and images, so they hold the very experts that these
train; their votes count like any.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.backbone import Backbone, cut_to_longest, encode_text
from trainer.batches import Batch, Batches
from trainer.config import TrainConfig
from trainer.pictures import picture

TEMPLATE = "a photo of a {}"
WORDS_PER_STEP = 32
PICTURES = 512
CHUNK = 256
# How sharply words describe an image: the scale of the published CLIPs, whatever the model at hand has.
LOGIT_SCALE = 100.0


class Anchors:
    """A model as it was before a task, seen through words and drawn pictures.

    Args:
        backbone: that model, before its first step; few-shot images are described here and now, and where there are too
            many to keep, a copy of the model stays.
        batches: the task's images.
    """

    @torch.no_grad()
    def __init__(self, backbone: Backbone, batches: Batches, config: TrainConfig) -> None:
        self._seed = config.seed
        self._share = config.anchor_pictures
        self._rank, self._world_size = batches.rank, batches.world_size
        self._device = backbone.device
        self._model = copy.deepcopy(backbone.model).eval()
        prompts = [TEMPLATE.replace("{}", word) for word in open_clip.IMAGENET_CLASSNAMES]
        self._tokens = backbone.tokenizer(prompts).to(self._device)
        features = [encode_text(self._model, cut_to_longest(chunk)) for chunk in self._tokens.split(CHUNK)]
        self._words = F.normalize(torch.cat(features), dim=-1)
        self._pictures = torch.empty(0)
        if self._share:
            self._pictures = torch.stack([backbone.preprocess(picture(number)) for number in range(PICTURES)])
            self._picture_features = self._encode(self._pictures.split(CHUNK))
        self._image_features = None
        if batches.few_shot:
            chunks = torch.arange(len(batches)).split(CHUNK)
            self._image_features = self._encode(batches.pixels(chunk.tolist()) for chunk in chunks)
            self._model = None

    def tokens(self, number: int) -> Tensor:
        """The words of a step: int64 (WORDS_PER_STEP, context_length)."""
        return self._tokens[self._drawn_words(number)]

    def pixels(self, number: int) -> Tensor:
        """This process's drawn pictures of a step: (anchor_pictures, 3, S, S)."""
        return self._pictures[self._drawn_pictures(number)].to(self._device)

    def loss(self, number: int, batch: Batch, image_features: Tensor, word_features: Tensor) -> Tensor:
        """How far a model in training has moved, as a scalar.

        Args:
            number: the step, which drew the words and the pictures.
            batch: its images are those of this process.
            image_features: (share + anchor_pictures, embed_dim), what the model in training makes of the batch's images
                and the step's pictures, L2-normalised.
            word_features: (WORDS_PER_STEP, embed_dim), what it makes of the step's words, L2-normalised.

        Returns:
            KL divergence from the old to the new description, mean over the images plus mean over the pictures, plus
            the mean of 1 - cosine of old and new features of the words.
        """
        images, pictures = image_features.tensor_split([len(batch.indices)])
        before = self._encode([batch.pixels]) if self._image_features is None else self._image_features[batch.indices]
        words = (1 - (word_features * self._words[self._drawn_words(number)]).sum(dim=-1)).mean()
        loss = self._divergence(before, images) + words
        if self._share:
            loss = loss + self._divergence(self._picture_features[self._drawn_pictures(number)], pictures)
        return loss

    def _divergence(self, before: Tensor, now: Tensor) -> Tensor:
        """KL divergence between what the words say of image features (batch, embed_dim) before and now; mean."""
        described = (LOGIT_SCALE * before @ self._words.T).softmax(dim=-1)
        return F.kl_div((LOGIT_SCALE * now @ self._words.T).log_softmax(dim=-1), described, reduction="batchmean")

    def _drawn_words(self, number: int) -> list[int]:
        return random.Random(f"words {self._seed} {number}").sample(range(len(self._words)), WORDS_PER_STEP)

    def _drawn_pictures(self, number: int) -> list[int]:
        """Those of this process: its share of what all processes draw."""
        total = self._share * self._world_size
        drawn = random.Random(f"pictures {self._seed} {number}").sample(range(PICTURES), total)
        return drawn[self._rank * self._share : (self._rank + 1) * self._share]

    @torch.no_grad()
    def _encode(self, chunks: Iterable[Tensor]) -> Tensor:
        """Features (batch, embed_dim) of images as the model saw them before the task, L2-normalised."""
        features = [self._model.encode_image(chunk.to(self._device)) for chunk in chunks]
        return F.normalize(torch.cat(features), dim=-1)
