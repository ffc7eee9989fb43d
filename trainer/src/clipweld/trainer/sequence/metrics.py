"""The measures of an accuracy matrix, in percent: Transfer, Average, Last and Forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean


def transfer(matrix: Sequence[Sequence[float]]) -> float | None:
    """Return the accuracy on tasks before they are learned: for each j > 1 the mean over i < j, then the mean over j.

    Args:
        matrix: square; ``matrix[i][j]`` is the accuracy on task j after learning task i.
    """
    if len(matrix) < 2:
        return None
    return round(mean(mean(matrix[i][j] for i in range(j)) for j in range(1, len(matrix))), 2)


def average(matrix: Sequence[Sequence[float]]) -> float:
    """Return the mean over all tasks and all stages."""
    return round(mean(mean(row) for row in matrix), 2)


def last(matrix: Sequence[Sequence[float]]) -> float:
    """Return the mean of the last row."""
    return round(mean(matrix[-1]), 2)


def forgetting(matrix: Sequence[Sequence[float]]) -> float | None:
    """Return by how much accuracy fell from its best since a task was learned: the mean over all tasks but the last."""
    if len(matrix) < 2:
        return None
    end = len(matrix) - 1
    return round(mean(max(matrix[i][j] for i in range(j, end + 1)) - matrix[end][j] for j in range(end)), 2)
