"""What stands in the label field of texts: names of classes, or numbers, and what people leave in it by mistake.

An empty label (nothing, white space, JSON's ``null`` or ``NaN``) is no class. Rows that have one are counted and
refused, or left out with ``fwdllm.data.drop_empty_labels``. Classes whose names differ only by case or white space
("Billing", "billing") are two classes, but hardly ever meant so: they are named with their counts, and
``fwdllm.data.merge_labels`` makes them one, under the name that ``fwdllm.data.labels`` has, or else most rows.

With ``fwdllm.data.regression``, or ``model.num_labels: 1``, labels are numbers.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from fs_fwdllm.config.own_sections import FwdllmDataConfig
from fs_fwdllm.config.schema import Config
from fs_fwdllm.data.table import Table, name_of, sorted_names
from fs_fwdllm.errors import ConfigError, DataError, nearest

__all__ = [
    "class_names",
    "clean_labels",
    "is_empty_label",
    "label_indices",
    "label_numbers",
    "look_like_numbers",
    "similar_names",
]

#: Groups of similar names, and rows, that a message lists.
_LISTED = 5
#: So many different labels that are all numbers are hardly meant as classes.
_MANY_NUMBERS = 20
_NUMBER = re.compile(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?")


def clean_labels(tables: Sequence[Table], own: FwdllmDataConfig, numbers: bool) -> tuple[list[Table], list[str]]:
    """The rows that have a label, similar names merged where that is wished, and what a user should know of it.

    Args:
        tables: the training rows, perhaps followed by test rows.
        numbers: whether labels are numbers.

    Raises:
        DataError: a label is empty, and ``fwdllm.data.drop_empty_labels`` does not say to leave it out.
    """
    remarks: list[str] = []
    kept = [_with_labels(table, own.label, own.drop_empty_labels, remarks) for table in tables]
    if not numbers:
        listed = [name_of(label) for label in own.labels]
        names = kept[0].names(own.label)
        groups = similar_names([*names, *listed])
        counts = Counter(names)
        if own.merge_labels:
            kept = [_merged(table, own.label, _canonical(groups, counts, listed)) for table in kept]
        remarks += _told(groups, counts, own.merge_labels)
        remarks += _numbers_warning(counts)
    return kept, remarks


def is_empty_label(value: Any) -> bool:
    """Whether a value names nothing."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or not name_of(value)


def similar_names(names: Sequence[str]) -> list[list[str]]:
    """Groups of two and more names that differ only by case and white space, each in alphabetical order."""
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(_normal_form(name), set()).add(name)
    return [sorted(group) for _, group in sorted(groups.items()) if len(group) > 1]


def class_names(table: Table, given: Sequence[str], config: Config) -> list[str]:
    """The classes in index order: those that the configuration lists, or the file, or else all there are, sorted.

    Args:
        given: those of the file; empty if it lists none.

    Raises:
        ConfigError: the configuration lists a class twice.
        DataError: there are fewer than two, or more than ``model.num_labels``.
    """
    named = [name_of(label) for label in config.fwdllm.data.labels]
    if len(set(named)) < len(named):
        raise ConfigError(f"fwdllm.data.labels: {named} names a class twice")
    labels = named or list(given) or sorted_names(table.names(config.fwdllm.data.label, "fwdllm.data.label"))
    if len(labels) < 2:
        raise DataError(f"{table.source}: classification needs two classes or more, but there is only {labels}")
    allowed = config.model.num_labels
    if allowed and len(labels) > allowed:
        raise DataError(
            f"{table.source}: has {len(labels)} classes ({', '.join(labels[:20])}), but model.num_labels is {allowed}"
        )
    return labels


def label_indices(table: Table, field: str, allowed: Sequence[str]) -> list[int]:
    """The class index of every row.

    Raises:
        DataError: a row has no label, or one that is not allowed.
    """
    index = {name: number for number, name in enumerate(allowed)}
    names = table.names(field, "fwdllm.data.label")
    for row, name in enumerate(names):
        if name not in index:
            raise DataError(
                f"{table.place(row)}: the label {name!r} is none of the {len(index)} classes "
                f"{', '.join(map(repr, allowed))} (fwdllm.data.labels sets them){nearest(name, allowed)}"
            )
    return [index[name] for name in names]


def label_numbers(table: Table, field: str) -> list[float]:
    """The number every row has for a label.

    Raises:
        DataError: a row has no number there, or one that is not finite.
    """
    numbers = []
    for row, text in enumerate(table.names(field, "fwdllm.data.label")):
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise DataError(
                f"{table.place(row)}: the label {text!r} is no number, as regression needs; for classes leave "
                "fwdllm.data.regression false and model.num_labels at 0"
            )
        numbers.append(number)
    return numbers


def _with_labels(table: Table, field: str, drop: bool, remarks: list[str]) -> Table:
    """The rows whose label is not empty."""
    if not table.has(field):
        table.column(field, "fwdllm.data.label")
    empty = [row for row, record in enumerate(table.records) if is_empty_label(record.get(field))]
    if not empty:
        return table
    if not drop or len(empty) == len(table):
        numbers = ", ".join(str(table.numbers[row]) for row in empty[:_LISTED])
        more = ", ..." if len(empty) > _LISTED else ""
        raise DataError(
            f"{table.place(empty[0])}: field {field!r} is empty, but has to name something (fwdllm.data.label); so "
            f"it is in {len(empty)} of {len(table)} rows ({numbers}{more}); fwdllm.data.drop_empty_labels: true leaves "
            "them out"
        )
    remarks.append(f"{table.source}: {len(empty)} of {len(table)} rows are left out: their field {field!r} is empty")
    left_out = set(empty)
    return table.take(row for row in range(len(table)) if row not in left_out)


def _normal_form(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _canonical(groups: Sequence[Sequence[str]], counts: Counter[str], listed: Sequence[str]) -> dict[str, str]:
    """``{normal form: the name that is kept}`` of every group, and of every class that is listed."""
    kept = {_normal_form(name): name for name in listed}
    for group in groups:
        kept.setdefault(_normal_form(group[0]), max(group, key=lambda name: counts[name]))
    return kept


def _merged(table: Table, field: str, canonical: dict[str, str]) -> Table:
    names = [name_of(record[field]) for record in table.records]
    kept = [canonical.get(_normal_form(name), name) for name in names]
    records = [{**record, field: name} for record, name in zip(table.records, kept, strict=True)]
    return Table(table.source, records, table.numbers)


def look_like_numbers(names: Collection[str]) -> bool:
    """Whether labels are hardly meant as classes: many, all numbers, and not all whole."""
    are_numbers = all(_NUMBER.fullmatch(name) for name in names) and any("." in name for name in names)
    return len(names) >= _MANY_NUMBERS and are_numbers


def _numbers_warning(counts: Counter[str]) -> list[str]:
    if not look_like_numbers(counts):
        return []
    some = ", ".join(list(counts)[:3])
    return [
        f"warning: the labels look like numbers ({some}, ...) and are taken for {len(counts)} classes; "
        "fwdllm.data.regression: true learns them as numbers"
    ]


def _told(groups: Sequence[Sequence[str]], counts: Counter[str], merged: bool) -> list[str]:
    spelt = [" and ".join(f"{name!r} ({counts[name]} rows)" for name in group) for group in groups[:_LISTED]]
    more = f"; and {len(groups) - _LISTED} more" if len(groups) > _LISTED else ""
    if not groups:
        return []
    if merged:
        return [f"taken for one class each (fwdllm.data.merge_labels): {'; '.join(spelt)}{more}"]
    return [
        f"warning: classes that differ only by case or white space: {'; '.join(spelt)}{more}; "
        "fwdllm.data.merge_labels: true makes them one"
    ]
