"""What adapters record about their experts: which ones each task used, and how much the tasks overlap."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipweld.trainer.adapters.adapter import Adapter

LAYER = re.compile(r"(?P<image>visual\.)?transformer\.resblocks\.(?P<block>\d+)\.(?:attn|mlp)\.(?P<name>\w+)")
IN_BLOCK = ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj")


@dataclass(frozen=True)
class Votes:
    """Which experts each task used.

    Attributes:
        layers: (tower, block) of every layer, "image" before "text", in the order the layers are called.
        shares: by task (layers, rank): each expert's share of its layer's votes; NaN if a layer had none.
        k_merge: number of experts per layer that were kept.
    """

    layers: list[tuple[str, int]]
    shares: dict[str, np.ndarray]
    k_merge: int

    def kept_share(self, task: str) -> float:
        """Return what share of the votes the ``k_merge`` experts with the most votes got, mean over layers."""
        return float(np.nanmean(np.sort(self.shares[task], axis=1)[:, -self.k_merge :].sum(axis=1)))

    @property
    def rank(self) -> int:
        return next(iter(self.shares.values())).shape[1]


def votes(adapters: Sequence[Adapter]) -> Votes | None:
    """Collect the votes of a run's adapters; None if there are none."""
    adapters = [adapter for adapter in adapters if any(map(any, adapter.activation_counts.values()))]
    if not adapters:
        return None
    paths = sorted(adapters[0].activation_counts, key=_place)
    shares = {}
    for adapter in adapters:
        counts = np.array([adapter.activation_counts[path] for path in paths], dtype=np.float64)
        total = counts.sum(axis=1, keepdims=True)
        shares[adapter.task] = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    k_merge = adapters[0].experts(adapters[0].modules()[0])[0].shape[0]
    return Votes([_tower_and_block(path) for path in paths], shares, k_merge)


@dataclass(frozen=True)
class Overlap:
    """How much the merged columns of B of two tasks point in the same direction, mean over layers.

    Attributes:
        cosine: (tasks, tasks): mean of |cos(b, b')| over all pairs of columns; on the diagonal over pairs of different
            columns of one task, NaN if there is only one column.
        product: (tasks, tasks): mean of |b^T b'| over the same pairs, which the AGO loss penalises.
        chance: expected ``cosine`` of random directions of the same widths.
    """

    tasks: list[str]
    cosine: np.ndarray
    product: np.ndarray
    chance: float

    @property
    def mean_cosine(self) -> float:
        """Mean of ``cosine`` over all pairs of different tasks."""
        return float(self.cosine[np.tril_indices(len(self.tasks), -1)].mean())

    @property
    def mean_product(self) -> float:
        """Mean of ``product`` over all pairs of different tasks."""
        return float(self.product[np.tril_indices(len(self.tasks), -1)].mean())


def overlap(adapters: Sequence[Adapter]) -> Overlap | None:
    """Return the overlap between a run's tasks; None for fewer than two. ``cosine`` leaves out columns of zeros."""
    modules = sorted(set.intersection(*(set(adapter.modules()) for adapter in adapters))) if adapters else []
    if len(adapters) < 2 or not modules:
        return None
    cosines, products, chances = [], [], []
    for module in modules:
        columns = [adapter.experts(module)[1].double().numpy() for adapter in adapters]
        owner = np.repeat(np.eye(len(adapters)), [some.shape[1] for some in columns], axis=1)
        stacked = np.concatenate(columns, axis=1)
        product = np.abs(stacked.T @ stacked)
        lengths = np.linalg.norm(stacked, axis=0)
        pairs = 1.0 - np.eye(len(lengths))
        directed = pairs * np.outer(lengths > 0, lengths > 0)
        cosine = product / np.where(directed > 0, np.outer(lengths, lengths), 1.0)
        cosines.append(_block_means(cosine, directed, owner))
        products.append(_block_means(product, pairs, owner))
        chances.append(chance_cosine(stacked.shape[0]))
    return Overlap([a.task for a in adapters], _mean(cosines), _mean(products), float(np.mean(chances)))


def chance_cosine(width: int) -> float:
    """Return the expected |cos| of two random directions in w dimensions: Gamma(w/2) / (sqrt(pi) Gamma((w+1)/2))."""
    return math.exp(math.lgamma(width / 2) - math.lgamma((width + 1) / 2)) / math.sqrt(math.pi)


def _block_means(values: np.ndarray, counted: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Return the mean over the counted pairs of columns for each pair of tasks; NaN if none are counted."""
    total, number = (owner @ some @ owner.T for some in (values * counted, counted))
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)


def _mean(matrices: list[np.ndarray]) -> np.ndarray:
    """Return the mean over layers, ignoring NaN."""
    stacked = np.stack(matrices)
    there = ~np.isnan(stacked)
    number = there.sum(axis=0)
    total = np.where(there, stacked, 0.0).sum(axis=0)
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)


def _tower_and_block(path: str) -> tuple[str, int]:
    found = LAYER.fullmatch(path)
    return ("image" if found["image"] else "text", int(found["block"])) if found else ("other", 0)


def _place(path: str) -> tuple:
    """Return a key that sorts the image tower before the text tower, and layers in the order they are called."""
    found = LAYER.fullmatch(path)
    if not found:
        return (2, 0, 0, path)
    at = IN_BLOCK.index(found["name"]) if found["name"] in IN_BLOCK else len(IN_BLOCK)
    return (0 if found["image"] else 1, int(found["block"]), at, path)
