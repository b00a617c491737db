"""Tables of embeddings of which only the rows that are looked up become numbers.

A batch looks up some hundred rows of a table that may be the largest matrix of a model. Where the table lies on the
disk, or in memory in a packed form, those rows are fetched, and unpacked if they have to be; there is never a whole
table of floats. To the rest of the program it is an embedding layer whose ``weight`` has a shape and no numbers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fs_fwdllm.errors import ModelError
from fs_fwdllm.model.base.checkpoint import Entry
from fs_fwdllm.model.base.codecs import Codec
from fs_fwdllm.model.base.streaming import Reader

__all__ = ["PackedEmbedding", "StreamedEmbedding", "Table"]


class Table(nn.Embedding):
    """Rows that are fetched when they are looked up.

    Args:
        shape: ``(num_embeddings, embedding_dim)``.
        dtype: of the rows it returns.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, padding_idx: int | None) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would make room for the table
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._like = torch.full((), torch.nan, dtype=dtype)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The table's shape and dtype, with no numbers behind them."""
        return self._like.expand(self.num_embeddings, self.embedding_dim)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[...]`` token ids to ``[..., embedding_dim]``."""
        tokens, places = torch.unique(input, return_inverse=True)
        return self.rows(tokens).to(self._like.dtype).to(input.device)[places]

    @abstractmethod
    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """The numbers ``[len(tokens), embedding_dim]`` of some rows."""

    @torch.no_grad()
    def dequantised(self) -> torch.Tensor:
        """All rows, in the dtype that is looked up."""
        whole = torch.empty(self.num_embeddings, self.embedding_dim, dtype=self._like.dtype, device=self._like.device)
        step = max(1, (1 << 20) // self.embedding_dim)
        for first in range(0, self.num_embeddings, step):
            last = min(first + step, self.num_embeddings)
            whole[first:last] = self.rows(torch.arange(first, last))
        return whole

    def _apply(self, fn: Any, recurse: bool = True) -> Table:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._like = fn(self._like)
        return self

    def _unpacked(self, codec: Codec | None, kept: torch.Tensor) -> torch.Tensor:
        """The numbers of rows ``kept``, which are as the table has them."""
        if codec is None:
            return kept
        scratch = torch.empty(len(kept) * self.embedding_dim, dtype=self._like.dtype, device=kept.device)
        return codec.rows({"weight": kept}, 0, len(kept), scratch)


class PackedEmbedding(Table):
    """A table in memory, in packed form.

    Args:
        codec: of whose one tensor, ``weight``, rows of bytes are rows of numbers.
        kept: that tensor; a head that is tied to the table has it, too.
    """

    def __init__(self, codec: Codec, kept: torch.Tensor, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__((codec.out_features, codec.in_features), dtype, padding_idx)
        self.codec = codec
        self.register_buffer("packed_weight", kept, persistent=False)

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        kept = self.get_buffer("packed_weight")
        return self._unpacked(self.codec, kept[tokens.to(kept.device)])


class StreamedEmbedding(Table):
    """A table on the disk.

    Args:
        reader: whose files it shares.
        entry: where the table lies.
    """

    def __init__(self, reader: Reader, entry: Entry, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__(entry.numbers, dtype, padding_idx)
        self.entry = entry
        self._place = _Place(reader, entry)

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._unpacked(self.entry.codec, self._place.rows(tokens.tolist()))


@dataclass(frozen=True)
class _Place:
    """Where the rows are. A copy of the module shares it."""

    reader: Reader
    entry: Entry

    def __deepcopy__(self, memo: Any) -> _Place:
        return self

    def rows(self, tokens: Sequence[int]) -> torch.Tensor:
        width = self.entry.bytes // self.entry.shape[0]
        memory = np.empty(len(tokens) * width, dtype=np.uint8)
        file = self.reader.file(self.entry.file)
        for place, token in enumerate(tokens):
            if not 0 <= token < self.entry.shape[0]:
                raise ModelError(f"token {token} is outside of the table of {self.entry.shape[0]:,} rows")
            view = memoryview(memory[place * width : (place + 1) * width])  # type: ignore[arg-type]
            file.read_into(view, self.entry.offset + token * width, keep=True)
        return torch.from_numpy(memory).view(self.entry.dtype).view(len(tokens), -1)
