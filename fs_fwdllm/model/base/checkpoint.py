"""Where the tensors of a model lie: name, file, place in the file, dtype and shape.

A checkpoint answers by the names the model has for them, whoever wrote it. Here is the most common kind; a GGUF file is
another (:mod:`~fs_fwdllm.model.base.gguf_checkpoint`). A safetensors file is a header of JSON and then the tensors'
bytes. The header alone says what a folder holds, so that a tensor is read when it is wanted and the rest never is; a
7B checkpoint is taken apart in this way with one matrix in memory at a time.
"""

from __future__ import annotations

import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open

from fs_fwdllm.errors import ModelError, shown
from fs_fwdllm.model.base.codecs import Codec
from fs_fwdllm.model.folder import weight_files

__all__ = ["Checkpoint", "Entry", "SafetensorsCheckpoint"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
#: More than any header has: a larger one is a damaged file.
_LARGEST_HEADER = 100 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        offset: of its data, like ``bytes``.
        codec: what makes a matrix of it, where the file itself says how; its tensor is then ``weight``.
    """

    file: Path
    offset: int
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    codec: Codec | None = None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The shape of what it stands for."""
        return self.shape if self.codec is None else (self.codec.out_features, self.codec.in_features)

    @property
    def is_float(self) -> bool:
        """Whether it holds ordinary floating-point numbers."""
        return self.dtype.is_floating_point and self.dtype.itemsize > 1


class Checkpoint(ABC):
    """The tensors of a model by name.

    Attributes:
        place: the folder or the file, as errors name it.
        entries: every tensor.
        packs_tables: whether embeddings and output layers may be packed like the layers of the blocks.
    """

    packs_tables: ClassVar[bool] = False

    def __init__(self, place: Path, entries: Mapping[str, Entry]) -> None:
        self.place = place
        self.entries = entries

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """The tensor, in memory of its own. Raises :class:`~fs_fwdllm.errors.ModelError`."""

    def beside(self, layer: str) -> dict[str, Entry]:
        """The entries of one layer, by what follows its name."""
        start = f"{layer}."
        return {name[len(start) :]: entry for name, entry in self.entries.items() if name.startswith(start)}


class SafetensorsCheckpoint(Checkpoint):
    """The tensors of a folder.

    Raises:
        ModelError: a file is missing, damaged, or of dtypes nobody here knows.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, {name: entry for file in weight_files(folder) for name, entry in _entries(file)})

    def read(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        try:
            with safe_open(entry.file, framework="pt") as opened:
                tensor: torch.Tensor = opened.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{entry.file}: {name} cannot be read ({str(error).splitlines()[0]})") from error


def _entries(file: Path) -> Iterator[tuple[str, Entry]]:
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _LARGEST_HEADER:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(opened.read(length))
        start, end = 8 + length, file.stat().st_size
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, _entry(file, start, end, entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{file}: is damaged or cut short ({error}); copy it anew") from error


def _entry(file: Path, start: int, end: int, entry: dict[str, Any]) -> Entry:
    if entry["dtype"] not in _DTYPES:
        raise ModelError(f"{file}: dtype {shown(entry['dtype'])} is not known here")
    first, last = entry["data_offsets"]
    if not 0 <= first <= last <= end - start:
        raise ValueError("a tensor that ends after the file")
    return Entry(file, start + first, last - first, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
