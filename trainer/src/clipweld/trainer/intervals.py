"""Intervals that say how far chance reaches: for one accuracy, and for the mean of several runs."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from statistics import mean, quantiles

Z95 = 1.959964  # 97.5% quantile of the standard normal distribution
DRAWS = 10_000


def wilson(percent: float, images: int) -> tuple[float, float]:
    """Return the 95% interval of Wilson's score (1927) for an accuracy over so many images, in percent."""
    share, spread = percent / 100, Z95**2 / images
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / images + spread / (4 * images)) / (1 + spread)
    return max(0.0, 100 * (middle - half)), min(100.0, 100 * (middle + half))


def intervals(accuracies: Mapping[str, float], images: Mapping[str, int]) -> dict[str, list[float]]:
    """Return Wilson's interval by task, rounded to hundredths, for accuracies over so many images each."""
    return {name: [round(bound, 2) for bound in wilson(percent, images[name])] for name, percent in accuracies.items()}


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% percentile interval of the mean over runs, resampled with replacement.

    All samples are taken where there are no more than ``DRAWS``, else as many are drawn. The interval of few runs is
    too narrow: that of three runs lies between their lowest and their highest value.
    """
    n = len(values)
    if n**n <= DRAWS:
        means = [mean(sample) for sample in itertools.product(values, repeat=n)]
    else:
        draw = random.Random(0)
        means = [mean(draw.choices(values, k=n)) for _ in range(DRAWS)]
    if len(means) == 1:
        return means[0], means[0]
    cuts = quantiles(means, n=40, method="inclusive")
    return cuts[0], cuts[-1]
