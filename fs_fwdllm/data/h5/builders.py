"""From the original files of data sets to FedNLP's data files and partitions.

A :class:`Recipe` says how a data set's own files are laid out: which columns they have, what the text is, what the
label. Nothing is cleaned: what a model reads is the same whether a run reads the original file or the h5 file. (The
published loader removes the backslashes of AG News, which stand for line ends, and so joins words.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fs_fwdllm.core.seeding import seeded_permutation
from fs_fwdllm.data.files import read_table
from fs_fwdllm.data.h5.files import SPANS, H5Data, read_h5_data
from fs_fwdllm.data.h5.partition_files import Partition
from fs_fwdllm.data.h5.partitioning import deal_natural, deal_uniform, label_skew, method_name, quantity_skew
from fs_fwdllm.data.h5.writing import write_spans, write_texts
from fs_fwdllm.data.table import Table, category_codes
from fs_fwdllm.errors import ConfigError, DataError

__all__ = ["RECIPES", "Recipe", "build", "make_partition"]


@dataclass(frozen=True)
class Recipe:
    """How a data set's files are laid out.

    Attributes:
        columns: of a CSV or TSV file without a header line.
        text: field of the text; several are joined by ``+``. Empty for span extraction.
        label: field of the label.
        natural: field of the natural owner, if there is one.
        labels: the classes in index order; empty takes the sorted labels.
    """

    columns: tuple[str, ...] = ()
    text: str = "text"
    label: str = "label"
    natural: str = ""
    labels: tuple[str, ...] = ()


_ZHANG_YAHOO = ("class", "question_title", "question_content", "best_answer")

#: The data sets that are known by name. ``table`` is any file with a header line.
RECIPES: dict[str, Recipe] = {
    "20news": Recipe(),
    "agnews": Recipe(("class", "title", "description"), "description", "class"),
    "squad": Recipe(text=""),
    "sst2": Recipe(text="sentence"),
    "table": Recipe(),
    "yahoo": Recipe(_ZHANG_YAHOO, "question_title+question_content+best_answer", "class"),
    "yelp": Recipe(("class", "text"), "text", "class"),
}


def build(recipe: Recipe, output: Path, train: Path, test: Path | None, test_share: float, seed: int) -> H5Data:
    """Write the data file of a data set and read it back.

    Args:
        test: file of the test split; without one ``test_share`` of the rows of ``train`` are drawn for it.

    Raises:
        ConfigError: the share is not between 0 and 1.
        DataError: a file is missing or malformed, or a row lacks what the recipe names.
    """
    columns = tuple(recipe.columns) if train.suffix.lower() in (".csv", ".tsv") else ()
    table = read_table(train, columns)
    tables = (table, read_table(test, columns)) if test is not None else _draw_test(table, test_share, seed)
    if not recipe.text:
        write_spans(output, *tables)
    else:
        text, label = _fields(recipe, table)
        write_texts(output, *tables, text=text, label=label, labels=recipe.labels, natural=recipe.natural)
    return read_h5_data(output)


def _fields(recipe: Recipe, table: Table) -> tuple[str, str]:
    """The fields of text and label: the recipe's, or ``text`` and ``label`` where rows have these and not those."""
    absent = not any(table.has(part) for part in recipe.text.split("+")) and not table.has(recipe.label)
    return ("text", "label") if absent and table.has("text") else (recipe.text, recipe.label)


def _draw_test(table: Table, share: float, seed: int) -> tuple[Table, Table]:
    if not 0 < share < 1:
        raise ConfigError(f"--test-share {share}: must be between 0 and 1 where there is no --test file")
    order = seeded_permutation(len(table), "built test split", seed)
    count = max(1, round(share * len(table)))
    return table.take(np.sort(order[count:])), table.take(np.sort(order[:count]))


def make_partition(
    data: H5Data, method: str, clients: int, parameter: float, seed: int, name: str = "", field: str = ""
) -> Partition:
    """Deal the rows of a data file.

    Args:
        method: one of :data:`~fs_fwdllm.data.h5.partitioning.METHODS`.
        clients: number of clients; without effect on ``natural``.
        parameter: alpha of ``niid_label``, beta of ``niid_quantity``.
        name: name in the partition file; empty takes the published one.
        field: for ``natural`` the field of a row's owner; empty takes ``owner``, what the file itself names.

    Raises:
        ConfigError: fewer rows than clients, or a parameter that is not above 0.
        DataError: the rows have no labels, or no owners.
    """
    if method in ("niid_label", "niid_quantity") and not parameter > 0:
        raise ConfigError(f"--{'alpha' if method == 'niid_label' else 'beta'} {parameter}: must be above 0")
    if method != "natural" and not 1 <= clients <= len(data.train):
        raise ConfigError(f"--clients {clients}: allowed are 1 to {len(data.train)}, the number of training rows")
    sizes = (len(data.train), len(data.test))
    if method == "natural":
        parts = deal_natural(*_codes(data, field or "owner"))
        clients = len(parts[0])
    elif method == "uniform":
        parts = tuple(deal_uniform(size, clients, seed) for size in sizes)  # type: ignore[assignment]
    elif method == "niid_quantity":
        parts = tuple(quantity_skew(size, clients, parameter, seed) for size in sizes)  # type: ignore[assignment]
    else:
        parts = _label_skew(data, clients, parameter, seed)
    parameters = {"niid_label": {"alpha": parameter}, "niid_quantity": {"beta": parameter}}.get(method, {})
    rows = (data.train_rows, data.test_rows)
    train, test = ([_indices(part, own) for part in split] for split, own in zip(parts, rows, strict=True))
    return Partition(name or method_name(method, clients, parameter), train, test, parameters)


def _label_skew(data: H5Data, clients: int, alpha: float, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if data.task_type == SPANS:
        raise DataError(f"{data.train.source}: niid_label needs labels, but the file holds {SPANS}; use natural")
    index = {label: code for code, label in enumerate(data.labels)}
    train, test = (np.array([index[str(record["label"])] for record in table.records], dtype=np.int64)
                   for table in (data.train, data.test))  # fmt: skip
    shares = np.bincount(train, minlength=len(index)) / len(train)
    if len(test) >= clients:
        return label_skew(train, clients, alpha, shares, seed), label_skew(test, clients, alpha, shares, seed)
    return label_skew(train, clients, alpha, shares, seed), deal_uniform(len(test), clients, seed)


def _codes(data: H5Data, field: str) -> tuple[np.ndarray, np.ndarray]:
    names: Sequence[str] = [name for table in (data.train, data.test) for name in table.names(field)]
    codes = category_codes(names)
    return codes[: len(data.train)], codes[len(data.train) :]


def _indices(rows: np.ndarray, row_of_index: dict[int, int]) -> np.ndarray:
    """Indices in the data file of rows of a table; all answers of a question stay together."""
    chosen = set(rows.tolist())
    return np.array([index for index, row in row_of_index.items() if row in chosen], dtype=np.int64)
