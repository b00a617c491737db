"""Frozen matrices that stay on the disk: read one at a time, while the one before is being used.

A forward pass uses each matrix of a base once and in the same order as the last pass did. So memory needs two of them:
the one in use, and the next, which a thread reads meanwhile. A pass over a 7B model with 4-bit weights reads 3.5 GB and
holds 45 MB; a step of several probes shares one pass (``fwdllm.probes_per_batch``), and with it the read.

The bytes are those of the user's own files, at the places their headers give; nothing is rewritten. They
are read into buffers that exist from the start, under tensors that exist from the start: what happens between two
layers is a copy by the system, no operation of PyTorch, so that it may happen inside any transformation. Pages that
were read are given back to the system, which would otherwise fill its cache with a file larger than the memory.

A file that ends early, or that somebody changes during a run, is an error that names it: half of a base is another one.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from fs_fwdllm.errors import ModelError
from fs_fwdllm.model.base.checkpoint import Entry
from fs_fwdllm.model.base.meeting import Meeting

__all__ = ["Reader", "StreamedLayer"]

_ALIGNMENT_BYTES = 64
#: glibc's names for the size from which a block is a mapping of its own, and for the number of heaps; and that size.
_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES = -3, 4 << 20
_HEAPS = -8
#: Of a table of the vocabulary that are read together.
_LARGEST_PIECE_BYTES = 16 << 20


class Reader:
    """Reads layers into two buffers in turn, the next one ahead.

    Layers are announced by :meth:`add` and lent by :class:`StreamedLayer`. One layer is lent at a time; what a thread
    does not give back in time another one waits for.

    Args:
        passes_per_read: how many passes go side by side, so that they share what is read.

    Attributes:
        meeting: where passes that go side by side wait for one another.
        bytes_read: from the disk, so far.
        waited_s: seconds that layers were waited for.
    """

    def __init__(self, passes_per_read: int = 8) -> None:
        self.meeting = Meeting(passes_per_read)
        self._files: dict[Path, _File] = {}
        self._layers: list[_Layer] = []
        self._slots: list[_Slot] = []
        self._followers: dict[tuple[int, int], int] = {}
        self._last = (-1, -1)
        self._wishes: SimpleQueue[_Slot] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()
        self.bytes_read = 0
        self.waited_s = 0.0
        _let_large_blocks_go()

    def add(self, entries: dict[str, Entry], rows: int) -> StreamedLayer:
        """A layer of these tensors, whose matrix has so many rows."""
        return StreamedLayer(self, (Piece(self._announce(entries), 0, rows),), tuple(entries.values()))

    def add_table(self, entry: Entry, multiple: int) -> StreamedLayer:
        """A layer of one matrix ``[rows, ...]``, in pieces that make no buffer larger than layers do.

        Args:
            multiple: of rows, which a piece has.
        """
        rows = entry.shape[0]
        width = entry.bytes // rows
        step = max(1, _LARGEST_PIECE_BYTES // (width * multiple)) * multiple
        pieces = []
        for first in range(0, rows, step):
            last = min(first + step, rows)
            place = entry.offset + first * width
            part = Entry(entry.file, place, (last - first) * width, entry.dtype, (last - first, *entry.shape[1:]))
            pieces.append(Piece(self._announce({"weight": part}), first, last))
        return StreamedLayer(self, tuple(pieces), (entry,))

    def _announce(self, entries: dict[str, Entry]) -> int:
        places, used = {}, 0
        for name, entry in entries.items():
            places[name] = used
            used += -(-entry.bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self._layers.append(_Layer(entries, places, used))
        self._slots = []  # as large as the largest layer, so anew
        return len(self._layers) - 1

    def file(self, path: Path, at: Path | None = None) -> _File:
        """The open file; one descriptor for all its tensors. ``at`` is where it is opened, if it has no name."""
        if path not in self._files:
            self._files[path] = _File(path, at)
        return self._files[path]

    def forget(self, path: Path) -> None:
        """Close a file that no layer is in any more."""
        self._files.pop(path, None)

    def replace(self, changes: Mapping[StreamedLayer, Entry]) -> None:
        """From now on, read the matrix of each of these layers, of one piece, from another place."""
        with self._lock:
            for slot in self._slots:
                slot.ready.wait()
            for layer, entry in changes.items():
                (piece,) = layer.pieces
                known = self._layers[piece.layer]
                self._layers[piece.layer] = _Layer({name: entry for name in known.entries}, known.places, entry.bytes)
            self._slots = []  # what was read ahead is of the old place, and the new one may be larger
            self._last = (-1, -1)

    @property
    def buffer_bytes(self) -> int:
        """Memory for layers."""
        return 2 * max((layer.bytes for layer in self._layers), default=0)

    @property
    def stored_bytes(self) -> int:
        """Of all layers, on the disk."""
        return sum(entry.bytes for layer in self._layers for entry in layer.entries.values())

    @contextmanager
    def lent(self, index: int) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of layer ``index`` for the duration of the context.

        Raises:
            ModelError: the file cannot be read, is shorter than it was, or was changed.
        """
        self.meeting.arrive(index)
        with self._lock:
            slot = self._held(index)
            self._follow(index)
            yield slot.views[index]

    def _held(self, index: int) -> _Slot:
        if not self._slots:
            size = max(layer.bytes for layer in self._layers)
            self._slots = [_Slot(self._layers, size) for _ in range(2)]
        slot = next((slot for slot in self._slots if slot.wanted == index), None)
        ahead = slot is not None
        if slot is None:  # not what was expected: the one that was read ahead is given up
            slot = self._slots[0] if self._slots[1].wanted == self._last[1] else self._slots[1]
            self._order(slot, index)
        began = time.perf_counter()
        slot.ready.wait()
        if slot.error is not None and ahead:  # of the time when it was ordered; the file may have been put back since
            self._order(slot, index)
            slot.ready.wait()
        self.waited_s += time.perf_counter() - began
        if slot.error is not None:
            error, slot.error, slot.wanted = slot.error, None, -1
            raise error
        return slot

    def _follow(self, index: int) -> None:
        """Note what came after what, and order what came after this one the last time."""
        if index == self._last[1]:
            return  # the same layer again, as a tangent after its primal
        self._followers[self._last] = index
        self._last = (self._last[1], index)
        expected = self._followers.get(self._last)
        if expected is None or any(slot.wanted == expected for slot in self._slots):
            return
        self._order(next(slot for slot in self._slots if slot.wanted != index), expected)

    def _order(self, slot: _Slot, index: int) -> None:
        slot.ready.wait()  # the thread may still be writing into it
        slot.error = None
        slot.wanted = index
        slot.ready.clear()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._read_ahead, name="fs-fwdllm base", daemon=True)
            self._thread.start()
        self._wishes.put(slot)

    def _read_ahead(self) -> None:
        while True:
            slot = self._wishes.get()
            try:
                layer = self._layers[slot.wanted]
                for name, entry in layer.entries.items():
                    start = layer.places[name]
                    self.file(entry.file).read_into(slot.memory[start : start + entry.bytes], entry.offset)
                    self.bytes_read += entry.bytes
            except ModelError as error:
                slot.error = error
            except Exception as error:  # nobody would ever be told otherwise
                slot.error = ModelError(f"the base cannot be read ({type(error).__name__}: {error})")
            finally:
                slot.ready.set()


class Piece(NamedTuple):
    """Rows ``first`` to ``last`` of a matrix, which are read together."""

    layer: int
    first: int
    last: int


@dataclass(frozen=True)
class StreamedLayer:
    """A layer of a reader, as its module holds it. A copy of the module shares it.

    Attributes:
        pieces: most layers are one; a vocabulary's are many.
        entries: where its tensors lie.
    """

    reader: Reader
    pieces: tuple[Piece, ...]
    entries: tuple[Entry, ...]

    def held(self) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
        """``(first, last, tensors)`` of each piece in turn, which last until the next is asked for."""
        for layer, first, last in self.pieces:
            with self.reader.lent(layer) as tensors:
                yield first, last, tensors

    def __deepcopy__(self, memo: Any) -> StreamedLayer:
        return self


def _let_large_blocks_go() -> None:
    """Have the C library map large blocks on their own, so that the system has them back when they are freed.

    It otherwise raises the size from which it does so to the largest block it has seen, and keeps the holes between
    activations of different sizes: a tenth of the peak. It also gives threads heaps of their own, of which passes that
    go side by side would each keep one. Other C libraries have no such call, and need none.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
            library.mallopt(_HEAPS, 1)


class _File:
    """An open file whose size and time of change must stay what they were."""

    def __init__(self, path: Path, at: Path | None = None) -> None:
        self.path = path
        try:
            self.descriptor = os.open(at or path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._state = self._now()
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error
        self._lock = threading.Lock()

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns

    def read_into(self, memory: memoryview, offset: int, keep: bool = False) -> None:
        """Fill ``memory`` from ``offset`` on; ``keep`` leaves the pages in the system's cache.

        Raises:
            ModelError: the file cannot be read, ended early, or has changed since it was opened.
        """
        try:
            if self._now() != self._state:
                raise ModelError(
                    f"{self.path}: was changed while a run was reading it; put the file back, and resume the run"
                )
            done = 0
            while done < len(memory):
                count = self._read(memory[done:], offset + done)
                if not count:
                    raise ModelError(f"{self.path}: ends at byte {offset + done:,}, in the middle of a matrix")
                done += count
            if not keep and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.descriptor, offset, len(memory), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be read ({error.strerror or error})") from error

    def _read(self, memory: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.descriptor, [memory], offset)
        with self._lock:  # systems without it share one position
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            found = os.read(self.descriptor, len(memory))
        memory[: len(found)] = found
        return len(found)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@dataclass(frozen=True)
class _Layer:
    """Tensors and where in a buffer each begins."""

    entries: dict[str, Entry]
    places: dict[str, int]
    bytes: int


class _Slot:
    """A buffer that any layer fits into, and for each layer the tensors it would hold.

    Attributes:
        wanted: the layer it holds or is being filled with; -1 for none.
        ready: set unless it is being filled.
        error: why it could not be filled.
    """

    def __init__(self, layers: Sequence[_Layer], size: int) -> None:
        buffer = torch.empty(size, dtype=torch.uint8)
        self.memory = memoryview(buffer.numpy())  # type: ignore[arg-type]
        self.views = [
            {
                name: buffer[layer.places[name] : layer.places[name] + entry.bytes].view(entry.dtype).view(entry.shape)
                for name, entry in layer.entries.items()
            }
            for layer in layers
        ]
        self.wanted = -1
        self.error: ModelError | None = None
        self.ready = threading.Event()
        self.ready.set()
