"""What the HDF5 library believes of a file, looked at before it does: heaps of texts, and how long a text is.

A heap is a row of objects that each say how long they are. In one that is damaged an object may say that it is shorter
than its own head, and the library, which walks over it in C, then reads the same place for ever: no deadline, and no
signal, reaches it there.

    ``heap = b"GCOL" + version 1 + 3 zero bytes + size (uint64) + objects``
    ``object = index (uint16) + 6 bytes + size (uint64) + data, padded to 8``; with index 0 what is free, head included

Where a text is said to be longer than the file, the library first takes as much memory (4 GiB) and then finds out.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

from fs_fwdllm.errors import DataError

__all__ = ["is_within", "require_sound_heaps"]

_SIGNATURE = b"GCOL\x01"
_HEAD_BYTES = 16
#: How a text is stored outside its heap: length (uint32), address of the heap, index.
_TEXT_BYTES = 16
#: Values that are stored once, or compressed, may be more than the file has bytes; not by any number.
_MOST_TIMES = 1000


def require_sound_heaps(path: Path) -> None:
    """Raises :class:`~fs_fwdllm.errors.DataError` if the heaps of a file cannot be walked over to their ends."""
    if path.stat().st_size < _HEAD_BYTES:
        return  # there is no heap in it, and h5py says that it is no h5 file
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(_SIGNATURE)
        while start >= 0:
            if not _is_sound(data, start):
                raise DataError(f"{path}: is damaged, cut off or no h5 file (the heap of texts at byte {start})")
            start = data.find(_SIGNATURE, start + len(_SIGNATURE))


def _is_sound(data: mmap.mmap, start: int) -> bool:
    place, end = start + _HEAD_BYTES, start + int.from_bytes(data[start + 8 : start + 16], "little")
    if end > len(data):
        return False
    while place + _HEAD_BYTES <= end:
        length = int.from_bytes(data[place + 8 : place + 16], "little")
        is_free = data[place : place + 2] == b"\0\0"
        step = length if is_free else _HEAD_BYTES + -(-length // 8) * 8
        if step < _HEAD_BYTES or place + step > end:
            return False
        place += step
    return True


def is_within(held: Any) -> bool:
    """Whether an open data set may hold as much as it says, in a file of the size that its file has."""
    handle = held.file.id.get_vfd_handle()
    file_bytes = os.fstat(handle).st_size
    if held.size is None or held.size * held.dtype.itemsize > _MOST_TIMES * file_bytes:
        return False
    offset = held.id.get_offset() if held.dtype.kind == "O" else None
    if offset is None:  # numbers, or texts that are stored otherwise than FedNLP and we do
        return True
    stored = os.pread(handle, _TEXT_BYTES * held.size, offset)
    starts = range(0, len(stored), _TEXT_BYTES)
    return all(int.from_bytes(stored[start : start + 4], "little") <= file_bytes for start in starts)
