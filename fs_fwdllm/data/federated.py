"""From a configuration to what every client holds: read, draw, tokenise, divide over clients, divide in splits.

The order matters. Rows are divided over the clients *first*, and each client's rows then in train, validation and test
by ``data.splits``, so that a client is evaluated on the distribution it trains on. FederatedScope divides in train,
validation and test first and each of the three over the clients independently, so that under ``meta`` and ``lda`` the
categories a client is tested on are unrelated to those it saw; here they agree, and the two hosts' numbers per client
are not comparable where they are handed data by different loaders. The server's validation and test splits are the
unions over the clients.

With ``fwdllm.data.stratify`` the three splits are drawn class by class over all clients, so that the smallest class is
in each of them.

Three things replace the test share. With ``fwdllm.data.test_file``, or a data file that has a test split, the server's
test split is that, and clients divide their rows in train and validation in the proportion of the first two of
``data.splits``. With ``fwdllm.data.partition`` a file says who holds which training and which test rows. With
``fwdllm.data.held_out_clients`` a seeded share of the clients is never trained on: all their rows are the server's test
split, and a run says how well it does on people it has never met.

``fwdllm.data.centralised`` hands what all clients hold to a single one, after all of that: the reference that a
federation is measured against sees the same training and test rows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from fs_fwdllm.config.schema import Config
from fs_fwdllm.core.seeding import seeded_permutation
from fs_fwdllm.data.conversations import form_of
from fs_fwdllm.data.labels import class_names, clean_labels
from fs_fwdllm.data.readers import CLIENT_FIELD, PRESPLIT, data_task, is_h5, parse_data_type
from fs_fwdllm.data.sources import Source, read_source
from fs_fwdllm.data.splitters import divide_shares, divide_stratified, split_iid, split_lda, split_meta, split_natural
from fs_fwdllm.data.squad import has_unanswerable
from fs_fwdllm.data.table import Table, category_codes
from fs_fwdllm.data.templates import PromptTemplate, choose_template
from fs_fwdllm.data.tokenising import Tokeniser
from fs_fwdllm.data.types import ClientData, Example, FederatedData
from fs_fwdllm.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_federated_data"]

logger = logging.getLogger("fs_fwdllm.data")

_SPLITTERS = ("iid", "lda", "meta", "natural")
_DEFAULT_ALPHA = 0.5
#: Tasks whose rows have a label field.
_LABELLED = ("classification", "label_words", "regression")

_Parts = list[np.ndarray]


def load_federated_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> FederatedData:
    """Read, tokenise and divide the data a configuration names; a pure function of both and of the files.

    Clients are numbered from 1. ``len(result.clients)`` is the number of clients also where ``federate.client_num`` is
    0 (``data.splitter: natural``, or a partition file). Some clients may be empty, or lack a split.

    Raises:
        ConfigError: a setting is unknown, or does not fit the data.
        DataError: a file is missing or malformed, a row lacks a field or has a label outside the classes, nothing is
            left after tokenising, or ``lda`` or ``meta`` find no categories.
    """
    task = data_task(config)
    _check_splitter(config)
    source = read_source(config)
    remarks: list[str] = []
    if task in _LABELLED and not is_h5(config):
        source, remarks = _clean(source, config)
    labels = class_names(source.train, source.labels, config) if task in ("classification", "label_words") else []
    template = _template(source, config, tokenizer) if task == "causal_lm" else None
    unanswerable = task == "question_answering" and _some_unanswerable(source, config)
    tokenise = Tokeniser(config, tokenizer, task, labels, template, unanswerable)
    pool = _Pool.of(source.train, _subsample(len(source.train), config), tokenise)
    given = None if source.test is None else _Pool.of(source.test, np.arange(len(source.test)), tokenise)
    parts = pool.positions(source.parts[0]) if source.parts else _split(pool.table, config)
    shares = _divided(pool, parts, _shares(config, given is not None), config)
    held_out = _held_out(len(parts), config)
    for client in held_out:
        shares[client] = (parts[client][:0], parts[client][:0], parts[client])
    clients = {
        number: ClientData(pool.taught(train), pool.examples(val), pool.examples(test))
        for number, (train, val, test) in enumerate(shares, start=1)
    }
    tested = [split[2] for client, split in enumerate(shares) if not held_out or client in held_out]
    test = [pool.groups[row] for row in chain.from_iterable(tested)] if given is None else given.groups
    if given is not None and source.parts:
        own = given.positions(source.parts[1])
        test = [given.groups[row] for row in chain.from_iterable(own)]
        for number, rows in enumerate(own, start=1):
            clients[number].test = given.examples(rows)
    return FederatedData(
        task=task,
        clients={1: _together(clients.values())} if config.fwdllm.data.centralised else clients,
        val=list(chain.from_iterable(client.val for client in clients.values())),
        test=list(chain.from_iterable(_draw(test, config.fwdllm.data.max_test_samples, config.seed))),
        label_names=labels,
        label_tokens=tokenise.label_tokens,
        remarks=remarks,
        template=template,
        unanswerable=unanswerable,
    )


@dataclass(frozen=True)
class _Pool:
    """Tokenised rows of a table.

    Attributes:
        groups: the examples of each row; rows without any are left out.
        rows: for each group the row it was in the table as it was read.
        table: the rows that are left.
    """

    groups: list[list[Example]]
    rows: list[int]
    table: Table

    @classmethod
    def of(cls, table: Table, rows: Sequence[int] | np.ndarray, tokenise: Tokeniser) -> _Pool:
        """Tokenise ``rows`` of ``table``."""
        chosen = table.take(rows)
        groups, kept = tokenise(chosen)
        return cls(groups, [int(rows[row]) for row in kept], chosen.take(kept))

    def positions(self, parts: _Parts) -> _Parts:
        """Rows of the table as it was read, as positions here."""
        position = {row: here for here, row in enumerate(self.rows)}
        return [np.array([position[row] for row in part.tolist() if row in position], dtype=np.int64) for part in parts]

    def examples(self, positions: Iterable[int]) -> list[Example]:
        return [example for row in positions for example in self.groups[row]]

    def taught(self, positions: Iterable[int]) -> list[Example]:
        """Only examples from which there is something to learn."""
        return [example for example in self.examples(positions) if example.is_taught]


def _together(clients: Iterable[ClientData]) -> ClientData:
    """One client that holds what all have: the centralised reference."""
    everything = ClientData()
    for client in clients:
        everything.train += client.train
        everything.val += client.val
        everything.test += client.test
    return everything


def _check_splitter(config: Config) -> None:
    splitter = config.data.splitter.lower()
    if splitter and splitter not in _SPLITTERS:
        raise ConfigError(
            f"data.splitter: {config.data.splitter!r} is not known; allowed are {', '.join(_SPLITTERS)}, or empty for "
            f"iid{nearest(splitter, _SPLITTERS)}"
        )
    if parse_data_type(config.data.type)[0].lower() == PRESPLIT:
        return
    if splitter != "natural" and not config.fwdllm.data.partition and config.federate.client_num == 0:
        raise ConfigError(f"federate.client_num: 0 needs data.splitter natural, but it is {splitter or 'iid'!r}")
    if splitter == "natural" and not config.fwdllm.data.natural:
        raise ConfigError("fwdllm.data.natural: data.splitter natural needs the field that names a row's client")
    _alpha(config)


def _alpha(config: Config) -> float:
    arguments: dict[str, Any] = {}
    for entry in config.data.splitter_args:
        arguments.update(entry)
    for name in arguments:
        if name != "alpha":
            raise ConfigError(f"data.splitter_args: unknown argument {name!r}; allowed is 'alpha' (for lda)")
    alpha = arguments.get("alpha", _DEFAULT_ALPHA)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 1e9:
        raise ConfigError(f"data.splitter_args: alpha must be a number above 0 and at most 1e9, but is {alpha!r}")
    return float(alpha)


def _clean(source: Source, config: Config) -> tuple[Source, list[str]]:
    """The rows that have a label, and what was found among the labels."""
    tables = [table for table in (source.train, source.test) if table is not None]
    own = config.fwdllm.data
    (train, *test), remarks = clean_labels(tables, own, data_task(config) == "regression")
    for table in (train, *test):
        empty = sum(not text.strip() for text in table.joined(own.text, "fwdllm.data.text"))
        remarks += [f"warning: {table.source}: {empty} of {len(table)} rows have an empty text"] if empty else []
    return replace(source, train=train, test=test[0] if test else None), remarks


def _some_unanswerable(source: Source, config: Config) -> bool:
    """Whether a question of any split has no answer, or may have none."""
    tables = [table for table in (source.train, source.test) if table is not None]
    return config.fwdllm.data.unanswerable or any(map(has_unanswerable, tables))


def _divided(
    pool: _Pool, parts: _Parts, shares: tuple[float, float, float], config: Config
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The rows of each client for training, validation and test."""
    if not config.fwdllm.data.stratify:
        return divide_shares(parts, shares, config.seed)
    task = data_task(config)
    if task not in ("classification", "label_words"):
        raise ConfigError(f"fwdllm.data.stratify: needs classes, but data.type {config.data.type!r} is for {task}")
    classes = np.array([int(group[0].labels) for group in pool.groups], dtype=np.int64)
    return divide_stratified(parts, classes, shares, config.seed)


def _shares(config: Config, has_test: bool) -> tuple[float, float, float]:
    train, val, test = config.data.splits
    return (train, val, 0.0 if has_test else test)


def _held_out(clients: int, config: Config) -> set[int]:
    """The clients (from 0) that are only tested on: the nearest whole number, at least one, and not all."""
    share = config.fwdllm.data.held_out_clients
    if not share:
        return set()
    if clients < 2:
        raise ConfigError(f"fwdllm.data.held_out_clients: is {share}, but there is only {clients} client")
    count = min(max(1, round(share * clients)), clients - 1)
    return set(seeded_permutation(clients, "held out", config.seed)[:count].tolist())


def _template(source: Source, config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    return choose_template(config.fwdllm.data.template, form_of(source.train), tokenizer)


def _subsample(rows: int, config: Config) -> np.ndarray:
    if config.data.subsample == 1.0:
        return np.arange(rows)
    keep = math.ceil(config.data.subsample * rows)
    return np.sort(seeded_permutation(rows, "subsample", config.seed)[:keep])


def _draw(groups: list[list[Example]], limit: int, seed: int) -> list[list[Example]]:
    if not 0 < limit < len(groups):
        return groups
    return [groups[row] for row in np.sort(seeded_permutation(len(groups), "test samples", seed)[:limit])]


def _split(table: Table, config: Config) -> list[np.ndarray]:
    clients, seed = config.federate.client_num, config.seed
    if parse_data_type(config.data.type)[0].lower() == PRESPLIT:
        return split_natural(category_codes(table.names(CLIENT_FIELD, "")), clients)
    choose: dict[str, Callable[[], list[np.ndarray]]] = {
        "": lambda: split_iid(len(table), clients, seed),
        "iid": lambda: split_iid(len(table), clients, seed),
        "lda": lambda: split_lda(_categories(table, config), clients, _alpha(config), seed),
        "meta": lambda: split_meta(_categories(table, config), clients, seed),
        "natural": lambda: split_natural(_owners(table, config), clients),
    }
    return choose[config.data.splitter.lower()]()


def _categories(table: Table, config: Config) -> np.ndarray:
    setting = config.fwdllm.data.category
    own_fields = {"causal_lm": "category", "question_answering": "title"}
    field = setting or own_fields.get(data_task(config), config.fwdllm.data.label)
    if not setting and not table.has(field):
        raise DataError(
            f"{table.source}: data.splitter {config.data.splitter} groups rows by category, but they have none; set "
            f"data.splitter to iid, or fwdllm.data.category to one of {', '.join(map(repr, table.records[0]))}"
        )
    return category_codes(table.names(field, "fwdllm.data.category" if setting else ""))


def _owners(table: Table, config: Config) -> np.ndarray:
    return category_codes(table.names(config.fwdllm.data.natural, "fwdllm.data.natural"))
