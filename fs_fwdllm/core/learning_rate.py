"""Learning rates over the rounds: constant, linear and cosine decay, each with an optional linear warm-up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["Schedule", "decay_factor"]


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a round.

    Attributes:
        base: the highest learning rate.
        shape: ``constant``; ``linear`` falls to zero after the last round; ``cosine`` likewise along half a wave.
        rounds: total number of rounds.
        warmup_ratio: share of the rounds over which the rate rises linearly to ``base``.
    """

    base: float
    shape: Literal["constant", "linear", "cosine"]
    rounds: int
    warmup_ratio: float = 0.0

    def __call__(self, round_index: int) -> float:
        """Learning rate of ``round_index`` (counted from 0)."""
        warmup_rounds = math.ceil(self.rounds * self.warmup_ratio)
        if round_index < warmup_rounds:
            return self.base * ((round_index + 1) / warmup_rounds)
        progress = (round_index - warmup_rounds) / max(1, self.rounds - warmup_rounds)
        if self.shape == "linear":
            return self.base * (1.0 - progress)
        if self.shape == "cosine":
            return self.base * 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.base


def decay_factor(learning_rate: float, weight_decay: float) -> float:
    """``1 - lr * weight_decay``: what decoupled weight decay leaves of a parameter in one step."""
    return 1.0 - learning_rate * weight_decay
