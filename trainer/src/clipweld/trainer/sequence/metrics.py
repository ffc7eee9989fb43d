"""What an accuracy matrix says of transfer and forgetting, in percent."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean


def transfer(matrix: Sequence[Sequence[float]]) -> float | None:
    """Accuracy on tasks before they are learned: for each j > 1 the mean over i < j, then the mean over j.

    Args:
        matrix: ``matrix[i][j]`` is task j's accuracy after learning task i, square.
    """
    if len(matrix) < 2:
        return None
    return round(mean(mean(matrix[i][j] for i in range(j)) for j in range(1, len(matrix))), 2)


def average(matrix: Sequence[Sequence[float]]) -> float:
    """Mean over all tasks of the mean over all stages."""
    return round(mean(mean(row) for row in matrix), 2)


def last(matrix: Sequence[Sequence[float]]) -> float:
    """Mean of the last row."""
    return round(mean(matrix[-1]), 2)


def forgetting(matrix: Sequence[Sequence[float]]) -> float | None:
    """Mean over all tasks but the last of the best accuracy since it was learned, minus the accuracy at the end."""
    if len(matrix) < 2:
        return None
    end = len(matrix) - 1
    return round(mean(max(matrix[i][j] for i in range(j, end + 1)) - matrix[end][j] for j in range(end)), 2)
