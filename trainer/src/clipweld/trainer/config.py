"""The training settings: the single source of flags, defaults, help, and the record kept in an adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

from clipweld.trainer.errors import ConfigError

Value = TypeVar("Value")


@dataclass(frozen=True)
class PoolConfig:
    """The settings of an expert pool. Defaults are the published ones (arXiv 2601.22828)."""

    rank: int = 12
    """Number of rank-1 experts per layer."""
    k_active: int = 8
    """Number of experts per layer that serve a batch."""
    k_merge: int = 4
    """Number of experts per layer that a task keeps and merges."""
    alpha: float = 1.0
    """An expert is scaled by alpha / rank."""
    dropout: float = 0.2
    """Dropout on a pool's input."""
    router: Literal["learned", "fixed", "none"] = "learned"
    """How experts are chosen: by a trained router, by a router with fixed random weights, or always the first ones."""
    router_per: Literal["layer", "block"] = "layer"
    """One router per layer, or one shared by the layers of a block."""
    route_on: Literal["cls", "first"] = "cls"
    """Token that a text is routed on: EOT, from which CLIP reads its features (cls), or token 0 (first). An image is
    always routed on [CLS]."""

    def __post_init__(self) -> None:
        _raise_faults(self._faults())

    def _faults(self) -> list[str]:
        faults = []
        if not 1 <= self.k_active <= self.rank:
            faults.append(f"k_active {self.k_active} must lie between 1 and rank {self.rank}")
        if not 1 <= self.k_merge <= self.k_active:
            faults.append(f"k_merge {self.k_merge} must lie between 1 and k_active {self.k_active}")
        if not 0 < self.alpha < math.inf:
            faults.append(f"alpha {self.alpha} must be a number above 0")
        if not 0 <= self.dropout < 1:
            faults.append(f"dropout {self.dropout} must lie in [0, 1)")
        return faults


@dataclass(frozen=True)
class TrainConfig(PoolConfig):
    """The settings for learning a task. Defaults are the published ones; ``PRESETS`` has those of single models."""

    shots: int | None = None
    """Training images per class, drawn by the seed; 0 takes all. Default: all of a folder's; 5 of a benchmark task's
    (mini: 16)."""
    iterations: int | None = None
    """Optimiser steps. Default: 500 (mini: 300); for many images enough to see each 4 times, at most 5,000."""
    batch_size: int = 32
    """Images per step."""
    balance: bool = False
    """Draw all classes equally often, however many images each has."""
    random_crop: bool = False
    """Crop training images at random, to at least four fifths."""
    random_flip: bool = False
    """Flip training images left and right at random: not for letters, arrows and the like."""
    color_jitter: bool = False
    """Change brightness, contrast, saturation and hue of training images at random."""
    lr: float = 2e-3
    """AdamW's learning rate at the start, which falls to 1e-6 along a cosine."""
    consolidate: float = 0.0
    """Fraction of the steps, at the end, that train only the experts to be merged."""
    weight_decay: float = 1e-2
    """AdamW's weight decay."""
    ago: Literal["sum", "mean", "off"] = "sum"
    """How the orthogonality loss combines overlaps with earlier tasks' experts within a layer; off: no such loss."""
    ago_weight: float = 0.1
    """Weight of the orthogonality loss."""
    drift_weight: float = 0.0
    """Weight of the loss on changes of the layers' outputs for the inputs of earlier tasks."""
    drift_directions: int = 16
    """Number of input directions per layer that an adapter stores for the drift loss of later tasks."""
    anchor_weight: float = 0.0
    """Weight of the loss that preserves the features of common words, and the similarities of the images to them."""
    coefficients: Literal["full", "chosen"] = "full"
    """How much of the update is merged into each tower: all of it, or the least that a fifth of the training images
    don't speak against, after learning without them first. Takes twice the time."""
    seed: int = 42
    """Seed for shots, batches, prompts, dropout and the initial pools."""

    def _faults(self) -> list[str]:
        positive = {name: getattr(self, name) for name in ("iterations", "batch_size", "lr", "drift_directions")}
        faults = [
            f"{name} {value} must be a number above 0"
            for name, value in positive.items()
            if value is not None and not 0 < value < math.inf
        ]
        not_negative = {
            name: getattr(self, name)
            for name in ("shots", "weight_decay", "ago_weight", "drift_weight", "anchor_weight", "seed")
        }
        faults += [
            f"{name} {value} must be a number from 0 on"
            for name, value in not_negative.items()
            if value is not None and not 0 <= value < math.inf
        ]
        if not 0 <= self.consolidate < 1:
            faults.append(f"consolidate {self.consolidate} must lie in [0, 1)")
        return super()._faults() + faults


Method = Literal["pool", "lora", "finetune", "joint"]
METHODS = get_args(Method)
# Which class names compete for an image: those of its own task, or those of all tested tasks.
LabelSpace = Literal["task", "union"]
LABEL_SPACES = get_args(LabelSpace)
# Accuracy over a task's images in each label space, and the mean of its classes' accuracies.
Measured = Literal["task", "union", "task_classes", "union_classes"]
MEASURED = get_args(Measured)
# The measures of a sequence of tasks (clipweld.trainer.sequence.metrics).
MEASURES = ("transfer", "average", "last", "forgetting")

# Training images per class of a benchmark task, and the fewest steps, by model.
FEW_SHOTS = {"": 5, "mini": 16}
FEWEST_STEPS = {"": 500, "mini": 300}
# Steps for many images: enough to see each so often, up to a bound.
EPOCHS = 4
MOST_STEPS = 5000

# What the paper trained with, where it differs from TrainConfig's defaults: its router got no gradient, and texts were
# routed on token 0.
PUBLISHED = {"shots": 5, "iterations": 500, "router": "fixed", "route_on": "first"}
# What the pool has beyond the paper's, for every model: two losses against forgetting, which are relative (to a layer's
# output, to CLIP's scale of logits) so that one weight serves all models; and the second half of the training for the
# experts that will be merged.
POOL = {"drift_weight": 1600.0, "anchor_weight": 4.0, "consolidate": 0.5}
# Differences from TrainConfig's defaults: for every method, and for models that need other settings.
ALL_WEIGHTS = {"lr": 1e-5}
MINI = {"dropout": 0.0}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "": {"pool": POOL, "finetune": ALL_WEIGHTS, "joint": ALL_WEIGHTS},
    "mini": {
        "pool": {**MINI, **POOL, "lr": 1e-2},
        "lora": {**MINI, "lr": 2.5e-4},
        "finetune": {**MINI, "lr": 1e-4},
        "joint": {**MINI, "lr": 3e-4},
    },
}


def train_config(model_name: str, method: str = "pool", *, published: bool = False, **chosen: Any) -> TrainConfig:
    """Return the preset of a model and a method, overridden by the chosen settings that are not None.

    Args:
        published: take the paper's own settings in place of the preset.

    Raises:
        ConfigError: settings are not valid; the message names every fault.
    """
    if published and method != "pool":
        raise ConfigError(f"--published: the paper's settings are the pool's, expected --method pool, not {method}")
    preset = PUBLISHED if published else _of_model(PRESETS, model_name).get(method, {})
    config = replace(TrainConfig(**preset), **{name: value for name, value in chosen.items() if value is not None})
    return of_method(config, method)


def of_method(config: TrainConfig, method: str) -> TrainConfig:
    """Return the settings that a method can use.

    In ``lora`` all experts serve and are kept. ``finetune`` and ``joint`` have no experts, and no losses on them.
    """
    if method == "pool":
        return config
    one_lora = replace(config, router="none", k_active=config.rank, k_merge=config.rank, consolidate=0.0, ago="off")
    return one_lora if method == "lora" else replace(one_lora, drift_weight=0.0, anchor_weight=0.0)


def with_steps(config: TrainConfig, model_name: str, images: int, devices: int = 1) -> TrainConfig:
    """Return the settings with a number of steps, chosen from the number of training images where none is given."""
    if config.iterations is not None:
        return config
    epochs = math.ceil(EPOCHS * images / (config.batch_size * devices))
    return replace(config, iterations=min(max(_of_model(FEWEST_STEPS, model_name), epochs), MOST_STEPS))


def shots_of(config: TrainConfig, model_name: str, *, is_folder: bool) -> int:
    """Return the number of training images per class, 0 for all."""
    if config.shots is not None:
        return config.shots
    return 0 if is_folder else _of_model(FEW_SHOTS, model_name)


def on_benchmark(settings: Mapping[str, Any], model_name: str) -> dict[str, Any]:
    """Return recorded settings with the values that None stands for on a benchmark's few-shot tasks."""
    defaults = {"shots": _of_model(FEW_SHOTS, model_name), "iterations": _of_model(FEWEST_STEPS, model_name)}
    return {name: defaults.get(name) if value is None else value for name, value in settings.items()}


def _of_model(values: Mapping[str, Value], model_name: str) -> Value:
    return values.get(model_name, values[""])


def _raise_faults(faults: list[str]) -> None:
    if faults:
        raise ConfigError("; ".join(faults))
