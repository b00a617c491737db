"""Rows as they were read, each with the place it came from.

A :class:`Table` keeps the number of every row in its file, so that an error found long after reading (a label outside
the classes, a field that is absent) still names the file and the row. Values that name things (labels, categories,
natural clients) are compared as text: a label is ``"3"`` whether a CSV file, a JSON file or the configuration wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fs_fwdllm.errors import DataError, nearest

__all__ = ["Table", "category_codes", "name_of", "required", "sorted_names", "text_of"]


def name_of(value: Any) -> str:
    """The text by which a value that names something is compared: ``3``, ``3.0``, ``" 3"`` and ``"3"`` are one name."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def sorted_names(names: Iterable[str]) -> list[str]:
    """The distinct names in order: by number if all are whole numbers, else by code point."""
    distinct = sorted(set(names))
    if all(name.removeprefix("-").isdecimal() for name in distinct):
        return sorted(distinct, key=int)
    return distinct


def category_codes(names: Sequence[str]) -> np.ndarray:
    """Number the names in the order of :func:`sorted_names`; int64 ``[len(names)]``."""
    index = {name: code for code, name in enumerate(sorted_names(names))}
    return np.array([index[name] for name in names], dtype=np.int64)


def required(record: Mapping[str, Any], field: str, place: str, setting: str = "") -> Any:
    """The value of a field that the row at ``place`` must have; ``setting`` is the key that named it.

    Raises:
        DataError: it has none.
    """
    if record.get(field) is None:
        named = f" (named by {setting})" if setting else ""
        present = [name for name, value in record.items() if value is not None]
        raise DataError(
            f"{place}: has no field {field!r}{named}; it has "
            f"{', '.join(map(repr, present)) or 'none'}{nearest(field, present)}"
        )
    return record[field]


def text_of(value: Any, field: str, place: str) -> str:
    """A value as text. Raises :class:`DataError` where it is a list or an object."""
    if not isinstance(value, str | int | float):
        raise DataError(f"{place}: field {field!r} must be text, but is a {type(value).__name__}")
    return value if isinstance(value, str) else name_of(value)


@dataclass(frozen=True)
class Table:
    """Rows of one file.

    Attributes:
        source: the file's name (or a description), for messages.
        records: one mapping from field to value per row.
        numbers: the row's position in the file, from 1.
    """

    source: str
    records: list[dict[str, Any]]
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.records)

    def take(self, rows: Iterable[int]) -> Table:
        """The table of some rows, in the order given."""
        chosen = [int(row) for row in rows]
        return Table(self.source, [self.records[row] for row in chosen], [self.numbers[row] for row in chosen])

    def place(self, row: int) -> str:
        """Where row ``row`` (from 0) of this table is, for messages."""
        return f"{self.source}, row {self.numbers[row]}"

    def has(self, field: str) -> bool:
        """Whether any row has a value in ``field``."""
        return any(record.get(field) is not None for record in self.records)

    def column(self, field: str, setting: str = "") -> list[Any]:
        """The values of ``field``.

        Args:
            setting: the configuration key that named the field, for the message.

        Raises:
            DataError: a row has no value there.
        """
        return [required(record, field, self.place(row), setting) for row, record in enumerate(self.records)]

    def texts(self, field: str, setting: str = "") -> list[str]:
        """The values of ``field`` as text. Raises :class:`DataError` also where a value is a list or an object."""
        values = self.column(field, setting)
        return [text_of(value, field, self.place(row)) for row, value in enumerate(values)]

    def joined(self, field: str, setting: str = "") -> list[str]:
        """The texts of ``field``, or of the fields in ``field`` joined by ``+``, with a space between those not empty.

        Raises:
            DataError: a row has no value in the only field, or in none of several.
        """
        if "+" not in field or self.has(field):
            return self.texts(field, setting)
        parts = [part.strip() for part in field.split("+")]
        rows = [[record.get(part) for part in parts] for record in self.records]
        for row, values in enumerate(rows):
            if all(value is None for value in values):
                Table(self.source, [self.records[row]], [self.numbers[row]]).column(parts[0], setting)
        return [" ".join(str(value) for value in values if value not in (None, "")) for values in rows]

    def names(self, field: str, setting: str = "") -> list[str]:
        """The values of ``field`` as names (see :func:`name_of`). Raises :class:`DataError` also for an empty one."""
        names = [name_of(value) for value in self.texts(field, setting)]
        if "" in names:
            raise DataError(f"{self.place(names.index(''))}: field {field!r} is empty, but has to name something")
        return names
