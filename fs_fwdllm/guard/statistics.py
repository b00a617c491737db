"""What a set of clients that looked along the same directions says, where some of them may lie.

Along common directions each client sends an estimate of the same ``K`` numbers, so that there is something to vote on,
number by number or client by client:

* *mean*: every client's numbers count.
* *trimmed*: number by number, the mean without the largest and the smallest share (Yin et al., ICML 2018).
* *median*: number by number (same source).
* *krum*: the mean of the ``n - f`` clients whose numbers are nearest to their ``n - f - 2`` nearest neighbours'
  (multi-Krum, Blanchard et al., NeurIPS 2017); ``f`` is the share of clients that are expected to lie.

All of them but the mean give every client one voice, and cost accuracy where nobody lies: they throw away honest
numbers.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

__all__ = ["Statistic", "outvoted_by_distance", "vote"]

Statistic = Literal["mean", "trimmed", "median", "krum"]


def vote(kind: Statistic, values: np.ndarray, liars: float) -> tuple[np.ndarray, list[int]]:
    """What clients say together.

    Args:
        values: float32 ``[clients, numbers]``, at least one client.
        liars: share of the clients that are expected to lie.

    Returns:
        Float32 ``[numbers]``, and the rows that were left out as a whole.
    """
    count = len(values)
    wide = values.astype(np.float64)
    if kind == "median":
        return np.median(wide, axis=0).astype(np.float32), []
    if kind == "trimmed":
        cut = min(math.floor(liars * count), (count - 1) // 2)
        return np.sort(wide, axis=0)[cut : count - cut].mean(axis=0).astype(np.float32), []
    left_out = outvoted_by_distance(wide, min(math.floor(liars * count), count - 1)) if kind == "krum" else []
    kept = [row for row in range(count) if row not in left_out]
    return wide[kept].mean(axis=0).astype(np.float32), left_out


def outvoted_by_distance(values: np.ndarray, liars: int) -> list[int]:
    """The ``liars`` rows that are farthest from their neighbours, in order."""
    count = len(values)
    # The largest float32 has a square in float64; a sum of as many as there are numbers does, too.
    distances = np.array([np.square(values - row).sum(axis=1) for row in values])
    neighbours = max(1, count - liars - 2)
    near = np.sort(distances, axis=1)[:, 1 : 1 + neighbours]  # without the row itself
    order = np.argsort(near.sum(axis=1), kind="stable")
    return sorted(int(row) for row in order[count - liars :])
