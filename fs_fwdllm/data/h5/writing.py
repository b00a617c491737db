"""Writing data files in FedNLP's layout (see :mod:`fs_fwdllm.data.h5.files`), whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fs_fwdllm.data.h5.files import SPANS, TEXTS, import_h5py
from fs_fwdllm.data.labels import label_indices
from fs_fwdllm.data.squad import gold_answers
from fs_fwdllm.data.table import Table, name_of, sorted_names
from fs_fwdllm.errors import DataError

__all__ = ["replacing", "write_spans", "write_texts"]


def write_texts(
    path: Path,
    train: Table,
    test: Table,
    *,
    text: str = "text",
    label: str = "label",
    labels: Sequence[str] = (),
    natural: str = "",
) -> list[str]:
    """Write texts with labels; training rows are numbered first, test rows after them.

    Args:
        text, label: fields; several text fields are joined by ``+``.
        labels: the classes in index order; empty takes the sorted labels of both tables.
        natural: field of the natural owner, written as ``label_index_list``.

    Returns:
        The classes in index order.

    Raises:
        DataError: a row lacks a field or has a label outside the classes, or there are fewer than two classes.
    """
    tables = [train, test]
    found = sorted_names(name for table in tables for name in table.names(label))
    vocabulary = [name_of(name) for name in labels] or found
    if len(set(vocabulary)) < max(2, len(vocabulary)):
        raise DataError(f"{train.source}: needs two different classes or more, but has {vocabulary}")
    texts = [value for table in tables for value in table.joined(text)]
    codes = [code for table in tables for code in label_indices(table, label, vocabulary)]
    attributes: dict[str, Any] = _index_attributes(len(train), len(test)) | {
        "num_labels": len(vocabulary),
        "label_vocab": {name: code for code, name in enumerate(vocabulary)},
        "task_type": TEXTS,
    }
    if natural:
        attributes["label_index_list"] = [name for table in tables for name in table.names(natural)]
    with replacing(path) as file:
        file["attributes"] = json.dumps(attributes)
        _write_group(file, "X", texts)
        _write_group(file, "Y", [vocabulary[code] for code in codes])
    return vocabulary


def write_spans(path: Path, train: Table, test: Table) -> None:
    """Write questions with their contexts, one row per right answer; each title is a document, numbered in order.

    Raises:
        DataError: a row lacks a part, or an answer is not in its context.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("context_X", "question_X", "Y", "question_ids", "Y_answer")}
    documents: dict[str, int] = {}
    doc_index: dict[str, int] = {}
    sizes = []
    for table in (train, test):
        before = len(columns["Y"])
        for record, answers in zip(table.records, gold_answers(table), strict=True):
            document = documents.setdefault(str(record.get("title", "")), len(documents))
            for answer in answers:
                doc_index[str(len(columns["Y"]))] = document
                first, text = answer["answer_start"], answer["text"].rstrip()
                parts = (record["context"], record["question"], (first, first + len(text)), record["id"], text)
                for column, value in zip(columns.values(), parts, strict=True):
                    column.append(value)
        sizes.append(len(columns["Y"]) - before)
    attributes = _index_attributes(*sizes) | {"doc_index": doc_index, "task_type": SPANS}
    with replacing(path) as file:
        file["attributes"] = json.dumps(attributes)
        for name, values in columns.items():
            _write_group(file, name, values)


@contextmanager
def replacing(path: Path, copy_from: Path | None = None) -> Iterator[Any]:
    """A new h5 file that takes the place of ``path`` when the block ends, and vanishes if the block fails.

    Args:
        copy_from: start from a copy of this file.
    """
    h5py = import_h5py()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    draft = Path(name)
    try:
        if copy_from is not None:
            draft.write_bytes(copy_from.read_bytes())
        with h5py.File(draft, "w" if copy_from is None else "a", libver="latest") as file:
            yield file
        mask = os.umask(0)
        os.umask(mask)
        draft.chmod(0o666 & ~mask)
        os.replace(draft, path)
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()


def _index_attributes(train: int, test: int) -> dict[str, Any]:
    return {
        "index_list": list(range(train + test)),
        "train_index_list": list(range(train)),
        "test_index_list": list(range(train, train + test)),
    }


def _write_group(file: Any, name: str, values: Sequence[Any]) -> None:
    group = file.create_group(name)
    for index, value in enumerate(values):
        group[str(index)] = value
