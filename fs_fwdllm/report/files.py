"""Writing files so that a reader never meets half of one, and a full disk is an error that says what to do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fs_fwdllm.errors import CheckpointError

__all__ = ["disk_errors_named", "write_text_atomically"]


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block into a :class:`CheckpointError` that names ``path`` and the remedy."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or error}); make room or permission, then continue from the "
            f"last checkpoint with 'fs-fwdllm resume'"
        ) from error


def write_text_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8): a reader sees the old file or the whole new one, also after a power cut.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with disk_errors_named(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
