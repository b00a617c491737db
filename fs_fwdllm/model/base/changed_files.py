"""Files for matrices that training has changed: what is written once is never changed, and the user's files never are.

A block of a base on the disk is trained in memory, and what it became has to go somewhere until its next turn. Each
write makes a new file with some tensors one after the other, so that whoever still reads the version before (a
checkpoint, the best round) goes on finding it.

Files of a run that can be resumed have names, in a folder of the run. All others lose theirs before anything is in
them: the system keeps such a file for as long as somebody reads it, and clears it away after a process that was killed,
too.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from fs_fwdllm.errors import CheckpointError, ModelError
from fs_fwdllm.model.base.checkpoint import Entry
from fs_fwdllm.model.base.streaming import Reader

__all__ = ["ChangedFiles", "Written"]

_SUFFIX = ".matrices"
#: Where Linux has this process's open files, those without a name, too.
_OPEN_FILES = Path("/proc/self/fd")
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Written:
    """A tensor in a file; ``checksum`` is the CRC-32 of its bytes."""

    entry: Entry
    checksum: int

    def reference(self) -> list[object]:
        """As JSON: the file's name, where it begins there, and its checksum."""
        return [self.entry.file.name, self.entry.offset, self.checksum]


class ChangedFiles:
    """Where one holder of changed matrices writes them.

    Args:
        reader: opens the files, and closes them.
        folder: for files that keep their names; made when the first is written.
        beside: for files without a name; the nearest folder above it that exists.
    """

    def __init__(self, reader: Reader, folder: Path | None, beside: Path) -> None:
        self._reader = reader
        self.folder = folder
        self.beside = beside.absolute()
        self._uses: dict[Path, int] = {}

    def write(self, tensors: Sequence[torch.Tensor]) -> list[Written]:
        """Write tensors of the CPU into one new file.

        Raises:
            ModelError: it cannot be written.
        """
        place = self.folder or next(place for place in (self.beside, *self.beside.parents) if place.is_dir())
        try:
            place.mkdir(parents=True, exist_ok=True)
            path = self._write_unnamed(place, tensors) if self.folder is None else None
            path = path or _write_new(place, tensors)
            self._reader.file(path)
            if self.folder is None:
                with suppress(OSError):  # where an open file cannot lose its name it is removed when it is let go
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise ModelError(
                f"{place}: a trained block cannot be written there ({error.strerror or error}); make room or "
                "permission, and resume the run"
            ) from error
        self._uses[path] = len(tensors)
        return _placed(path, tensors)

    def _write_unnamed(self, place: Path, tensors: Sequence[torch.Tensor]) -> Path | None:
        """Write a file that nobody else looks for. It loses its name before there is anything in it, so that a process
        that is killed leaves nothing; ``None`` where a file without a name cannot be opened again."""
        handle, name = tempfile.mkstemp(dir=place, prefix=".writing-")
        path, again = Path(name), _OPEN_FILES / str(handle)
        with os.fdopen(handle, "wb") as file:
            with suppress(OSError):  # of an open file, on some systems
                path.unlink()
            if path.exists() or not again.exists():
                path.unlink(missing_ok=True)
                return None
            _write(file, tensors)
            self._reader.file(path, again)
        return path

    def find(self, reference: Sequence[object], shape: tuple[int, ...], dtype: torch.dtype) -> Written:
        """A tensor by its :meth:`Written.reference`, in a file that kept its name.

        Raises:
            CheckpointError: it is not there, or is not what was written.
        """
        name, offset, checksum = str(reference[0]), int(str(reference[1])), int(str(reference[2]))
        assert self.folder is not None
        path = self.folder / Path(name).name
        entry = Entry(path, offset, dtype.itemsize * torch.Size(shape).numel(), dtype, shape)
        try:
            found = self._checksum(entry)
        except ModelError as error:
            raise CheckpointError(f"{error}: a trained block of the checkpoint is there") from error
        if found != checksum:
            raise CheckpointError(f"{path}: damaged; a trained block of the checkpoint is there")
        self._uses[path] = self._uses.get(path, 0) + 1
        return Written(entry, checksum)

    def let_go(self, written: Written) -> None:
        """One tensor of a file is not read any more; after the last one the file is closed."""
        path = written.entry.file
        self._uses[path] -= 1
        if not self._uses[path]:
            del self._uses[path]
            self._reader.forget(path)
            if self.folder is None:
                path.unlink(missing_ok=True)

    def keep_only(self, names: Collection[str]) -> None:
        """Remove the files of the folder that are neither among ``names`` nor in use."""
        if self.folder is not None and self.folder.is_dir():
            for path in self.folder.iterdir():
                if path not in self._uses and path.name not in names:
                    path.unlink(missing_ok=True)

    def _checksum(self, entry: Entry) -> int:
        file, found = self._reader.file(entry.file), 0
        for first in range(0, entry.bytes, _CHUNK_BYTES):
            part = bytearray(min(_CHUNK_BYTES, entry.bytes - first))
            file.read_into(memoryview(part), entry.offset + first)
            found = zlib.crc32(part, found)
        return found


def _write_new(place: Path, tensors: Sequence[torch.Tensor]) -> Path:
    handle, name = tempfile.mkstemp(dir=place, prefix=".writing-")
    staging = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            _write(file, tensors)
        path = staging.with_name(f"{staging.name.removeprefix('.writing-')}{_SUFFIX}")
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    return path


def _write(file: IO[bytes], tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        file.write(_octets(tensor))
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):  # the cache is for files that are read again and again
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _placed(path: Path, tensors: Sequence[torch.Tensor]) -> list[Written]:
    written, offset = [], 0
    for tensor in tensors:
        entry = Entry(path, offset, tensor.nbytes, tensor.dtype, tuple(tensor.shape))
        written.append(Written(entry, zlib.crc32(_octets(tensor))))
        offset += tensor.nbytes
    return written


def _octets(tensor: torch.Tensor) -> memoryview:
    octets: memoryview = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
    return octets
