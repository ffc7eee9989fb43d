"""Pre-training: CLIP's loss with several positives, the optimizers Muon and AdamW, and averaged weights."""

import dataclasses
import json
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call

from evidence.mini_recipe.augment import augment
from evidence.mini_recipe.muon import Muon
from evidence.mini_recipe.pairs import Pair
from evidence.mini_recipe.text import CONTEXT, Vocabulary, draw_caption

log = logging.getLogger(__name__)
VOCABULARY = 49408  # tokens of open_clip's SimpleTokenizer
# How often each kind of picture is drawn.
SHARES = {"emoji": 0.40, "clipart": 0.22, "icon": 0.09, "outline": 0.14, "glyph": 0.15}
SIDED = ("left", "right", "clock", "number", "letter", "music", "note", "text", "sign", "symbol", "keyboard")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of pre-training.

    Attributes:
        minutes: wall-clock time; the learning rate has fallen to 1% at its end.
        small_until: the fraction of the time with `small_size` pixels and `small_batch` (fewer tokens, more steps).
        ema: decay of the moving average of the weights.
        threads: CPU threads.
        shares: how often each kind of picture is drawn; they add up to 1.
    """

    minutes: float = 60.0
    seed: int = 0
    batch_size: int = 256
    small_batch: int = 128
    size: int = 64
    small_size: int = 48
    small_until: float = 0.45
    lr_muon: float = 2e-3
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 60
    ema: float = 0.995
    threads: int = 2
    checkpoint_every_s: float = 120.0
    shares: Mapping[str, float] = dataclasses.field(default_factory=lambda: SHARES)

    def going_on(self) -> "TrainConfig":
        """Return the settings for weights that are already trained: half the learning rates, always full size."""
        return dataclasses.replace(
            self, lr_muon=self.lr_muon / 2, lr=self.lr / 2, small_size=self.size, small_until=0.6
        )


class PairTable:
    """All pairs as tensors, with a weight each for random draws.

    Attributes:
        images: RGBA, uint8, (pairs, 64, 64, 4).
        labels: the numbers of each pair's names and categories, padded with -1; int64, (pairs, most).
    """

    def __init__(self, pairs: list[Pair], rng: random.Random, shares: Mapping[str, float] = SHARES) -> None:
        self._pairs, self._rng, self._shares = pairs, rng, shares
        self.words = sorted({word for pair in pairs for word in (*pair.names, *pair.categories)})
        number = {word: index for index, word in enumerate(self.words)}
        self.label_number = number
        rows = [[number[word] for word in (*pair.names, *pair.categories)] for pair in pairs]
        most = max(map(len, rows))
        self.labels = torch.tensor([row + [-1] * (most - len(row)) for row in rows])
        self.images = torch.from_numpy(np.stack([pair.image for pair in pairs]))
        self.glyph = torch.tensor([pair.kind == "glyph" for pair in pairs])
        self.one_ink = torch.tensor([pair.kind in ("glyph", "outline") for pair in pairs])
        sided = [any(word in name for name in pair.names for word in SIDED) for pair in pairs]
        self.may_flip = ~(self.glyph | torch.tensor(sided))
        self._weights = self._sampling_weights()

    def _sampling_weights(self) -> torch.Tensor:
        """Weigh the pairs so that each kind has its share in the settings.

        Within a kind, the weight of a name with n pictures is proportional to sqrt(n).
        """
        keys = [(pair.kind, (pair.names or pair.categories)[0]) for pair in self._pairs]
        times = Counter(keys)
        weights = torch.tensor([times[key] ** -0.5 for key in keys])
        kinds = [pair.kind for pair in self._pairs]
        for kind in set(kinds):
            mask = torch.tensor([one == kind for one in kinds])
            weights[mask] *= self._shares[kind] / weights[mask].sum()
        return weights

    def draw(self, count: int, size: int, bare_rate: float) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        """Draw a batch.

        Returns:
            Normalised images, float32, (count, 3, size, size); the distinct captions; and whether a caption fits an
            image, which means that it describes one of the image's names or categories, bool, (count, captions).
        """
        chosen = torch.multinomial(self._weights, count, replacement=False)
        about: dict[str, int] = {}
        for index in chosen.tolist():
            pair = self._pairs[index]
            text, label = draw_caption(pair.names, pair.categories, pair.kind == "glyph", bare_rate, self._rng)
            about[text] = self.label_number[label]
        numbers = torch.tensor(list(about.values()))
        fits = (self.labels[chosen][:, :, None] == numbers).any(dim=1)
        flags = self.may_flip[chosen], self.one_ink[chosen], self.glyph[chosen]
        images = augment(self.images[chosen], *flags, size)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
        return (images - mean) / std, list(about), fits


def multi_positive_loss(logits: torch.Tensor, fits: torch.Tensor) -> torch.Tensor:
    """Return CLIP's symmetric cross-entropy for several positives: the target is uniform over them.

    Args:
        logits: scaled similarities, float32, (images, captions).
        fits: bool, (images, captions), with at least one True in every row and column.
    """
    targets = fits.float()
    by_image = -(targets / targets.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    by_text = -(targets / targets.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (by_image + by_text) / 2


def encode_images(visual: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return normalised image features for any image size that is a multiple of the patch size.

    The positional embedding is interpolated for sizes other than the model's own.
    """
    positions = visual.positional_embedding
    old, new = visual.grid_size[0], images.shape[-1] // visual.patch_size[0]
    if new != old:
        grid = positions[1:].T.reshape(1, -1, old, old)
        grid = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=False)
        positions = torch.cat([positions[:1], grid.flatten(2)[0].T])
    features = functional_call(visual, {"positional_embedding": positions}, (images,))
    return F.normalize(features, dim=-1)


def encode_captions(model: CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """Return normalised text features of tokens (captions, length), where length may be less than the context.

    They equal those of `encode_text` on padded rows, at less cost.
    """
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return F.normalize(x[torch.arange(len(x)), tokens.argmax(dim=1)] @ model.text_projection, dim=-1)


def optimizers(model: CLIP, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the blocks, and AdamW, with weight decay on matrices only, for the rest."""
    blocks, matrices, rest = [], [], []
    for name, parameter in model.named_parameters():
        if "resblocks" in name and parameter.ndim == 2:
            blocks.append(parameter)
        else:
            (matrices if parameter.ndim >= 2 else rest).append(parameter)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    return [Muon(blocks, lr=config.lr_muon, weight_decay=config.weight_decay), adamw]


class Training:
    """One run of pre-training, which resumes from its checkpoint if there is one.

    Args:
        model_cfg: open_clip's model configuration.
        folder: the folder of `checkpoint.pt`.
        start: weights to start from, with open_clip's names; None for random weights.
    """

    def __init__(
        self,
        pairs: list[Pair],
        model_cfg: dict,
        config: TrainConfig,
        folder: Path,
        start: dict[str, torch.Tensor] | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.folder = config, folder
        self.rng = random.Random(config.seed)
        self.table = PairTable(pairs, self.rng, config.shares)
        self.vocabulary = Vocabulary(self.table.words)
        text_cfg = {**model_cfg["text_cfg"], "vocab_size": len(self.vocabulary.token_ids)}
        if text_cfg["context_length"] != CONTEXT:
            raise ValueError(f"the captions are made for {CONTEXT} tokens, not {text_cfg['context_length']}")
        self.model = CLIP(model_cfg["embed_dim"], model_cfg["vision_cfg"], text_cfg)
        self._start_tokens = None if start is None else start["token_embedding.weight"].float()
        if start is not None:
            rows = start["token_embedding.weight"][self.vocabulary.token_ids]
            self.model.load_state_dict({**start, "token_embedding.weight": rows})
        self.ema = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.optimizers = optimizers(self.model, config)
        self.base_lr = [[group["lr"] for group in one.param_groups] for one in self.optimizers]
        self.steps, self.elapsed_s = 0, 0.0
        if (folder / "checkpoint.pt").exists():
            self._resume()

    def step(self, progress: float) -> float:
        """Make one update and return the loss; `progress` (0 to 1) sets batch size, image size and learning rate."""
        config = self.config
        early = progress < config.small_until
        count, size = (config.small_batch, config.small_size) if early else (config.batch_size, config.size)
        images, captions, fits = self.table.draw(min(count, len(self.table.images)), size, 0.7 - 0.5 * progress)
        features = encode_images(self.model.visual, images)
        texts = encode_captions(self.model, self.vocabulary.batch(captions))
        loss = multi_positive_loss(self.model.logit_scale.exp() * features @ texts.T, fits)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = min(1.0, (self.steps + 1) / config.warmup_steps)
        factor *= 0.01 + 0.99 * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        for optimizer, rates in zip(self.optimizers, self.base_lr, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(100))
            keep = min(config.ema, (1 + self.steps) / (10 + self.steps))
            for name, value in self.model.state_dict().items():
                self.ema[name].lerp_(value, 1 - keep)
        self.steps += 1
        return loss.item()

    def run(self) -> None:
        """Train for the configured time, and save checkpoints on the way and at the end."""
        torch.set_num_threads(self.config.threads)
        saved = start = time.monotonic()
        before, total = self.elapsed_s, self.config.minutes * 60
        mean_loss = None
        while self.elapsed_s < total:
            loss = self.step(self.elapsed_s / total)
            mean_loss = loss if mean_loss is None else 0.98 * mean_loss + 0.02 * loss
            now = time.monotonic()
            self.elapsed_s = before + now - start
            if self.steps % 50 == 0:
                log.info("step %d, %.1f minutes, loss %.3f", self.steps, self.elapsed_s / 60, mean_loss)
            if now - saved > self.config.checkpoint_every_s:
                self.save()
                saved = now
        self.save()

    def save(self) -> None:
        """Write the checkpoint, which replaces the old one atomically, and the averaged weights beside it."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizers": [one.state_dict() for one in self.optimizers],
            "steps": self.steps,
            "elapsed_s": self.elapsed_s,
            "torch_rng": torch.get_rng_state(),
            "python_rng": json.dumps(self.rng.getstate()),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.folder / "checkpoint.new")
        (self.folder / "checkpoint.new").replace(self.folder / "checkpoint.pt")
        save_file(self.weights(), self.folder / "mini.safetensors")

    def _resume(self) -> None:
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema = state["ema"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps, self.elapsed_s = state["steps"], state["elapsed_s"]
        torch.set_rng_state(state["torch_rng"])
        version, numbers, rest = json.loads(state["python_rng"])
        self.rng.setstate((version, tuple(numbers), rest))

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the averaged weights with open_clip's names, in float16, with the full token embedding.

        Tokens that no caption uses keep their row from the weights that this run started from. Without such weights,
        their rows are random around the mean of the used rows, so that they differ from each other.
        """
        weights = {name: value.half().contiguous() for name, value in self.ema.items()}
        used = self.ema["token_embedding.weight"]
        if self._start_tokens is None:
            noise = torch.randn(VOCABULARY, used.shape[1], generator=torch.Generator().manual_seed(0))
            full = used.mean(dim=0) + 0.02 * noise
        else:
            full = self._start_tokens.clone()
        full[self.vocabulary.token_ids] = used
        weights["token_embedding.weight"] = full.half()
        return weights
