"""What a GGUF file holds, by its header: settings, and where each tensor lies and in what form.

llama.cpp keeps a whole model in one file: pairs of keys and values (the sizes of the model, its vocabulary), a table of
tensors, then their bytes::

    "GGUF", version, how many tensors, how many pairs
    key, kind, value                              for every pair
    name, sizes, type, place among the bytes      for every tensor
    bytes of the tensors, each at a multiple of the alignment

A type says how rows of numbers became bytes. Except for floats, it cuts a row into blocks of 32 or 256 numbers, each
with its own scale. Only the header is looked at here, and it is looked at with distrust: whatever it says is compared
with the size of the file before memory is taken or anybody else reads it.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from fs_fwdllm.errors import ModelError, shown

__all__ = ["GGUF_FORMS", "GgufForm", "GgufHeader", "GgufTensor", "gguf_files", "read_gguf"]


class GgufForm(NamedTuple):
    """How rows of numbers became bytes: so many numbers of a row are so many bytes."""

    name: str
    numbers: int
    bytes: int

    @property
    def is_float(self) -> bool:
        """Whether they are floating-point numbers as they are."""
        return self.numbers == 1


#: By the number that stands in the file. Those that are read.
GGUF_FORMS = {
    0: GgufForm("F32", 1, 4), 1: GgufForm("F16", 1, 2), 30: GgufForm("BF16", 1, 2),
    2: GgufForm("Q4_0", 32, 18), 3: GgufForm("Q4_1", 32, 20), 6: GgufForm("Q5_0", 32, 22), 7: GgufForm("Q5_1", 32, 24),
    8: GgufForm("Q8_0", 32, 34), 12: GgufForm("Q4_K", 256, 144), 13: GgufForm("Q5_K", 256, 176),
    14: GgufForm("Q6_K", 256, 210),
}  # fmt: skip
#: And those that are not, by the names llama.cpp has for them.
_OTHER_FORMS = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip

_VERSIONS = (2, 3)
#: Kinds of values: those of one size, text, and arrays.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY, _UINT32 = 8, 9, 4
#: More than any file has: larger counts are damage.
_MOST_PAIRS, _MOST_TENSORS, _MOST_ELEMENTS, _MOST_SIZES = 1 << 16, 1 << 20, 1 << 26, 4
#: Arrays with more elements are vocabularies.
_LONG = 1 << 8
_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """A tensor: its shape as PyTorch counts, and where its bytes lie in the file."""

    form: GgufForm
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of a file.

    Attributes:
        settings: values of one number or text, by key.
        lengths: of the arrays, by key.
        tensors: by the file's names.
        pairs: of the header as they are, without vocabularies.
    """

    file: Path
    settings: dict[str, Any]
    lengths: dict[str, int]
    tensors: dict[str, GgufTensor]
    pairs: tuple[bytes, ...]

    @property
    def architecture(self) -> str:
        """By llama.cpp's name."""
        return str(self.settings["general.architecture"])

    @property
    def elements(self) -> int:
        """Numbers in all tensors."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def packed_forms(self) -> list[str]:
        """The forms of tensors that are not floats, the most frequent first."""
        names = [tensor.form.name for tensor in self.tensors.values() if not tensor.form.is_float]
        return sorted(set(names), key=lambda name: (-names.count(name), name))

    def without_vocabulary(self) -> bytes:
        """A file of the same settings, and of tensors by the same names that hold nothing.

        Whoever only asks for the settings need not go through a vocabulary for them: that of a recent model has half
        a million texts.
        """
        pairs = list(self.pairs)
        size = f"{self.architecture}.vocab_size"
        table = self.tensors.get("token_embd.weight")
        if size not in self.settings and table is not None:
            pairs.append(_text(size) + struct.pack("<II", _UINT32, table.shape[0]))
        places = [_text(name) + struct.pack("<IQIQ", 1, 0, 0, 0) for name in self.tensors]
        whole = b"GGUF" + struct.pack("<IQQ", _VERSIONS[-1], len(places), len(pairs)) + b"".join(pairs + places)
        return whole + bytes(2 * _ALIGNMENT)


def gguf_files(folder: Path) -> list[Path]:
    """The files of a folder that say by their names that they are GGUF."""
    return sorted(path for path in folder.glob("*.gguf") if path.is_file())


def read_gguf(file: Path) -> GgufHeader:
    """The header of a file.

    Raises:
        ModelError: it is no GGUF file, of a version or for machines that are not known here, damaged, cut short, one
            part of several, or holds tensors in forms that are not read.
    """
    try:
        state = file.stat()
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror or error})") from error
    return _read(file, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4)
def _read(file: Path, size: int, _changed_ns: int) -> GgufHeader:
    try:
        with file.open("rb") as opened:
            if size < 24:
                raise ModelError(f"{file}: is no GGUF file, or is cut short: it has {size} bytes")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _parsed(file, mapped)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, struct.error, OverflowError) as error:
        raise ModelError(f"{file}: is damaged or cut short ({error}); copy it anew") from error


def _parsed(file: Path, mapped: mmap.mmap) -> GgufHeader:
    _check_version(file, mapped)
    walk = _Walk(mapped, 8)
    tensor_count, pair_count = walk.numbers("<QQ")
    if pair_count > _MOST_PAIRS or tensor_count > _MOST_TENSORS:
        raise ValueError(f"{pair_count:,} settings and {tensor_count:,} tensors")
    settings, lengths, pairs = _settings(walk, pair_count)
    if not isinstance(settings.get("general.architecture"), str):
        raise ValueError("general.architecture is missing")
    if (parts := settings.get("split.count", 1)) not in (0, 1):
        raise ModelError(f"{file}: is one of {parts} parts; join them: llama-gguf-split --merge FIRST_PART WHOLE_FILE")
    alignment = settings.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & alignment - 1:
        raise ValueError(f"general.alignment is {shown(alignment)}")
    rows = list(_table(walk, tensor_count))
    start = -(-walk.place // alignment) * alignment
    size = len(mapped)
    tensors = {name: _tensor(file, name, form, shape, start + place, size) for name, form, shape, place in rows}
    if len(tensors) < len(rows):
        raise ValueError("two tensors of one name")
    return GgufHeader(file, settings, lengths, tensors, tuple(pairs))


def _check_version(file: Path, mapped: mmap.mmap) -> None:
    if mapped[:4] != b"GGUF":
        raise ModelError(f"{file}: is no GGUF file: it begins with {shown(mapped[:4])}")
    (version,) = struct.unpack_from("<I", mapped, 4)
    if version & 0xFFFF == 0:
        raise ModelError(
            f"{file}: was written for big-endian machines; write it anew with --endian little (gguf-convert-endian of "
            "the package gguf)"
        )
    if version not in _VERSIONS:
        raise ModelError(
            f"{file}: is of version {version} of GGUF; read are {' and '.join(map(str, _VERSIONS))}; write it anew "
            "with a present llama.cpp"
        )


class _Walk:
    """Goes through bytes, and not beyond their end."""

    def __init__(self, mapped: mmap.mmap, place: int) -> None:
        self.mapped, self.place = mapped, place

    def numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.mapped, self.place)
        self.place += struct.calcsize(form)
        return found

    def skip(self, count: int) -> None:
        if count > len(self.mapped) - self.place:
            raise ValueError(f"a value of {count:,} bytes at byte {self.place:,}")
        self.place += count

    def text(self) -> str:
        (length,) = self.numbers("<Q")
        start = self.place
        self.skip(length)
        return self.mapped[start : self.place].decode("utf-8")

    def value(self, kind: int) -> Any:
        """One number or text; of an array, how many elements it has."""
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a value of kind {kind} at byte {self.place:,}")
        inner, count = self.numbers("<IQ")
        if count > _MOST_ELEMENTS:
            raise ValueError(f"an array of {count:,} elements at byte {self.place:,}")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _TEXT:
            for _ in range(count):
                self.skip(self.numbers("<Q")[0])
        else:
            raise ValueError(f"an array of kind {inner} at byte {self.place:,}")
        return count


def _settings(walk: _Walk, count: int) -> tuple[dict[str, Any], dict[str, int], list[bytes]]:
    settings: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    pairs = []
    for _ in range(count):
        start, key = walk.place, walk.text()
        (kind,) = walk.numbers("<I")
        value = walk.value(kind)
        if key in settings or key in lengths:
            raise ValueError(f"{key} stands there twice")
        (lengths if kind == _ARRAY else settings)[key] = value
        if kind != _ARRAY or value <= _LONG:
            pairs.append(walk.mapped[start : walk.place])
    return settings, lengths, pairs


def _table(walk: _Walk, count: int) -> Iterator[tuple[str, int, tuple[int, ...], int]]:
    """``(name, number of its form, shape, place)`` of each tensor."""
    for _ in range(count):
        name = walk.text()
        (sizes,) = walk.numbers("<I")
        if not 1 <= sizes <= _MOST_SIZES:
            raise ValueError(f"{name} has {sizes} dimensions")
        shape = walk.numbers(f"<{sizes}Q")[::-1]  # the file begins with the size whose elements are neighbours
        form, place = walk.numbers("<IQ")
        yield name, form, shape, place


def _tensor(file: Path, name: str, number: int, shape: tuple[int, ...], place: int, size: int) -> GgufTensor:
    form = GGUF_FORMS.get(number)
    if form is None:
        known = ", ".join(known.name for known in GGUF_FORMS.values())
        raise ModelError(
            f"{file}: {name} is of type {_OTHER_FORMS.get(number, number)}, which is not read here; known are {known}; "
            "write the file anew in one of them (llama-quantize FLOAT_FILE NEW_FILE Q4_K_M), or give the folder of the "
            "float model, with fwdllm.base.quantise int4 to save memory"
        )
    if shape[-1] % form.numbers:
        raise ValueError(f"{name} has rows of {shape[-1]} numbers, in blocks of {form.numbers}")
    count = prod(shape) // form.numbers * form.bytes
    if count == 0 or place + count > size:
        raise ValueError(f"{name} has {count:,} bytes from byte {place:,} of {size:,}")
    return GgufTensor(form, shape, place, count)


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded
