"""How a matrix in one of llama.cpp's forms becomes numbers again.

Every row is cut into blocks, and a block keeps its own scale beside its numbers, in bytes that follow one another. The
older forms have blocks of 32 numbers ``q`` with a scale in half precision, and an offset where the name ends with 1::

    _0:  number = d * (q - middle)          _1:  number = d * q + m

The K forms have blocks of 256 numbers: one scale ``d`` for all of them, and whole numbers of 6 or 8 bits that say for
each group of 32 or 16 which multiple of it is the group's own::

    Q4_K, Q5_K:  number = (d * scale) * q - (dmin * minimum)          Q6_K:  number = (d * scale) * (q - 32)

======== ===================================================================================== ==========
form     bytes of a block, in their order                                                      bits
======== ===================================================================================== ==========
Q4_0     d, 16 bytes of two numbers                                                            4.5
Q4_1     d, m, 16 bytes of two numbers                                                         5
Q5_0     d, 4 bytes of fifth bits, 16 bytes of two numbers                                     5.5
Q5_1     d, m, 4 bytes of fifth bits, 16 bytes of two numbers                                  6
Q8_0     d, 32 numbers                                                                         8.5
Q4_K     d, dmin, 12 bytes of 8 scales and 8 minima, 128 bytes of two numbers                  4.5
Q5_K     d, dmin, 12 bytes of the same, 32 bytes of fifth bits, 128 bytes of two numbers       5.5
Q6_K     128 bytes of low halves, 64 bytes of two high bits, 16 scales, d                      6.5625
======== ===================================================================================== ==========

In float32 the numbers are those of the package ``gguf`` to the bit: the operations and their order are the same. In
another dtype scales are multiplied in float32, and rounded once.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fs_fwdllm.model.base.codecs import Codec, Parts

__all__ = ["BLOCK_CODECS", "BlockCodec", "Reordered"]


@dataclass(frozen=True)
class BlockCodec(Codec):
    """``weight`` ``[out, bytes a row]`` uint8 in blocks of ``numbers`` numbers and ``block_bytes`` bytes."""

    numbers: ClassVar[int] = 32
    block_bytes: ClassVar[int]

    @property
    def bits(self) -> float:
        return 8.0 * self.block_bytes / self.numbers

    def rows(self, parts: Parts, first: int, last: int, scratch: torch.Tensor) -> torch.Tensor:
        rows = scratch[: (last - first) * self.in_features].view(last - first, self.in_features)
        blocks = parts["weight"][first:last].reshape(-1, self.block_bytes)
        self.unpack(blocks, rows.view(-1, self.numbers))
        return rows

    @abstractmethod
    def unpack(self, blocks: torch.Tensor, numbers: torch.Tensor) -> None:
        """Write the numbers of ``blocks`` ``[count, block_bytes]`` into ``numbers`` ``[count, numbers]``."""


@dataclass(frozen=True)
class Reordered(Codec):
    """The rows of another codec in another order: row ``index`` is that codec's row ``order[index]``.

    llama.cpp interleaves the two halves of each attention head's query and key rows; the model here has them one after
    the other. Only bytes of the rows that are wanted are moved.
    """

    kept: Codec
    order: torch.Tensor = field(compare=False)

    @property
    def bits(self) -> float:
        return self.kept.bits

    def rows(self, parts: Parts, first: int, last: int, scratch: torch.Tensor) -> torch.Tensor:
        weight = parts["weight"]
        wanted = weight[self.order[first:last].to(weight.device)]
        return self.kept.rows({"weight": wanted}, 0, last - first, scratch)


def _halves(blocks: torch.Tensor, first: int) -> torch.Tensor:
    """The number in half precision at byte ``first`` of every block, ``[count, 1]`` float32."""
    return blocks[:, first : first + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Low halves of ``packed`` ``[count, ..., width]``, then its high halves: ``[count, ... * 2 * width]`` uint8.

    Bytes are put together before they become floats: one conversion of a whole block is far faster than several of
    its parts.
    """
    return torch.stack((packed & 15, packed >> 4), dim=-2).flatten(1)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """The bits of four bytes, the lowest first, each times 16: ``[count, 32]`` uint8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> shifts & 1) << 4).flatten(1)


@dataclass(frozen=True)
class Q40(BlockCodec):
    block_bytes: ClassVar[int] = 18

    def unpack(self, blocks: torch.Tensor, numbers: torch.Tensor) -> None:
        numbers.copy_((_nibbles(blocks[:, 2:]) - 8).view(torch.int8))  # bytes below zero wrap round
        numbers.mul_(_halves(blocks, 0).to(numbers.dtype))


@dataclass(frozen=True)
class Q41(BlockCodec):
    block_bytes: ClassVar[int] = 20

    def unpack(self, blocks: torch.Tensor, numbers: torch.Tensor) -> None:
        numbers.copy_(_nibbles(blocks[:, 4:]))
        numbers.mul_(_halves(blocks, 0).to(numbers.dtype)).add_(_halves(blocks, 2).to(numbers.dtype))


@dataclass(frozen=True)
class Q50(BlockCodec):
    block_bytes: ClassVar[int] = 22

    def unpack(self, blocks: torch.Tensor, numbers: torch.Tensor) -> None:
        numbers.copy_(((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])) - 16).view(torch.int8))
        numbers.mul_(_halves(blocks, 0).to(numbers.dtype))


@dataclass(frozen=True)
class Q51(BlockCodec):
    block_bytes: ClassVar[int] = 24

    def unpack(self, blocks: torch.Tensor, numbers: torch.Tensor) -> None:
        numbers.copy_(_nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8]))
        numbers.mul_(_halves(blocks, 0).to(numbers.dtype)).add_(_halves(blocks, 2).to(numbers.dtype))


@dataclass(frozen=True)
class Q80(BlockCodec):
    block_bytes: ClassVar[int] = 34

    def unpack(self, blocks: torch.Tensor, numbers: torch.Tensor) -> None:
        numbers.copy_(blocks.view(torch.int8)[:, 2:])
        numbers.mul_(_halves(blocks, 0).to(numbers.dtype))


def _scale_groups(blocks: torch.Tensor, numbers: torch.Tensor) -> None:
    """Numbers times their group's scale, less its minimum; both are 6 bits in bytes 4 to 15 of a block."""
    first, second, high = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scales = torch.cat((first & 63, high & 15 | first >> 2 & 48), dim=1)
    minima = torch.cat((second & 63, high >> 4 | second >> 2 & 48), dim=1)
    grouped = numbers.view(-1, 8, 32)
    grouped.mul_((_halves(blocks, 0) * scales).to(numbers.dtype)[:, :, None])
    grouped.sub_((_halves(blocks, 2) * minima).to(numbers.dtype)[:, :, None])


@dataclass(frozen=True)
class Q4K(BlockCodec):
    numbers: ClassVar[int] = 256
    block_bytes: ClassVar[int] = 144

    def unpack(self, blocks: torch.Tensor, numbers: torch.Tensor) -> None:
        packed, halves = blocks[:, 16:].unflatten(1, (4, 32)), numbers.view(-1, 4, 2, 32)
        halves[:, :, 0].copy_(packed & 15)
        halves[:, :, 1].copy_(packed >> 4)
        _scale_groups(blocks, numbers)


@dataclass(frozen=True)
class Q5K(BlockCodec):
    numbers: ClassVar[int] = 256
    block_bytes: ClassVar[int] = 176

    def unpack(self, blocks: torch.Tensor, numbers: torch.Tensor) -> None:
        fifth = torch.stack([(blocks[:, 16:48] >> group & 1) << 4 for group in range(8)], dim=1)  # a bit for a group
        numbers.copy_(_nibbles(blocks[:, 48:].unflatten(1, (4, 32))) | fifth.flatten(1))
        _scale_groups(blocks, numbers)


@dataclass(frozen=True)
class Q6K(BlockCodec):
    numbers: ClassVar[int] = 256
    block_bytes: ClassVar[int] = 210

    def unpack(self, blocks: torch.Tensor, numbers: torch.Tensor) -> None:
        low = _nibbles(blocks[:, :128].unflatten(1, (2, 64)))
        high = blocks[:, 128:192].unflatten(1, (2, 32))
        upper = torch.stack([(high >> shift & 3) << 4 for shift in (0, 2, 4, 6)], dim=2)
        numbers.copy_(((low | upper.flatten(1)) - 32).view(torch.int8))
        scales = _halves(blocks, 208) * blocks.view(torch.int8)[:, 192:208]
        numbers.view(-1, 16, 16).mul_(scales.to(numbers.dtype)[:, :, None])


#: By llama.cpp's names for the forms.
BLOCK_CODECS: dict[str, type[BlockCodec]] = {
    "Q4_0": Q40, "Q4_1": Q41, "Q5_0": Q50, "Q5_1": Q51, "Q8_0": Q80, "Q4_K": Q4K, "Q5_K": Q5K, "Q6_K": Q6K,
}  # fmt: skip
