"""From a file to rows: JSON, JSON lines, and values with a separator, by the file's ending.

Nothing is repaired: a line that does not follow its format is an error that names the file and the line. JSON files
hold a list of objects, or SQuAD's document, which has one row per question; JSON lines hold one object per line, blank
lines aside; either is read under the other's name. CSV follows RFC 4180 (quotes double inside quotes); its separator is
the one of ``, ; TAB |`` that divides the first rows into the same number of columns, more than one, and the most if
several do. TSV has no quoting at all, as GLUE's files have it. Both carry their field names in the first line unless
``columns`` gives them; white space around a name is not part of it. A ``.txt`` file is whichever of these it looks
like.

Text is UTF-8, with or without a byte order mark, or UTF-16 with one; ``encoding`` names another.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fs_fwdllm.data.squad import is_squad_document, squad_rows
from fs_fwdllm.data.table import Table
from fs_fwdllm.errors import ConfigError, DataError, nearest, shown

__all__ = ["FILE_ENDINGS", "how_to_convert", "read_table", "read_text"]

csv.field_size_limit(2**31 - 1)  # of its own accord the module takes a text of 131,073 characters for an error

_SEPARATORS = (",", ";", "\t", "|")
#: Rows that decide which separator a file has.
_ROWS_LOOKED_AT = 50
_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_CONVERTED = ".to_json('rows.jsonl', orient='records', lines=True)"
_CONVERSIONS = {
    ".parquet": f"pandas.read_parquet(FILE){_CONVERTED}",
    ".feather": f"pandas.read_feather(FILE){_CONVERTED}",
    ".arrow": "datasets.Dataset.from_file(FILE).to_json('rows.jsonl')",
    ".xlsx": f"pandas.read_excel(FILE){_CONVERTED}",
    ".xls": f"pandas.read_excel(FILE){_CONVERTED}",
    ".gz": "gunzip FILE",
    ".bz2": "bunzip2 FILE",
    ".xz": "unxz FILE",
    ".zst": "unzstd FILE",
    ".zip": "unzip FILE",
}


def how_to_convert(name: str) -> str:
    """How a file of a known kind that is not read becomes one that is; empty for other names."""
    ending = Path(name).suffix
    way = _CONVERSIONS.get(ending.lower())
    return "" if way is None else f"{ending} files are not read; convert it first: {way.replace('FILE', shown(name))}"


def read_table(path: Path, columns: Sequence[str] = (), encoding: str = "") -> Table:
    """Read the rows of ``path``.

    Args:
        columns: field names of a CSV or TSV file without a header line; without effect on JSON.
        encoding: of the text, by Python's name; empty is UTF-8.

    Raises:
        ConfigError: the ending names no known format, or there is no such encoding.
        DataError: the file is missing, not text in its encoding, malformed, or has no rows.
    """
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        hint = how_to_convert(path.name) or f"its ending must be one of {', '.join(FILE_ENDINGS)}"
        raise ConfigError(f"{path}: {hint}{nearest(path, FILE_ENDINGS)}")
    records = list(parse(read_text(path, encoding), path, columns))
    if not records:
        raise DataError(f"{path}: has no rows")
    return Table(str(path), records, list(range(1, len(records) + 1)))


def read_text(path: Path, encoding: str = "") -> str:
    """The text of a file, without a byte order mark; raises as :func:`read_table`."""
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {_why_unreadable(path, error)}") from error
    marked = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    chosen = encoding or ("utf-16" if marked else "utf-8-sig")
    try:
        text = raw.decode(chosen)
    except LookupError as error:
        raise ConfigError(f"fwdllm.data.encoding: {encoding!r} is no encoding; common are cp1252, latin-1") from error
    except UnicodeError as error:
        line = raw[: getattr(error, "start", 0)].count(b"\n") + 1
        name = encoding or "UTF-8"
        raise DataError(
            f"{path}:{line}: is not {name} text ({getattr(error, 'reason', error)}); save the file as UTF-8, or name "
            "its encoding with fwdllm.data.encoding (often cp1252 or latin-1)"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{path}:{line}: holds a NUL character; if it is UTF-16, set fwdllm.data.encoding: utf-16-le")
    return text.removeprefix("\ufeff")


def _why_unreadable(path: Path, error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return f"is no file's name ({error})"
    if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
        return f"the folder {path.parent} does not exist; put the file there, or set data.root"
    if not isinstance(error, FileNotFoundError):
        return f"cannot be read ({error.strerror})"
    present = sorted(file.name for file in path.parent.iterdir() if file.is_file())
    return f"does not exist; put it there, or set data.root and data.type{nearest(path.name, present)}"


def _parse_json(text: str, path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):  # JSON lines under another name
            yield from _parse_lines(text, path)
            return
        raise DataError(f"{path}:{error.lineno}: is not JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON: {error}") from error
    if is_squad_document(content):
        rows: Iterable[Any] = squad_rows(content, str(path))
    elif isinstance(content, list):
        rows = content
    else:
        held = f" with {', '.join(map(repr, list(content)[:5]))}" if isinstance(content, dict) else ""
        raise DataError(
            f"{path}: must hold a list of objects, but holds a {type(content).__name__}{held}; write a list of rows, "
            "or one object a line (pandas: to_json(orient='records'))"
        )
    suspicious = _HALF_CHARACTER.search(text) is not None
    for number, record in enumerate(rows, start=1):
        yield _as_object(record, f"{path}, row {number}", suspicious)


def _parse_jsonl(text: str, path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    if _LIST_OF_OBJECTS.match(text):  # JSON under another name
        return _parse_json(text, path, columns)
    return _parse_lines(text, path)


def _parse_lines(text: str, path: Path) -> Iterator[dict[str, Any]]:
    # Not splitlines(): JSON strings may hold the other characters Unicode counts as line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: is not JSON: {error}") from error
        yield _as_object(record, f"{path}:{number}", _HALF_CHARACTER.search(line) is not None)


def _as_object(record: Any, place: str, suspicious: bool) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{place}: must be an object with named fields, but is a {type(record).__name__}")
    if suspicious:
        for field, value in record.items():
            _refuse_half_characters(field, value, place)
    return record


def _refuse_half_characters(field: str, value: Any, place: str) -> None:
    """JSON may write half of a character (a lone surrogate), which no tokenizer takes and no file holds."""
    try:
        json.dumps([field, value], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise DataError(
            f"{place}: field {field!a} holds half a character ({half}, a lone surrogate); write the whole character, "
            "or leave it out"
        ) from error


def _parse_csv(text: str, path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    return _records(_split_csv(text, path, _separator(text, len(columns))), path, columns)


def _split_csv(text: str, path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    try:
        for values in reader:
            yield reader.line_num, values
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: is not CSV: {error}") from error


def _separator(text: str, columns: int) -> str:
    """The separator by which the first rows have the same number of columns, the one they should have or the most."""
    widths = {separator: _width(text, separator) for separator in _SEPARATORS}
    if columns:
        return next((separator for separator, width in widths.items() if width == columns), ",")
    header = text.split("\n", 1)[0]
    by_header = {separator: header.count(separator) for separator in _SEPARATORS}
    found = widths if max(widths.values()) > 1 else by_header
    return max(found, key=found.__getitem__)


def _width(text: str, separator: str) -> int:
    """How many columns the first rows have; 0 where they differ."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    try:
        found = {len(values) for values in islice(reader, _ROWS_LOOKED_AT) if values}
    except csv.Error:
        return 0
    return found.pop() if len(found) == 1 else 0


def _parse_tsv(text: str, path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    numbered = enumerate((line.split("\t") if line else [] for line in lines), start=1)
    return _records(numbered, path, columns)


def _parse_txt(text: str, path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    is_json = text.lstrip()[:1] in ("{", "[")
    return (_parse_json if is_json else _parse_csv)(text, path, columns)


def _records(numbered: Iterable[tuple[int, list[str]]], path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Name the values of each row; ``numbered`` yields line numbers and values, a blank line has no values."""
    fields = list(columns)
    for number, values in numbered:
        if not values:
            continue
        if not fields:
            fields = [name.strip() for name in values]
            if len(set(fields)) < len(fields):
                raise DataError(f"{path}:{number}: two columns share a name in the header {fields}")
            continue
        if len(values) != len(fields):
            raise DataError(
                f"{path}:{number}: has {len(values)} values for the {len(fields)} columns {fields}; a text that holds "
                "the separator needs quotes around it, a file without a header line needs fwdllm.data.columns"
            )
        yield dict(zip(fields, values, strict=True))


_PARSERS: dict[str, Callable[[str, Path, Sequence[str]], Iterator[dict[str, Any]]]] = {
    ".csv": _parse_csv,
    ".json": _parse_json,
    ".jsonl": _parse_jsonl,
    ".ndjson": _parse_jsonl,
    ".tsv": _parse_tsv,
    ".txt": _parse_txt,
}

#: The endings :func:`read_table` knows.
FILE_ENDINGS = tuple(sorted(_PARSERS))
