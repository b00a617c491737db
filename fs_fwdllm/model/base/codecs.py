"""How a packed matrix becomes numbers again: one small class per layout, read a block of rows at a time.

A quantised matrix is kept as whole numbers of a few bits and a scale for every group of neighbours::

    weight[row, column] = (number[row, column] - zero[row, group]) * scale[row, group]

Libraries differ in where they put the bits, not in this formula. Each codec here knows one library's layout, by the
names and shapes of its tensors, and turns rows ``first`` to ``last`` into floating point in a buffer that it is lent.
The buffer is as large as a processor's cache, not as the matrix: a packed model never exists as floats, and nothing
but ordinary tensor operations is used, so that automatic differentiation and batching of either kind see nothing new.

The product is computed in the dtype of the buffer. In float32 it is exact up to one rounding of a number of at most
eight bits times a scale, so that the same packed bytes are the same matrix on every machine.

===================== ============================== ===============================================================
class                 written by                     tensors beside the layer's name
===================== ============================== ===============================================================
:class:`PackedWords`  compressed-tensors, and us     weight_packed, weight_scale (weight_zero_point, weight_g_idx)
:class:`ScaledBytes`  compressed-tensors (int8, fp8) weight, weight_scale (weight_zero_point)
:class:`RowBytes`     bitsandbytes (LLM.int8)        weight, SCB
:class:`Codebook`     bitsandbytes (nf4, fp4), and   weight, weight.absmax, weight.quant_map, weight.quant_state... and
                      us                             weight.nested_absmax, weight.nested_quant_map
:class:`Gptq`         GPTQModel, AutoGPTQ            qweight, qzeros, scales (g_idx)
:class:`Awq`          AutoAWQ (version gemm)         qweight, qzeros, scales
:class:`Plain`        everybody                      weight
===================== ============================== ===============================================================
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

__all__ = [
    "Awq",
    "Codebook",
    "Codec",
    "Gptq",
    "PackedWords",
    "Plain",
    "RowBytes",
    "ScaledBytes",
    "rows_at_a_time",
    "state_of",
]

Parts = Mapping[str, torch.Tensor]

#: Bytes of floats that exist at once: they should stay in the cache between being made and being used.
_BLOCK_BYTES = 4 << 20
#: Nibbles of a 32-bit word in the order in which AWQ's kernels read columns.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
#: 1 / 127 as LLM.int8's kernels have it, in float32.
_ONE_OF_127 = 7.874015718698502e-3


def rows_at_a_time(in_features: int, dtype: torch.dtype) -> int:
    """Rows of a matrix that exist as floats at once; twice as many in half precision."""
    return max(1, max(1, _BLOCK_BYTES // (4 * in_features)) * 4 // dtype.itemsize)


@dataclass(frozen=True)
class Codec(ABC):
    """The layout of one matrix ``[out_features, in_features]``."""

    out_features: int
    in_features: int

    #: What the first row of a block must be a multiple of.
    row_multiple: ClassVar[int] = 1

    @abstractmethod
    def rows(self, parts: Parts, first: int, last: int, scratch: torch.Tensor) -> torch.Tensor:
        """Rows ``first`` to ``last`` as ``[last - first, in_features]`` in the dtype of ``scratch``.

        Args:
            parts: the layer's tensors, by the names of the table above.
            scratch: flat, of at least so many elements; what is returned is a view of it and lasts until it is lent
                again.
        """

    @property
    def bits(self) -> float:
        """Bits of a weight, without scales."""
        return 4.0


@dataclass(frozen=True)
class Plain(Codec):
    """Floating point as it was saved, ``[out, in]``, or ``[in, out]`` where ``transposed`` (GPT-2's layers)."""

    transposed: bool = False
    element_bits: int = 32

    @property
    def bits(self) -> float:
        return float(self.element_bits)

    def rows(self, parts: Parts, first: int, last: int, scratch: torch.Tensor) -> torch.Tensor:
        weight = parts["weight"]
        wanted = weight[:, first:last].T if self.transposed else weight[first:last]
        return wanted if wanted.dtype == scratch.dtype else _filled(scratch, *wanted.shape).copy_(wanted)


@dataclass(frozen=True)
class PackedWords(Codec):
    """Numbers of 4 or 8 bits in 32-bit words along a row, the lowest bits first, ``2 ** (bits - 1)`` added.

    ``weight_packed`` ``[out, ceil(in * bits / 32)]`` int32; ``weight_scale`` ``[out, in / group]``;
    ``weight_zero_point`` ``[ceil(out * bits / 32), in / group]`` int32 words along a column; ``weight_g_idx`` ``[in]``
    the group of every column, where columns were quantised out of order.
    """

    width: int = 4
    row_multiple: ClassVar[int] = 8

    @property
    def bits(self) -> float:
        return float(self.width)

    def rows(self, parts: Parts, first: int, last: int, scratch: torch.Tensor) -> torch.Tensor:
        block = _filled(scratch, last - first, self.in_features)
        _spread(parts["weight_packed"][first:last], self.width, block)
        zeros: torch.Tensor | float = float(1 << self.width - 1)
        if "weight_zero_point" in parts:
            zeros = self._zeros(parts["weight_zero_point"], first, last).to(block.dtype)
        return _scaled(block, zeros, parts["weight_scale"][first:last].to(block.dtype), parts.get("weight_g_idx"))

    def _zeros(self, words: torch.Tensor, first: int, last: int) -> torch.Tensor:
        in_word = 32 // self.width
        columns = words[first // in_word : -(-last // in_word)]
        shifts = torch.arange(0, 32, self.width, dtype=torch.int32, device=words.device)
        numbers = columns[:, None, :] >> shifts[None, :, None] & (1 << self.width) - 1
        skipped = first - first // in_word * in_word
        return numbers.flatten(0, 1)[skipped : skipped + last - first]


@dataclass(frozen=True)
class ScaledBytes(Codec):
    """One byte a number, whole (``int8``) or floating point (``float8``), times a scale."""

    @property
    def bits(self) -> float:
        return 8.0

    def rows(self, parts: Parts, first: int, last: int, scratch: torch.Tensor) -> torch.Tensor:
        block = _filled(scratch, last - first, self.in_features)
        block.copy_(parts["weight"][first:last])
        scale = _by_row(parts["weight_scale"], first, last, self.out_features).to(block.dtype)
        zeros: torch.Tensor | float = 0.0
        if "weight_zero_point" in parts:
            zeros = _by_row(parts["weight_zero_point"], first, last, self.out_features).to(block.dtype)
        return _scaled(block, zeros, scale)


@dataclass(frozen=True)
class RowBytes(Codec):
    """LLM.int8: ``weight`` ``[out, in]`` int8 and ``SCB`` ``[out]``, the largest magnitude of a row (127)."""

    @property
    def bits(self) -> float:
        return 8.0

    def rows(self, parts: Parts, first: int, last: int, scratch: torch.Tensor) -> torch.Tensor:
        block = _filled(scratch, last - first, self.in_features)
        block.copy_(parts["weight"][first:last])
        return block.mul_(parts["SCB"][first:last].to(block.dtype)[:, None]).mul_(_ONE_OF_127)


@dataclass(frozen=True)
class Codebook(Codec):
    """Indices of 4 bits into sixteen values, the high half of a byte first, scaled by the magnitude of each block.

    Blocks of ``block_size`` run over the flattened matrix. With ``nested`` the magnitudes are bytes themselves, indices
    into 256 values with a scale for every ``nested_block_size`` of them, to which ``nested_offset`` is added.
    """

    block_size: int = 64
    nested_block_size: int = 0
    nested_offset: float = 0.0

    def rows(self, parts: Parts, first: int, last: int, scratch: torch.Tensor) -> torch.Tensor:
        start, stop = first * self.in_features, last * self.in_features
        block = _filled(scratch, last - first, self.in_features)
        flat = block.view(-1)
        packed = parts["weight"].reshape(-1)[start // 2 : -(-stop // 2)]
        if start % 4 == 0 and stop % 4 == 0:
            # two bytes at once: a table of 65,536 rows of four values stays in the cache, and is read far faster
            pairs = packed.view(torch.int16).to(torch.int32) & 0xFFFF
            torch.index_select(_pair_table(parts["weight.quant_map"], block.dtype), 0, pairs, out=flat.view(-1, 4))
        else:
            numbers = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()
            values = parts["weight.quant_map"].to(block.dtype)[numbers[start % 2 :][: stop - start].int()]
            flat.copy_(values)
        magnitudes = self._magnitudes(parts, start // self.block_size, -(-stop // self.block_size)).to(block.dtype)
        if start % self.block_size == 0 and stop % self.block_size == 0:
            flat.view(-1, self.block_size).mul_(magnitudes[:, None])
        else:
            skipped = start % self.block_size
            flat.mul_(magnitudes.repeat_interleave(self.block_size)[skipped : skipped + stop - start])
        return block

    def _magnitudes(self, parts: Parts, first: int, last: int) -> torch.Tensor:
        kept = parts["weight.absmax"]
        if not self.nested_block_size:
            return kept[first:last]
        values = parts["weight.nested_quant_map"][kept[first:last].int()]
        blocks = torch.arange(first, min(last, len(kept)), device=kept.device) // self.nested_block_size
        return values * parts["weight.nested_absmax"][blocks] + self.nested_offset


@dataclass(frozen=True)
class Gptq(Codec):
    """Numbers of 4 or 8 bits in words along a *column* of ``[in, out]``; zeros along its rows, kept less ``shift``.

    ``qweight`` ``[in * bits / 32, out]``, ``qzeros`` ``[in / group, out * bits / 32]``, ``scales`` ``[in / group,
    out]``, ``g_idx`` ``[in]`` the group of every input.
    """

    width: int = 4
    shift: int = 1
    row_multiple: ClassVar[int] = 8

    @property
    def bits(self) -> float:
        return float(self.width)

    def rows(self, parts: Parts, first: int, last: int, scratch: torch.Tensor) -> torch.Tensor:
        in_word, most = 32 // self.width, (1 << self.width) - 1
        block = _filled(scratch, self.in_features, last - first)
        words = block.view(-1, in_word, last - first)
        packed = parts["qweight"][:, first:last]
        for index in range(in_word):
            words[:, index].copy_(packed >> self.width * index & most)
        zeros = _unpacked(parts["qzeros"][:, first // in_word : -(-last // in_word)], self.width)[:, : last - first]
        zeros = zeros + self.shift & most  # a zero of 0 is kept as the largest number
        return _scaled_inputs(block, zeros.to(block.dtype), parts["scales"][:, first:last], parts.get("g_idx")).T


@dataclass(frozen=True)
class Awq(Codec):
    """Numbers of 4 bits in words along a row of ``[in, out]``, in the order of AWQ's kernels.

    ``qweight`` ``[in, out / 8]``, ``qzeros`` ``[in / group, out / 8]``, ``scales`` ``[in / group, out]``.
    """

    row_multiple: ClassVar[int] = 8

    def rows(self, parts: Parts, first: int, last: int, scratch: torch.Tensor) -> torch.Tensor:
        block = _filled(scratch, self.in_features, last - first)
        words = slice(first // 8, last // 8)
        spread = block.view(self.in_features, -1, 8)
        for index, column in enumerate(_AWQ_ORDER):
            spread[:, :, column].copy_(parts["qweight"][:, words] >> 4 * index & 15)
        packed = parts["qzeros"][:, words]
        zeros = block.new_empty(*packed.shape, 8)
        for index, column in enumerate(_AWQ_ORDER):
            zeros[:, :, column].copy_(packed >> 4 * index & 15)
        return _scaled_inputs(block, zeros.flatten(1), parts["scales"][:, first:last], None).T


def state_of(packed: torch.Tensor) -> dict[str, Any]:
    """The settings that bitsandbytes keeps as bytes of JSON in a tensor. Raises ValueError."""
    state = json.loads(bytes(packed.to(torch.uint8).tolist()).decode("utf-8"))
    if not isinstance(state, dict):
        raise ValueError("is no JSON object")
    return state


def _filled(scratch: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return scratch[: rows * columns].view(rows, columns)


def _spread(words: torch.Tensor, width: int, block: torch.Tensor) -> None:
    """Numbers of packed rows into ``block``; a word's bytes lie lowest first, as on every machine torch runs on."""
    in_bytes = words.contiguous().view(torch.uint8)
    columns = block.shape[1]
    if width == 8:
        block.copy_(in_bytes[:, :columns])
        return
    block[:, 0::2].copy_(in_bytes[:, : -(-columns // 2)] & 15)
    block[:, 1::2].copy_(in_bytes[:, : columns // 2] >> 4)


def _unpacked(words: torch.Tensor, width: int) -> torch.Tensor:
    """Numbers of words along a row, lowest bits first: ``[rows, words * 32 / width]``."""
    shifts = torch.arange(0, 32, width, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts & (1 << width) - 1).flatten(-2)


def _by_row(values: torch.Tensor, first: int, last: int, rows: int) -> torch.Tensor:
    """``[last - first, groups]`` of what is kept once, a row, or a row and group."""
    if values.numel() == 1:
        return values.reshape(1, 1).expand(last - first, 1)
    return values.reshape(rows, -1)[first:last]


def _scaled(
    block: torch.Tensor, zeros: torch.Tensor | float, scale: torch.Tensor, group_of_column: torch.Tensor | None = None
) -> torch.Tensor:
    """``(block - zeros) * scale`` in place; ``zeros`` and ``scale`` are ``[rows, groups]``."""
    if group_of_column is not None:
        chosen = group_of_column.long()
        zeros = zeros[:, chosen] if isinstance(zeros, torch.Tensor) else zeros
        return block.sub_(zeros).mul_(scale[:, chosen])
    grouped = block.view(len(block), scale.shape[1], -1)
    if isinstance(zeros, torch.Tensor):
        grouped.sub_(zeros[:, :, None])
    elif zeros:
        grouped.sub_(zeros)
    grouped.mul_(scale[:, :, None])
    return block


def _scaled_inputs(
    block: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group_of_input: torch.Tensor | None
) -> torch.Tensor:
    """``(block - zeros) * scales`` in place for ``block`` ``[in, rows]`` and the others ``[groups, rows]``."""
    scales = scales.to(block.dtype)
    if group_of_input is not None:
        chosen = group_of_input.long()
        return block.sub_(zeros[chosen]).mul_(scales[chosen])
    grouped = block.view(len(scales), -1, block.shape[1])
    grouped.sub_(zeros[:, None]).mul_(scales[:, None])
    return block


#: Tables by dtype, device and the sixteen values; models have one or two sets of values.
_TABLES: list[tuple[torch.Tensor, torch.Tensor]] = []


def _pair_table(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Four values for every two bytes as they lie in memory, ``[65536, 4]``; one table for equal sixteen values."""
    for known, table in _TABLES:
        if table.dtype == dtype and table.device == values.device and torch.equal(known, values):
            return table
    numbers = torch.arange(65536, dtype=torch.int32, device=values.device)
    nibbles = torch.stack((numbers >> 4 & 15, numbers & 15, numbers >> 12, numbers >> 8 & 15), dim=-1)
    table = values.to(dtype)[nibbles]
    _TABLES.append((values.clone(), table))
    return table
