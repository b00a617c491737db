"""From a configuration to what every client holds: read, draw, tokenise, divide over clients, divide in splits.

The order matters. Rows are divided over the clients *first*, and each client's rows then in train, validation and test
by ``data.splits``, so that a client is evaluated on the distribution it trains on. FederatedScope divides in train,
validation and test first and each of the three over the clients independently, so that under ``meta`` and ``lda`` the
categories a client is tested on are unrelated to those it saw; here they agree, and the two hosts' numbers per client
are not comparable where they are handed data by different loaders. The server's validation and test splits are the
unions over the clients.

With ``fwdllm.data.test_file`` the server's test split is that file, and clients divide their rows in train and
validation in the proportion of the first two of ``data.splits``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from fs_fwdllm.config.schema import Config
from fs_fwdllm.data.readers import parse_data_type, read_test_table, read_train_table
from fs_fwdllm.data.seeding import seeded_permutation
from fs_fwdllm.data.splitters import divide_shares, split_iid, split_lda, split_meta, split_natural
from fs_fwdllm.data.table import Table, category_codes, name_of, sorted_names
from fs_fwdllm.data.templates import classification_examples, instruction_examples, label_indices
from fs_fwdllm.data.types import ClientData, Example, FederatedData
from fs_fwdllm.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_federated_data"]

logger = logging.getLogger("fs_fwdllm.data")

_SPLITTERS = ("iid", "lda", "meta", "natural")
_DEFAULT_ALPHA = 0.5


def load_federated_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> FederatedData:
    """Read, tokenise and divide the data a configuration names; a pure function of both and of the files.

    Clients are numbered from 1. ``len(result.clients)`` is the number of clients also where ``federate.client_num`` is
    0 (``data.splitter: natural``). Some clients may be empty, or lack a split.

    Raises:
        ConfigError: a setting is unknown, or does not fit the data.
        DataError: a file is missing or malformed, a row lacks a field or has a label outside the classes, nothing is
            left after tokenising, or ``lda`` or ``meta`` find no categories.
    """
    task = parse_data_type(config.data.type)[1]
    _check_splitter(config)
    table = _subsample(read_train_table(config), config)
    labels = _label_names(table, config) if task == "classification" else []
    examples, rows = _tokenise(table, labels, tokenizer, config)
    table = table.take(rows)
    parts = _split(table, config)
    test_rows: list[Example] | None = None
    if config.fwdllm.data.test_file:
        test_rows = _tokenise(read_test_table(config), labels, tokenizer, config)[0]
    shares = divide_shares(parts, _shares(config), config.seed)
    clients = {
        number: ClientData(*([examples[row] for row in split] for split in splits))
        for number, splits in enumerate(shares, start=1)
    }
    test = list(chain.from_iterable(client.test for client in clients.values())) if test_rows is None else test_rows
    return FederatedData(
        task=task,
        clients=clients,
        val=list(chain.from_iterable(client.val for client in clients.values())),
        test=_draw(test, config.fwdllm.data.max_test_samples, config.seed),
        label_names=labels,
    )


def _check_splitter(config: Config) -> None:
    splitter = config.data.splitter.lower()
    if splitter and splitter not in _SPLITTERS:
        raise ConfigError(
            f"data.splitter: {config.data.splitter!r} is not known; allowed are {', '.join(_SPLITTERS)}, or empty for "
            f"iid{nearest(splitter, _SPLITTERS)}"
        )
    if splitter != "natural" and config.federate.client_num == 0:
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


def _shares(config: Config) -> tuple[float, float, float]:
    train, val, test = config.data.splits
    return (train, val, 0.0 if config.fwdllm.data.test_file else test)


def _subsample(table: Table, config: Config) -> Table:
    if config.data.subsample == 1.0:
        return table
    keep = math.ceil(config.data.subsample * len(table))
    return table.take(np.sort(seeded_permutation(len(table), "subsample", config.seed)[:keep]).tolist())


def _draw(examples: list[Example], limit: int, seed: int) -> list[Example]:
    if not 0 < limit < len(examples):
        return examples
    return [examples[row] for row in np.sort(seeded_permutation(len(examples), "test samples", seed)[:limit])]


def _label_names(table: Table, config: Config) -> list[str]:
    named = [name_of(label) for label in config.fwdllm.data.labels]
    if len(set(named)) < len(named):
        raise ConfigError(f"fwdllm.data.labels: {named} names a class twice")
    labels = named or sorted_names(table.names(config.fwdllm.data.label, "fwdllm.data.label"))
    if len(labels) < 2:
        raise DataError(f"{table.source}: classification needs two classes or more, but there is only {labels}")
    allowed = config.model.num_labels
    if allowed and len(labels) > allowed:
        raise DataError(
            f"{table.source}: has {len(labels)} classes ({', '.join(labels[:20])}), but model.num_labels is {allowed}"
        )
    return labels


def _tokenise(
    table: Table, labels: list[str], tokenizer: PreTrainedTokenizerBase, config: Config
) -> tuple[list[Example], list[int]]:
    tok_len = config.llm.tok_len
    if labels:
        texts = table.texts(config.fwdllm.data.text, "fwdllm.data.text")
        indices = label_indices(table, config.fwdllm.data.label, labels)
        second = config.fwdllm.data.text_pair
        pairs = table.texts(second, "fwdllm.data.text_pair") if second else None
        examples, rows = classification_examples(table, texts, indices, tokenizer, tok_len, pairs)
    else:
        examples, rows = instruction_examples(table, tokenizer, tok_len)
    if not examples:
        raise DataError(f"{table.source}: none of the {len(table)} rows has a label within llm.tok_len {tok_len}")
    return examples, rows


def _split(table: Table, config: Config) -> list[np.ndarray]:
    clients, seed = config.federate.client_num, config.seed
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
    is_llm = parse_data_type(config.data.type)[1] == "causal_lm"
    field = setting or ("category" if is_llm else config.fwdllm.data.label)
    if not setting and not table.has(field):
        raise DataError(
            f"{table.source}: data.splitter {config.data.splitter} groups rows by category, but they have none; set "
            f"data.splitter to iid, or fwdllm.data.category to one of {', '.join(map(repr, table.records[0]))}"
        )
    return category_codes(table.names(field, "fwdllm.data.category" if setting else ""))


def _owners(table: Table, config: Config) -> np.ndarray:
    return category_codes(table.names(config.fwdllm.data.natural, "fwdllm.data.natural"))
