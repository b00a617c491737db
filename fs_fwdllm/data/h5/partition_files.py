"""The partition files of FedNLP and FwdLLM: ``NAME_partition.h5``, who holds which rows of a data file.

One file holds several partitions, each under the name of its method::

    /METHOD/n_clients                           number of clients
    /METHOD/alpha  or  /METHOD/beta             what it was drawn with
    /METHOD/partition_data/CLIENT/train         indices of the client's training rows
    /METHOD/partition_data/CLIENT/test          indices of its test rows

Clients are numbered from 0 in the file. Test indices go on where training indices end, as they do in the data file.

Published files are not all sound: one deals training rows with replacement and takes its test rows from among the
training rows, so that what is measured has been trained on. A row that is dealt twice is therefore an error, unless the
reader says that it is known.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fs_fwdllm.data.h5.files import member_of, opened
from fs_fwdllm.data.h5.writing import replacing
from fs_fwdllm.errors import ConfigError, DataError, nearest

__all__ = ["Partition", "partition_methods", "read_partition", "write_partition"]

logger = logging.getLogger("fs_fwdllm.data")


@dataclass(frozen=True)
class Partition:
    """Who holds which rows; indices as in the data file, int64 arrays by client.

    Attributes:
        method: its name.
        parameters: ``alpha`` or ``beta``, where it has one.
    """

    method: str
    train: list[np.ndarray]
    test: list[np.ndarray]
    parameters: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.train)


def partition_methods(path: Path) -> list[str]:
    """The names of the partitions in a file. Raises :class:`DataError` if it is absent or damaged."""
    with opened(path) as file:
        return sorted(file)


def read_partition(
    path: Path, method: str, train_indices: Sequence[int], test_indices: Sequence[int], *, allow_overlap: bool = False
) -> Partition:
    """Read one partition of a data file's rows.

    Args:
        train_indices, test_indices: the data file's own split.
        allow_overlap: accept, with a warning, rows that are dealt twice or are trained on and tested on.

    Raises:
        ConfigError: the file has no such method.
        DataError: the file is absent or damaged, lacks a key, counts its clients wrongly, names an index the data file
            does not have, or deals a row twice.
    """
    with opened(path) as file:
        if not method or method not in file:
            raise ConfigError(
                f"fwdllm.data.partition_method: {method!r} is not in {path}; allowed are "
                f"{', '.join(sorted(file)) or '(none)'}{nearest(method, file)}"
            )
        held = file[method]
        place = f"{path}, {method}"
        clients = _clients(held, place)
        train, test = ([_indices(held, client, part, place) for client in clients] for part in ("train", "test"))
        parameters = {name: float(held[name][()]) for name in ("alpha", "beta") if name in held}
    partition = Partition(method, list(train), list(test), parameters)
    known = {*train_indices, *test_indices}
    for part in (partition.train, partition.test):
        _check_range(part, known, place)
    _check_overlap(partition, place, allow_overlap)
    return partition


def write_partition(path: Path, partition: Partition) -> None:
    """Add ``partition`` to a file, or put it in the place of the one of that name; the others stay."""
    with replacing(path, copy_from=path if path.exists() else None) as file:
        if partition.method in file:
            del file[partition.method]
        group = file.create_group(partition.method)
        group["n_clients"] = len(partition)
        for name, value in partition.parameters.items():
            group[name] = value
        for client, (train, test) in enumerate(zip(partition.train, partition.test, strict=True)):
            group[f"partition_data/{client}/train"] = np.asarray(train, dtype=np.int64)
            group[f"partition_data/{client}/test"] = np.asarray(test, dtype=np.int64)


def _clients(held: Any, place: str) -> list[str]:
    for name in ("n_clients", "partition_data"):
        if name not in held:
            raise DataError(f"{place}: has no {name!r}; it has {sorted(held)[:10]}{nearest(name, held)}")
    found, count = set(member_of(held, "partition_data", place)), int(member_of(held, "n_clients", place)[()])
    if found != {str(client) for client in range(count)}:
        raise DataError(f"{place}: n_clients is {count}, but partition_data has {len(found)} clients")
    return [str(client) for client in range(count)]


def _indices(held: Any, client: str, part: str, place: str) -> np.ndarray:
    group = member_of(member_of(held, "partition_data", place), client, place)
    if part not in group:
        raise DataError(f"{place}: client {client} has no {part!r}{nearest(part, group)}")
    indices = np.asarray(member_of(group, part, place)[()])
    if indices.ndim != 1 or (len(indices) and indices.dtype.kind not in "iu"):
        raise DataError(f"{place}: client {client}: {part!r} must be a list of indices, but is {indices.dtype}")
    return indices.astype(np.int64)


def _check_range(parts: list[np.ndarray], known: set[int], place: str) -> None:
    for client, part in enumerate(parts):
        strange = sorted(set(part.tolist()) - known)
        if strange:
            raise DataError(
                f"{place}: client {client} holds row {strange[0]}, but the data file has the {len(known)} rows "
                f"{min(known)} to {max(known)}; do the two files belong together?"
            )


def _check_overlap(partition: Partition, place: str, allowed: bool) -> None:
    train, test = (np.concatenate([*part, np.empty(0, np.int64)]) for part in (partition.train, partition.test))
    twice = sum(len(part) - len(np.unique(part)) for part in (train, test))
    leaked = len(np.intersect1d(train, test))
    if not twice and not leaked:
        return
    message = f"{place}: {twice} rows are dealt more than once, and {leaked} are both trained on and tested on"
    if not allowed:
        raise DataError(f"{message}; fwdllm.data.allow_overlap: true accepts this")
    logger.warning("%s", message)
