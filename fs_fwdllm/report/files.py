"""Writing files so that a reader never meets half of one, and a full disk is an error that says what to do."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fs_fwdllm.errors import CheckpointError, ConfigError

__all__ = ["disk_errors_named", "require_writable", "write_text_atomically"]


#: How libraries written in Rust (safetensors, tokenizers) say what the system refused, in exceptions of their own.
_FOREIGN = re.compile(r"(?:[A-Z][^:]*: )*(.*) \(os error \d+\)")
_REMEDY = "make room or permission, then continue from the last checkpoint with 'fs-fwdllm resume'"


@contextmanager
def disk_errors_named(path: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Turn what the system refuses the block into a :class:`CheckpointError` that names ``path`` and the remedy."""
    try:
        yield
    except Exception as error:
        foreign = _FOREIGN.search(str(error))
        if not isinstance(error, OSError) and not foreign:
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or (foreign[1] if foreign else error)
        raise CheckpointError(f"{path}: cannot be written ({reason}); {remedy}") from error


def require_writable(outdir: str) -> None:
    """Check that a folder can be made at ``outdir``, or in it; nothing is made.

    Raises:
        ConfigError: a file is in the way, or this user may not write there.
    """
    place = Path(outdir or ".").absolute()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    if not there.is_dir():
        raise ConfigError(f"outdir: {str(there)!r} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"outdir: {outdir!r} cannot be made or written: no permission in {there}")


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
