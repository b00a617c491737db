"""From a file to rows: JSON, JSON lines, CSV and TSV, by the file's ending.

Nothing is guessed and nothing is repaired: a line that does not follow its format is an error that names the file and
the line. JSON files hold a list of objects, or SQuAD's document, which has one row per question, or JSON lines under
another name; JSON lines hold one object per line, blank lines aside. CSV follows RFC 4180 (quotes double inside
quotes); TSV has no quoting at all, as GLUE's files have it. CSV and TSV carry their field names in the first line
unless ``columns`` gives them. Text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fs_fwdllm.data.squad import is_squad_document, squad_rows
from fs_fwdllm.data.table import Table
from fs_fwdllm.errors import ConfigError, DataError, nearest

__all__ = ["FILE_ENDINGS", "read_table"]

csv.field_size_limit(2**31 - 1)  # of its own accord the module takes a text of 131,073 characters for an error


def read_table(path: Path, columns: Sequence[str] = ()) -> Table:
    """Read the rows of ``path``.

    Args:
        columns: field names of a CSV or TSV file without a header line; without effect on JSON.

    Raises:
        ConfigError: the ending names no known format.
        DataError: the file is missing, not UTF-8, malformed, or has no rows.
    """
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        raise ConfigError(f"{path}: its ending must be one of {', '.join(FILE_ENDINGS)}{nearest(path, FILE_ENDINGS)}")
    records = list(parse(_read_text(path), path, columns))
    if not records:
        raise DataError(f"{path}: has no rows")
    return Table(str(path), records, list(range(1, len(records) + 1)))


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {_why_unreadable(path, error)}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: is not UTF-8 text ({error.reason})") from error


def _why_unreadable(path: Path, error: OSError) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist; put the file there, or set data.root"
    if path.exists():
        return f"cannot be read ({error.strerror})"
    present = sorted(file.name for file in path.parent.iterdir() if file.is_file())
    return f"does not exist; put it there, or set data.root and data.type{nearest(path.name, present)}"


def _parse_json(text: str, path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):  # JSON lines under another name
            yield from _parse_jsonl(text, path, columns)
            return
        raise DataError(f"{path}:{error.lineno}: is not JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON: {error}") from error
    if is_squad_document(content):
        yield from squad_rows(content, str(path))
        return
    if not isinstance(content, list):
        raise DataError(f"{path}: must hold a list of objects, but holds a {type(content).__name__}")
    for number, record in enumerate(content, start=1):
        yield _as_object(record, f"{path}, row {number}")


def _parse_jsonl(text: str, path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    # Not splitlines(): JSON strings may hold the other characters Unicode counts as line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: is not JSON: {error}") from error
        yield _as_object(record, f"{path}:{number}")


def _as_object(record: Any, place: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{place}: must be an object with named fields, but is a {type(record).__name__}")
    return record


def _parse_csv(text: str, path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    return _records(_split_csv(text, path), path, columns)


def _split_csv(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for values in reader:
            yield reader.line_num, values
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: is not CSV: {error}") from error


def _parse_tsv(text: str, path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    numbered = enumerate((line.split("\t") if line else [] for line in lines), start=1)
    return _records(numbered, path, columns)


def _records(numbered: Iterable[tuple[int, list[str]]], path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Name the values of each row; ``numbered`` yields line numbers and values, a blank line has no values."""
    fields = list(columns)
    for number, values in numbered:
        if not values:
            continue
        if not fields:
            fields = values
            if len(set(fields)) < len(fields):
                raise DataError(f"{path}:{number}: two columns share a name in the header {fields}")
            continue
        if len(values) != len(fields):
            raise DataError(
                f"{path}:{number}: has {len(values)} values for the {len(fields)} columns {fields}"
                "; a file without a header line needs fwdllm.data.columns"
            )
        yield dict(zip(fields, values, strict=True))


_PARSERS: dict[str, Callable[[str, Path, Sequence[str]], Iterator[dict[str, Any]]]] = {
    ".csv": _parse_csv,
    ".json": _parse_json,
    ".jsonl": _parse_jsonl,
    ".tsv": _parse_tsv,
}

#: The endings :func:`read_table` knows.
FILE_ENDINGS = tuple(sorted(_PARSERS))
