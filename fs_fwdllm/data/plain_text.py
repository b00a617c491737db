"""Text without labels: the paragraphs of a ``.txt`` file, or a field of a table's rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fs_fwdllm.data.files import read_table, read_text
from fs_fwdllm.errors import DataError

__all__ = ["read_plain_texts"]

_BLANK_LINES = re.compile(r"\n\s*\n")


def read_plain_texts(path: Path, field: str, columns: Sequence[str] = (), encoding: str = "") -> list[str]:
    """The texts of a file, in its order; empty ones are left out.

    Args:
        path: ``.txt``, whose paragraphs are divided by blank lines and whose line breaks within one are spaces; or any
            other file that :func:`~fs_fwdllm.data.files.read_table` reads.
        field: of a table's rows, or several joined by ``+``.
        columns: field names of a table without a header line.
        encoding: by Python's name; empty is UTF-8.

    Raises:
        ConfigError: the ending names no known format, or there is no such encoding.
        DataError: the file is missing, malformed, lacks the field, or holds no text.
    """
    if path.suffix.lower() == ".txt":
        texts = _BLANK_LINES.split(read_text(path, encoding))
    else:
        texts = read_table(path, columns, encoding).joined(field, "fwdllm.data.text")
    found = [" ".join(text.split()) if path.suffix.lower() == ".txt" else text for text in texts if text.strip()]
    if not found:
        raise DataError(f"{path}: holds no text")
    return found
