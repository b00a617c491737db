"""Data in the host's containers, and back out of them.

This package's own reader reads, tokenises and divides what ``data.type`` names, as it does everywhere, so that a file
means the same rows on every host; the host carries the examples in a container of its own shape. Who wants the host's
numbers sets ``fwdllm.data.reader: host``: then its readers, tokenizer and splitters do the work (with our corrected
splitters under the same names), and the tokenised samples of each client become our examples.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fs_fwdllm.config import Config
from fs_fwdllm.data import load_federated_data
from fs_fwdllm.data.readers import PRESPLIT
from fs_fwdllm.data.types import IGNORED_LABEL, ClientData, Example, FederatedData
from fs_fwdllm.errors import ConfigError, DataError
from fs_fwdllm.host.federatedscope import run_state, splitter
from fs_fwdllm.host.federatedscope.command_line import check_command_line
from fs_fwdllm.host.federatedscope.listening import settle_addresses
from fs_fwdllm.host.federatedscope.secure import tls_of
from fs_fwdllm.host.federatedscope.settings import (
    complete,
    config_from_host,
    is_ours,
    refuse_client_settings,
    refuse_unsupported,
)
from fs_fwdllm.model import load_tokenizer
from fs_fwdllm.running.preflight import ask_hub_last, check_beforehand

__all__ = ["ExampleSplits", "load_data"]

logger = logging.getLogger("federatedscope.fs_fwdllm")

#: Data types that the host has no reader for, and those that only it has one for.
_OURS_ALONE = re.compile(r"@(text|qa)$|\.h5@")
_HOST_ALONE = ("code_search_net@llm",)
_READERS = ("own", "host")
_SPLITS = ("train", "val", "test")
_reading_for_us = False


class ExampleSplits(dict[str, Any]):
    """A participant's examples, in the shape the host expects of data.

    The host looks into the mapping for one array to learn an input shape from, and takes the samples from attributes.
    """

    def __init__(self, held: ClientData) -> None:
        present = [name for name in _SPLITS if getattr(held, name)] or ["data"]
        super().__init__({name: {"x": np.zeros(1)} for name in present})
        self.train_data, self.val_data, self.test_data = held.train, held.val, held.test


def load_data(config: Any, client_configs: Any) -> Any:
    """The host's data hook: ``(data, config)`` for runs that concern us, ``None`` for all others.

    Raises:
        ConfigError, DataError: see their messages.
    """
    if _reading_for_us:
        return None
    presplit = config.data.type.lower().startswith(f"{PRESPLIT}@")
    if not is_ours(config):
        run_state.close()
        return _presplit_for_host(config) if presplit else None
    said = check_command_line(sys.argv[1:], config)
    if said and "patience" not in (said.get("early_stop") or {}):
        config.early_stop.patience = Config().early_stop.patience  # as everywhere: no run stops early unless told to
    refuse_unsupported(config)
    refuse_client_settings(client_configs)
    _make_place_for(config.federate.save_to)
    if config.federate.mode.lower() == "distributed":
        settle_addresses(config)
        tls_of(config)
    own = config_from_host(config)
    if own.federate.sample_client_num == own.federate.client_num:
        own.federate.sample_client_num = -1  # the host writes "all" as a number, and counts clients without data
    complete(config, [])
    own.trainer.type = config.trainer.type
    check_beforehand(own)
    host_reads = _host_is_to_read(config)
    read = _read_by_host if host_reads else _read_ourselves
    data, config, federated, tokenizer = read(config, client_configs, own)
    if config.federate.client_idx_for_local_train:
        federated = _only(federated, config.federate.client_idx_for_local_train)
        own.federate.client_num, own.federate.sample_client_num = 1, -1
    holders = [*federated.clients.values(), ClientData(val=federated.val, test=federated.test)]
    if not host_reads or config.federate.mode.lower() == "standalone":  # else this process knows its own rows only
        run_state.require_work(own, sum(bool(held.train) for held in federated.clients.values()))
    complete(config, run_state.splits_of(holders))
    restore_from, config.federate.restore_from = config.federate.restore_from, ""
    run_state.open_process(run_state.HostProcess(own, federated, tokenizer, restore_from))
    return data, config


def _host_is_to_read(config: Any) -> bool:
    """Whether the host reads and divides the data. Raises ``ConfigError`` if it is to, and cannot."""
    wanted, kind = config.fwdllm.data.reader, config.data.type.lower()
    if wanted not in _READERS:
        raise ConfigError(f"fwdllm.data.reader {wanted!r}: allowed are {' and '.join(map(repr, _READERS))}")
    ours_alone = kind.startswith(f"{PRESPLIT}@") or _OURS_ALONE.search(kind) is not None
    if wanted == "host" and ours_alone:
        raise ConfigError(
            f"fwdllm.data.reader 'host': FederatedScope has no reader for data.type {config.data.type!r}; leave it out"
        )
    return wanted == "host" or kind in _HOST_ALONE


def _make_place_for(save_to: str) -> None:
    """The folder of ``federate.save_to``, made before the first round rather than missed after it."""
    try:
        Path(save_to).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"federate.save_to {save_to!r}: its folder cannot be made ({error.strerror})") from error


def _only(federated: FederatedData, client: int) -> FederatedData:
    """The data of a single client, which the host numbers 1."""
    if client not in federated.clients:
        raise ConfigError(
            f"federate.client_idx_for_local_train {client}: allowed are 0 (all clients) and 1 to "
            f"{max(federated.clients)}"
        )
    return replace(federated, clients={1: federated.clients[client]})


def _read_ourselves(config: Any, client_configs: Any, own: Config) -> tuple[Any, Any, FederatedData, Any]:
    from federatedscope.core.auxiliaries.utils import setup_seed

    ask_hub_last(own)
    tokenizer = load_tokenizer(own)
    federated = load_federated_data(own, tokenizer)
    config.federate.client_num = len(federated.clients)
    everything = ClientData(val=federated.val, test=federated.test)
    data = {0: ExampleSplits(everything)}
    data |= {client: ExampleSplits(held) for client, held in federated.clients.items()}
    setup_seed(config.seed)
    return _part_of(data, config), config, federated, tokenizer


def _part_of(data: dict[int, Any], config: Any) -> Any:
    """All participants' data in a simulation, one participant's in a process of its own."""
    if config.federate.mode.lower() == "standalone":
        return data
    index = config.distribute.data_idx
    if index not in data:
        raise ConfigError(f"distribute.data_idx {index}: allowed are 0 (the server) and 1 to {max(data)} (clients)")
    return data[index]


def _read_by_host(config: Any, client_configs: Any, own: Config) -> tuple[Any, Any, FederatedData, Any]:
    from federatedscope.core.auxiliaries.data_builder import get_data
    from federatedscope.llm.dataloader import get_tokenizer

    with _host_reads(own):
        data, config = get_data(config, client_configs)
    name, hub = config.model.type.split("@")
    tokenizer, _ = get_tokenizer(name, config.data.root, config.llm.tok_len, hub)
    if config.federate.mode.lower() != "standalone":
        held = _held(data, "this participant")
        return data, config, FederatedData("causal_lm", {1: held}, held.val, held.test), tokenizer
    clients = {client: _held(own_data, f"client {client}") for client, own_data in data.items() if client}
    if 0 not in data:
        return data, config, FederatedData("causal_lm", clients, [], []), tokenizer
    data[0].train_data = None  # everybody's rows once more, which a server does not train on
    everything = _held(data[0], "the server")
    return data, config, FederatedData("causal_lm", clients, everything.val, everything.test), tokenizer


@contextmanager
def _host_reads(own: Config) -> Any:
    """While the host reads and splits for us: our hook stands aside, and our splitters stand in for the host's."""
    global _reading_for_us
    _reading_for_us = True
    try:
        with splitter.corrected(own.seed, own.data.type):
            yield
    finally:
        _reading_for_us = False


def _held(data: Any, owner: str) -> ClientData:
    """A participant's samples as examples; they replace the host's, so that nothing is held twice."""
    held = ClientData(*(_examples(getattr(data, f"{name}_data", None), owner) for name in _SPLITS))
    for name in _SPLITS:
        setattr(data, f"{name}_data", getattr(held, name))
        data.pop(name, None)
        if getattr(held, name):
            data[name] = {"x": np.zeros(1)}
    return held


def _examples(samples: Iterable[Any] | None, owner: str) -> list[Example]:
    kept, cut = [], 0
    for sample in samples or ():
        labels = np.asarray(sample["labels"], dtype=np.int32)
        if (labels[1:] == IGNORED_LABEL).all():
            cut += 1
            continue
        kept.append(Example(np.asarray(sample["input_ids"], dtype=np.int32), labels))
    if cut:
        logger.warning("%s: %d samples are left out: llm.tok_len cuts off their whole answer", owner, cut)
    return kept


def _presplit_for_host(config: Any) -> Any:
    """Pre-split instruction data for the host's own methods, as the samples its trainers expect."""
    import torch
    from federatedscope.core.auxiliaries.utils import setup_seed
    from federatedscope.core.data import ClientData as HostClientData
    from federatedscope.core.data import StandaloneDataDict
    from federatedscope.core.data.utils import convert_data_mode

    own = config_from_host(config)
    federated = load_federated_data(own, load_tokenizer(own))
    if federated.task != "causal_lm":
        raise DataError(f"data.type {config.data.type!r}: the host's own trainers take {PRESPLIT}@llm only")

    def samples(examples: list[Example]) -> list[dict[str, Any]]:
        return [
            {
                "input_ids": torch.from_numpy(example.input_ids.astype(np.int64)),
                "labels": torch.from_numpy(example.labels.astype(np.int64)),
                "categories": -1,
            }
            for example in examples
        ]

    def container(held: ClientData) -> Any:
        return HostClientData(config, **{name: samples(getattr(held, name)) for name in _SPLITS})

    config.federate.client_num = len(federated.clients)
    everything = ClientData(val=federated.val, test=federated.test)
    data = {0: container(everything)} | {client: container(held) for client, held in federated.clients.items()}
    converted = convert_data_mode(StandaloneDataDict(data, config), config)
    setup_seed(config.seed)
    return converted, config
