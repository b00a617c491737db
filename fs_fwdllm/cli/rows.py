"""Rows as a file that a user asked for, in the form its name says."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fs_fwdllm.errors import ConfigError

__all__ = ["write_rows"]

_Rows = Sequence[dict[str, Any]]


def write_rows(file: Path, rows: _Rows) -> None:
    """Write ``rows`` to ``file``: CSV, JSON lines or JSON by its ending. A reader sees all of it or nothing.

    Raises:
        ConfigError: the ending is none of these, or the folder does not exist.
        CheckpointError: the file cannot be written.
    """
    from fs_fwdllm.report.files import write_text_atomically

    form = _FORMS.get(file.suffix.lower())
    if form is None:
        raise ConfigError(f"--out {file}: the name must end in {', '.join(_FORMS)}")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--out {file}: the folder {file.absolute().parent} does not exist")
    write_text_atomically(file, form(rows))


def _as_csv(rows: _Rows) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _as_json_lines(rows: _Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _as_json(rows: _Rows) -> str:
    return json.dumps(rows, ensure_ascii=False, indent=1) + "\n"


_FORMS: dict[str, Callable[[_Rows], str]] = {".csv": _as_csv, ".jsonl": _as_json_lines, ".json": _as_json}
