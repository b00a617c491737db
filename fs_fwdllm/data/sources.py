"""What a configuration's data consists of before anything is tokenised: rows, perhaps a test split, perhaps clients.

Most files are rows and nothing else. FedNLP's h5 files bring a test split and the order of their classes, and beside
them lies a partition file that says who holds which rows. Here both kinds become one :class:`Source`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fs_fwdllm.config.schema import Config
from fs_fwdllm.data.conversations import as_conversations
from fs_fwdllm.data.h5.files import SPANS, TEXTS, H5Data, read_h5_data
from fs_fwdllm.data.h5.partition_files import read_partition
from fs_fwdllm.data.readers import is_h5, parse_data_type, read_test_table, read_train_table
from fs_fwdllm.data.table import Table
from fs_fwdllm.errors import ConfigError

__all__ = ["Source", "read_source"]


@dataclass(frozen=True)
class Source:
    """Rows as they were read.

    Attributes:
        train: the rows that are dealt to clients.
        test: the rows of a test split of its own; ``None`` without one.
        labels: the classes in the order the file gives them; empty where it gives none.
        parts: with a partition, rows of ``train`` and of ``test`` per client.
    """

    train: Table
    test: Table | None = None
    labels: list[str] = field(default_factory=list)
    parts: tuple[list[np.ndarray], list[np.ndarray]] | None = None


def read_source(config: Config) -> Source:
    """Read what ``data.type`` names, with its test split and its partition.

    Raises:
        ConfigError: a setting is unknown, or does not go with the file.
        DataError: a file is missing or malformed.
    """
    own = config.fwdllm.data
    _check(config)
    if not is_h5(config):
        return Source(read_train_table(config), read_test_table(config) if own.test_file else None)
    name, task = parse_data_type(config.data.type)
    data = read_h5_data(Path(config.data.root) / name)
    wanted = TEXTS if task == "classification" else SPANS
    if data.task_type != wanted:
        form = "@text" if data.task_type == TEXTS else "@qa or @llm"
        raise ConfigError(f"data.type {config.data.type!r}: the file holds {data.task_type}, which is read as {form}")
    tables = [as_conversations(table) if task == "causal_lm" else table for table in (data.train, data.test)]
    return Source(tables[0], None if own.held_out_clients else tables[1], data.labels, _parts(data, config))


def _check(config: Config) -> None:
    own = config.fwdllm.data
    if is_h5(config) and own.test_file:
        raise ConfigError(f"fwdllm.data.test_file {own.test_file!r}: an h5 file has a test split of its own")
    if own.partition and not is_h5(config):
        raise ConfigError(
            f"fwdllm.data.partition {own.partition!r}: deals the rows of an h5 file, but data.type is "
            f"{config.data.type!r}"
        )
    if own.partition and config.data.splitter:
        raise ConfigError(
            f"data.splitter {config.data.splitter!r}: the clients come from fwdllm.data.partition; leave it empty"
        )
    if own.held_out_clients and (own.test_file or own.partition):
        key = "test_file" if own.test_file else "partition"
        raise ConfigError(f"fwdllm.data.held_out_clients {own.held_out_clients}: does not go with fwdllm.data.{key}")


def _parts(data: H5Data, config: Config) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
    own = config.fwdllm.data
    if not own.partition:
        return None
    partition = read_partition(
        Path(config.data.root) / own.partition,
        own.partition_method,
        list(data.train_rows),
        list(data.test_rows),
        allow_overlap=own.allow_overlap,
    )
    if config.federate.client_num not in (0, len(partition)):
        raise ConfigError(
            f"federate.client_num: is {config.federate.client_num}, but the partition {partition.method!r} has "
            f"{len(partition)} clients; allowed are 0 and {len(partition)}"
        )
    return (
        [_rows(part, data.train_rows) for part in partition.train],
        [_rows(part, data.test_rows) for part in partition.test],
    )


def _rows(indices: Iterable[int], row_of_index: dict[int, int]) -> np.ndarray:
    """Rows of the table for indices of the file, each once."""
    known = [row_of_index[index] for index in map(int, indices) if index in row_of_index]
    return np.unique(np.array(known, dtype=np.int64))
