"""The labels that these tests ask about, and the check of an answer against known scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipweld.client import Classification

TOLERANCE = 1e-4  # of a score
FEW = (
    "a shoe",
    "a bag",
    "the number seven",
    "the letter A",
    "a flag",
    "a smile",
    "a cat",
    "a tree",
    "a car",
    "nothing",
)
LABELS = (*FEW, *(f"thing number {number}" for number in range(190)))


@dataclass(frozen=True)
class Known:
    """The correct answers of one version.

    Attributes:
        scores: float32 (pictures, len(LABELS)).
    """

    scores: np.ndarray

    def agrees(self, picture: int, labels: Sequence[str], answer: Classification) -> bool:
        """Return whether an answer for a picture has exactly these labels with the correct scores, best first."""
        got = [found.score for found in answer]
        expected = [self.scores[picture, LABELS.index(found.label)] for found in answer if found.label in LABELS]
        return (
            sorted(found.label for found in answer) == sorted(labels)
            and bool(np.abs(np.subtract(got, expected)).max() <= TOLERANCE)
            and got == sorted(got, reverse=True)
        )
