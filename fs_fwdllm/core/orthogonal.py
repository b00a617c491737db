"""Orthogonal directions that all clients have in common, in turn.

Slopes that cost a forward pass each are best measured along independent directions: what one client misses another
sees. Slopes that cost nothing (:mod:`fs_fwdllm.estimator.exact`) may as well all be along the same ``P`` directions.
Then the server averages scalars, ``P`` numbers describe the round's step however many clients took part, and rounds
take the rows of one orthogonal matrix in turn, so that a cycle of rounds looks everywhere once.

The rows are those of a Hadamard matrix of order ``N``, the least power of two not below the part's dimension ``d``, cut
to ``d`` columns; columns have random signs and the rows of a cycle a random order, both keyed by the run's seed:

    ``z_j[i] = flip[i] * (-1)^popcount(row_j AND i)``

Integers alone, hence the same bits everywhere. All ``N`` cut rows together satisfy ``sum_j z_j z_j^T = N I`` for any
``d`` (a tight frame), so that the estimate ``1/P sum_j <G, z_j> z_j`` needs no other scale than that of independent
directions: over one cycle at a fixed point its mean is ``G`` exactly. The relative variance of ``P`` rows of a cycle is

    ``(d/P - 1) + (P - 1)/P (N - d)/(N - 1)``

which is ``d/P - 1`` where ``d`` is a power of two, against ``(d - 1)/P`` of independent signs, and never above that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fs_fwdllm.core.arrays import NUMPY, Array, Arrays, count_of
from fs_fwdllm.core.direction import DirectionKey, Distribution, Rademacher
from fs_fwdllm.core.division import Division
from fs_fwdllm.core.seeding import seeded_permutation

__all__ = ["OrthogonalRows", "order_of"]

#: The direction whose signs are the columns' flips; outside what a hash of rounds and clients is likely to give.
_FLIPS = (1 << 64) - 1


def order_of(dimensions: int) -> int:
    """Rows of the matrix for so many dimensions: the least power of two that is not below."""
    return 1 << max(0, dimensions - 1).bit_length()


class OrthogonalRows(Distribution):
    """Rows of a signed Hadamard matrix for each part; a direction's seed counts the part's rows through all cycles.

    Args:
        tensors: the trainables, for their sizes.
        division: which part each belongs to.
    """

    name = "orthogonal"
    portable = True

    def __init__(self, tensors: Sequence[Array], division: Division) -> None:
        self._owners = division.owners
        self._orders = [order_of(dimensions) for dimensions in division.dimensions(tensors)]
        self._offsets = _offsets(tensors, division)
        self._flips = Rademacher()
        self._cycle: dict[tuple[int, int, int], np.ndarray] = {}

    def values(
        self, keys: Sequence[DirectionKey], tensor_id: int, start: int, count: int, arrays: Arrays = NUMPY
    ) -> Array:
        part = self._owners[tensor_id]
        first = self._offsets[tensor_id] + start
        columns = np.arange(first, first + count, dtype=np.uint64)
        rows = np.array([self._row(key, part) for key in keys], dtype=np.uint64)
        signs = _signs_of_parity(rows[:, None] & columns)
        signs *= self._flips.values([DirectionKey(keys[0].run_seed, _FLIPS)], tensor_id, start, count)
        return arrays.place(signs)

    def spread(self, dimensions: int) -> float:
        return dimensions - 1.0

    def relative_variance(self, dimensions: int, count: int) -> float:
        order = order_of(dimensions)
        seen = min(count, order)
        cut = (seen - 1) / seen * (order - dimensions) / (order - 1) if order > 1 else 0.0
        return dimensions / seen - 1.0 + cut

    def _row(self, key: DirectionKey, part: int) -> int:
        """The row that a count stands for: rows of a cycle come in an order of their own."""
        cycle, position = divmod(key.seed, self._orders[part])
        place = (key.run_seed, part, cycle)
        if place not in self._cycle:
            if len(self._cycle) > 8:
                self._cycle.clear()
            self._cycle[place] = seeded_permutation(self._orders[part], "orthogonal rows", key.run_seed, part, cycle)
        return int(self._cycle[place][position])


def _offsets(tensors: Sequence[Array], division: Division) -> list[int]:
    """Where in its part each tensor begins."""
    ends, offsets = [0] * division.parts, []
    for owner, tensor in zip(division.owners, tensors, strict=True):
        offsets.append(ends[owner])
        ends[owner] += count_of(tensor)
    return offsets


def _signs_of_parity(bits: np.ndarray) -> np.ndarray:
    """``(-1)^popcount`` of unsigned integers, int8."""
    for shift in (32, 16, 8, 4, 2, 1):
        bits = bits ^ (bits >> np.uint64(shift))
    return np.int8(1) - np.int8(2) * (bits & np.uint64(1)).astype(np.int8)
