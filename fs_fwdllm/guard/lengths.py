"""How long an update may be: no longer than is usual.

One client of twenty that sends ``1e3`` times what it measured owns the mean, whatever the others say. Nothing about a
single number tells that it is wrong, but its length beside the others' does. So every update is shortened to the
*median* length of the round::

    u_c  <-  u_c min(1, clip m / |u_c|),      m = median_c |u_c|

Fewer than half of the clients cannot move the median beyond an honest length, wherever they put their own; and since a
mean of vectors of about one length is as near to what they have in common as one that a few large mini-batch gradients
dominate, it costs little where nobody attacks: 0.6 points at most in what was tried. (Bounds on norms are in Sun et
al., arXiv 1911.07963, and in Karimireddy et al., ICML 2021; what the median of the round does was measured here,
``benchmarks/attacks.py``.) A length needs no common directions: it is the client's own numbers that are looked at.

Lengths are root mean squares, so that clients that send different numbers of slopes can be compared, and they are taken
part by part, so that nobody can hide a large head behind a small adapter. Of an even number of lengths the smaller one
of the two in the middle is the median.

Where fewer than three answer (a block has one visitor), there is no such company. Then a length is held against the
median of the last ones that were believed. What was shortened is remembered at its shortened length, so that nobody can
raise the bound step by step. (Three times that median, as leeway for blocks that differ, was tried: four liars of
twenty that turned their visits round cost 48 points on AG News.)
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["LengthGuard", "root_mean_square", "scaled"]

#: Answers of one round that are company enough to say what is usual.
_COMPANY = 3
#: Lengths that are remembered for rounds without company.
_REMEMBERED = 16
#: Numbers that are looked at at a time: bounds the float64 copy of a dense update.
_BLOCK = 1 << 20


class LengthGuard:
    """Says by how much each update of a round is shortened.

    Args:
        clip: how many times the median length an update may be long; ``None`` shortens nothing.
    """

    def __init__(self, clip: float | None) -> None:
        self._clip = clip
        self._remembered: list[deque[float]] = []

    @property
    def is_on(self) -> bool:
        return self._clip is not None

    def factors(
        self, lengths: Mapping[int, Sequence[float]], most: Sequence[float] = ()
    ) -> dict[int, tuple[float, ...]]:
        """What each client's update is to be multiplied with, part by part; at most one.

        Args:
            lengths: ``{client: length of every part}``, root mean squares; zero where a client sends nothing of a part.
            most: per part, what a length can be in any case, where that is known; it bounds where no other is there to
                compare with.
        """
        found: dict[int, list[float]] = {client: [] for client in lengths}
        for part in range(max(map(len, lengths.values()), default=0)):
            own = {client: parts[part] for client, parts in lengths.items()}
            bound = self._bound(part, [length for length in own.values() if length], most[part] if most else np.inf)
            for client, length in own.items():
                factor = 1.0 if length <= bound else bound / length
                found[client].append(factor)
                if length:
                    self._of(part).append(length * factor)
        return {client: tuple(parts) for client, parts in found.items()}

    def _bound(self, part: int, lengths: Sequence[float], most: float) -> float:
        if self._clip is None or not lengths:
            return np.inf
        if len(lengths) >= _COMPANY:
            return self._clip * statistics.median_low(lengths)
        before = self._of(part)
        if len(before) < _COMPANY:
            return most
        return min(most, self._clip * statistics.median_low(before))

    def _of(self, part: int) -> deque[float]:
        while len(self._remembered) <= part:
            self._remembered.append(deque(maxlen=_REMEMBERED))
        return self._remembered[part]

    def state(self) -> list[list[float]]:
        """What a resumed server needs, as JSON values."""
        return [list(part) for part in self._remembered]

    def load_state(self, state: Sequence[Sequence[float]]) -> None:
        """Inverse of :meth:`state`."""
        self._remembered = [deque(part, maxlen=_REMEMBERED) for part in state]


def root_mean_square(*arrays: np.ndarray) -> float:
    """Of all their float32 numbers, zero of none. Rounded to float32, which is coarser than what the order of the
    summation on another machine can change."""
    total, count = 0.0, 0
    for array in arrays:
        flat = array.reshape(-1)
        count += len(flat)
        for start in range(0, len(flat), _BLOCK):
            total += float(np.square(flat[start : start + _BLOCK], dtype=np.float64).sum())
    return float(np.float32(np.sqrt(total / count))) if count else 0.0


def scaled(values: np.ndarray, factor: float) -> np.ndarray:
    """Float32 numbers times ``factor``, each rounded once; themselves where that is one."""
    if factor == 1.0:
        return values
    made = np.empty_like(values)
    flat, target = values.reshape(-1), made.reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        target[start : start + _BLOCK] = flat[start : start + _BLOCK].astype(np.float64) * factor
    return made
