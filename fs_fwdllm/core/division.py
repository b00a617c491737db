"""How the trainables are divided into parts, each of which is looked at along directions of its own.

A *part* is a set of whole tensors. A direction belongs to one part and is zero outside it, so a part's slopes say
nothing of other parts and its replay never touches their bytes. That is what lets a classifier's slopes come from a
closed form by the hundred while an adapter below it is probed two dozen times: the error of an estimate grows with the
dimensions that one direction covers.

Directions of a step are numbered through all parts: part 0 has the first ones, part 1 the next, and so on. The seed of
a direction follows from that number as ever, so trainables in one part have the directions that they always had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fs_fwdllm.core.arrays import Array, count_of

__all__ = ["Division"]


@dataclass(frozen=True)
class Division:
    """Which part each tensor belongs to.

    Attributes:
        owners: per tensor id, the number of its part.
        rates: per part, what the learning rate is multiplied with.
    """

    owners: tuple[int, ...]
    rates: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if any(not 0 <= owner < len(self.rates) for owner in self.owners):
            raise ValueError(f"owners {self.owners} name a part outside the {len(self.rates)} there are")

    @classmethod
    def whole(cls, tensors: int) -> Division:
        """All of so many tensors as one part."""
        return cls((0,) * tensors)

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return len(self.rates)

    def tensor_ids(self, part: int) -> frozenset[int]:
        """The ids of a part's tensors."""
        return frozenset(index for index, owner in enumerate(self.owners) if owner == part)

    def dimensions(self, tensors: Sequence[Array]) -> list[int]:
        """Parameters of each part."""
        sizes = [0] * self.parts
        for owner, tensor in zip(self.owners, tensors, strict=True):
            sizes[owner] += count_of(tensor)
        return sizes
