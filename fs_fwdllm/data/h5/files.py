"""The data files of FedNLP and FwdLLM: ``NAME_data.h5``, read and written exactly as published.

========================  =============================================================================================
``attributes``            one JSON text: ``index_list``, ``train_index_list``, ``test_index_list``, ``task_type``;
                          for classification ``label_vocab`` (``{label: class index}``) and ``num_labels``; perhaps
                          ``label_index_list`` (a list) or ``doc_index`` (a mapping): the natural owner of each row
``X/I``, ``Y/I``          text classification: text and label of the row with index ``I``
``context_X/I``,          span extraction: context and question, first and last-plus-one character of an answer, the
``question_X/I``, ``Y/I`` question's id, and perhaps the answer as text. A question has one row per right answer;
``question_ids/I``,       reading puts these together again, and the first one is taught
``Y_answer/I``
========================  =============================================================================================

Every value is a data set of its own, so files are slow to read and write (about 20,000 values a second) and large.
Only the rows that are asked for are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fs_fwdllm.data.h5.heaps import is_within, require_sound_heaps
from fs_fwdllm.data.table import Table
from fs_fwdllm.errors import ConfigError, DataError, nearest, shown

__all__ = ["SPANS", "TEXTS", "H5Data", "import_h5py", "member_of", "opened", "read_h5_data"]

#: In one member of a row's groups: first and last character of an answer.
_MOST_NUMBERS = 2

TEXTS, SPANS = "text_classification", "span_extraction"

_GROUPS = {TEXTS: ("X", "Y"), SPANS: ("context_X", "question_X", "Y", "question_ids")}
#: What h5py raises for files that are cut off or damaged.
_H5_ERRORS = (OSError, KeyError, RuntimeError, MemoryError, ValueError, OverflowError)


@dataclass(frozen=True)
class H5Data:
    """A data file.

    Attributes:
        task_type: :data:`TEXTS` or :data:`SPANS`.
        labels: the classes in index order; empty for span extraction.
        train, test: rows of the two splits; ``owner`` is a row's natural owner, where the file names owners.
        train_rows, test_rows: ``{index in the file: row of the table}``; several answers of a question share a row.
    """

    task_type: str
    labels: list[str]
    train: Table
    test: Table
    train_rows: dict[int, int]
    test_rows: dict[int, int]


def import_h5py() -> Any:
    """The library that reads these files. Raises :class:`ConfigError` if it is not installed."""
    try:
        import h5py
    except ImportError as error:
        raise ConfigError("h5 files need the library h5py: pip install fs-fwdllm[data]") from error
    return h5py


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """``path`` opened for reading; whatever h5py raises meanwhile becomes a :class:`DataError` that names the file."""
    h5py = import_h5py()
    if not path.is_file():
        present = sorted(file.name for file in path.parent.glob("*.h5")) if path.parent.is_dir() else []
        raise DataError(
            f"{path}: does not exist; put it there (fs-fwdllm data build makes such files), or set data.root"
            f"{nearest(path.name, present)}"
        )
    try:
        require_sound_heaps(path)
        with h5py.File(path, "r") as file:
            yield file
    except _H5_ERRORS as error:
        raise DataError(f"{path}: is damaged, cut off or no h5 file ({' '.join(str(error).split())[:200]})") from error


def member_of(parent: Any, name: str, place: Any) -> Any:
    """A group or data set of a file, which must hold it itself: a link into another file, or data that lie outside,
    would let a data file read whatever this process may.

    Raises:
        DataError: it lies elsewhere, or says that it is longer than the file.
    """
    h5py = import_h5py()
    held = parent[name]
    outside = held.file.filename != parent.file.filename
    if isinstance(held, h5py.Dataset):
        outside = outside or bool(held.external) or held.is_virtual
    if outside:
        raise DataError(f"{place}: {name!r} lies outside the file; a data file must hold its rows itself")
    if isinstance(held, h5py.Dataset) and not is_within(held):
        raise DataError(f"{place}: {name!r} is said to be longer than the file; it is damaged or cut off")
    return held


def read_h5_data(path: Path) -> H5Data:
    """Read a data file.

    Raises:
        ConfigError: h5py is not installed.
        DataError: the file is absent or damaged, lacks a key or a row, has a label outside its vocabulary, or an answer
            that is not in its context.
    """
    with opened(path) as file:
        attributes = _attributes(file, path)
        task_type = _task_type(attributes, file, path)
        train, test = _index_lists(attributes, path)
        for group in _GROUPS[task_type]:
            if group not in file:
                raise DataError(f"{path}: has no group {group!r}, which {task_type} needs{nearest(group, file)}")
        owners = _owners(attributes, [*train, *test], path)
        labels = _vocabulary(attributes, path) if task_type == TEXTS else []
        read = _read_texts if task_type == TEXTS else _read_spans
        tables = [read(file, path, indices, owners, labels) for indices in (train, test)]
    (train_table, train_rows), (test_table, test_rows) = tables
    return H5Data(task_type, labels, train_table, test_table, train_rows, test_rows)


def _attributes(file: Any, path: Path) -> dict[str, Any]:
    if "attributes" not in file:
        raise DataError(f"{path}: has no 'attributes', so it is no data file of FedNLP; it has {sorted(file)[:10]}")
    try:
        attributes = json.loads(member_of(file, "attributes", path)[()])
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: 'attributes' is not JSON: {error}") from error
    if not isinstance(attributes, dict):
        raise DataError(f"{path}: 'attributes' must be an object, but is a {type(attributes).__name__}")
    return attributes


def _task_type(attributes: dict[str, Any], file: Any, path: Path) -> str:
    found = attributes.get("task_type", SPANS if "context_X" in file else TEXTS)
    if not isinstance(found, str) or found not in _GROUPS:
        raise DataError(
            f"{path}: task_type {shown(found)} is not supported; allowed are {', '.join(_GROUPS)}"
            f"{nearest(found, _GROUPS)}"
        )
    return str(found)


def _index_lists(attributes: dict[str, Any], path: Path) -> tuple[list[int], list[int]]:
    """Indices of the training and the test rows; a file without a split of its own is cut at nine tenths, as ever."""
    everything = _indices(attributes, "index_list", path)
    if "train_index_list" not in attributes:
        cut = int(0.9 * len(everything))
        return everything[:cut], everything[cut:]
    return _indices(attributes, "train_index_list", path), _indices(attributes, "test_index_list", path)


def _indices(attributes: dict[str, Any], name: str, path: Path) -> list[int]:
    values = attributes.get(name)
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise DataError(f"{path}: attributes must have {name!r}, a list of indices{nearest(name, attributes)}")
    return values


def _vocabulary(attributes: dict[str, Any], path: Path) -> list[str]:
    vocabulary = attributes.get("label_vocab")
    if not isinstance(vocabulary, dict) or sorted(map(str, vocabulary.values())) != sorted(
        map(str, range(len(vocabulary)))
    ):
        raise DataError(f"{path}: attributes must have 'label_vocab', which numbers the labels from 0")
    labels = sorted(vocabulary, key=lambda label: int(vocabulary[label]))
    if attributes.get("num_labels", len(labels)) != len(labels):
        raise DataError(f"{path}: num_labels is {attributes['num_labels']!r}, but label_vocab has {len(labels)} labels")
    return [str(label).strip() for label in labels]


def _owners(attributes: dict[str, Any], indices: Sequence[int], path: Path) -> dict[int, str]:
    """The natural owner of every row, by index; empty where the file names none."""
    listed, mapped = attributes.get("label_index_list"), attributes.get("doc_index")
    if isinstance(listed, list):
        everything = _indices(attributes, "index_list", path)
        if len(listed) != len(everything):
            raise DataError(f"{path}: label_index_list has {len(listed)} names for {len(everything)} rows")
        return dict(zip(everything, map(str, listed), strict=True))
    if not isinstance(mapped, dict):
        return {}
    missing = next((index for index in indices if str(index) not in mapped), None)
    if missing is not None:
        raise DataError(f"{path}: doc_index does not name the document of row {missing}")
    return {index: str(mapped[str(index)]) for index in indices}


def _read_texts(
    file: Any, path: Path, indices: list[int], owners: dict[int, str], labels: list[str]
) -> tuple[Table, dict[int, int]]:
    records, known = [], set(labels)
    for index in indices:
        text, label = _text(file, "X", index, path), _text(file, "Y", index, path).strip()
        if label not in known:
            raise DataError(
                f"{path}, row {index}: the label {label!r} is not in the file's label_vocab "
                f"{labels[:20]}{nearest(label, labels)}"
            )
        records.append({"text": text, "label": label, **({"owner": owners[index]} if owners else {})})
    return Table(str(path), records, indices), {index: row for row, index in enumerate(indices)}


def _read_spans(
    file: Any, path: Path, indices: list[int], owners: dict[int, str], labels: list[str]
) -> tuple[Table, dict[int, int]]:
    records: list[dict[str, Any]] = []
    numbers: list[int] = []
    row_of_question: dict[str, int] = {}
    rows: dict[int, int] = {}
    for index in indices:
        context, answer = _text(file, "context_X", index, path), None
        answer = _answer(file, index, context, path)
        name = _text(file, "question_ids", index, path)
        rows[index] = row_of_question.setdefault(name, len(records))
        if rows[index] < len(records):
            records[rows[index]]["answers"].append(answer)
            continue
        question = _text(file, "question_X", index, path)
        record = {"id": name, "context": context, "question": question, "answers": [answer]}
        records.append({**record, **({"owner": owners[index]} if owners else {})})
        numbers.append(index)
    return Table(str(path), records, numbers), rows


def _answer(file: Any, index: int, context: str, path: Path) -> dict[str, Any]:
    span = _value(file, "Y", index, path)
    whole = getattr(span, "shape", None) == (2,) and 0 <= int(span[0]) < int(span[1]) <= len(context)
    if not whole:
        raise DataError(
            f"{path}, row {index}: the answer's characters {span} are not within a context of {len(context)}"
        )
    return {"text": context[int(span[0]) : int(span[1])], "answer_start": int(span[0])}


def _text(file: Any, group: str, index: int, path: Path) -> str:
    value = _value(file, group, index, path)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: {group}/{index} is not UTF-8 text ({error.reason})") from error
    return str(value)


def _value(file: Any, group: str, index: int, path: Path) -> Any:
    held = member_of(file, group, path)
    if str(index) not in held:
        raise DataError(f"{path}: has no {group}/{index}, though its lists name row {index} ({len(held)} rows)")
    value = member_of(held, str(index), path)
    if value.size > _MOST_NUMBERS:
        raise DataError(f"{path}: {group}/{index} is one text, or the two ends of an answer, but holds {value.shape}")
    return value[()]
