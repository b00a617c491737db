"""Slopes that cost no pass, beside probes and backpropagation on the same trainables: what is reached, and for what.

One classification set, one model, one draw of clients per seed. Every row is a configuration of the product, with its
worker, its server and its frames; rows of one seed share the loaded model and what its frozen layers made of each
batch, so that dozens of runs take minutes. The rate of every row is chosen alike: each of its rates is run on the first
seed, the best by the loss of held-out training rows is run on all seeds, and accuracy is that on the test rows.

    python benchmarks/exact_slopes.py DATA_ROOT [--seeds 1 2 3] [--only PATTERN] [--set KEY VALUE ...] [--quick]

The folder must hold AG News as ``train_10k.jsonl`` and ``test_desc.jsonl``; ``--set data.type FILE@text ...`` names
other files. "Passes" are of a mini-batch; bytes are those of the frames, the first download of clients included.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import print_machine, print_table
from rounds import Bench, Reached

from fs_fwdllm.config import Config, load_config
from fs_fwdllm.config.load import apply_overrides, parse_config
from fs_fwdllm.report.units import format_bytes
from fs_fwdllm.running.session import Session

_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "fwd_agnews.yaml"
_HEAD = "[{adapter_package: fs_fwdllm, adapter_method: head}]"
_ADAPTER = "[{adapter_package: fs_fwdllm, adapter_method: bottleneck, reduction_factor: 96, layers: [5]}]"
_COMMON = ["eval.freq", "-1", "fwdllm.prefix_cache_mib", "6000", "fwdllm.data.max_test_samples", "0", "data.splits",
           "[0.9, 0.1, 0.0]"]  # fmt: skip
_CLOSED = ["fwdllm.estimator", "closed_form", "fwdllm.probes_per_batch", "1"]
_SGD = ["federate.method", "FedSGD", "trainer.type", "llmtrainer", "train.optimizer.momentum", "0.9"]
_WITHOUT_ADAPTER = "[{match: classifier, slopes: closed_form, scalars: %d}, {match: '*', slopes: frozen}]"
_PROBED_ADAPTER = (
    "[{match: classifier, slopes: closed_form, scalars: %d}, {match: '*', slopes: one_sided, probes: %d, rate: 0.1}]"
)


_MIXED = (
    "[{clients: [11, 12, 13, 14, 15], slopes: projected, scalars: 300}, "
    "{clients: [16, 17, 18, 19, 20], slopes: one_sided, probes: 100}]"
)


@dataclass(frozen=True)
class Row:
    """A line of the table: what is trained, for how long, from which slopes, at which rates."""

    name: str
    trained: str
    clients: int
    rounds: int
    settings: Sequence[str]
    rates: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0)
    dealt: int = 100


def _head(name: str, *settings: str, clients: int = 100, rounds: int = 200) -> Row:
    return Row(f"head, {name}", _HEAD, clients, rounds, settings)


def _fleet(name: str, *settings: str) -> Row:
    """Twenty clients, all asked in every round, so that a fleet's groups are what they are called."""
    return Row(f"fleet, {name}", _HEAD, 20, 200, settings, (1.0, 2.0, 4.0), dealt=20)


def _both(name: str, *settings: str, rounds: int = 240, rates: Sequence[float] = (1.0, 2.0, 4.0)) -> Row:
    return Row(f"head + adapter, {name}", _ADAPTER, 20, rounds, settings, rates)


ROWS = [
    _head("FedSGD", *_SGD),
    _head("closed form, 30 scalars", *_CLOSED, "fwdllm.probes", "30"),
    _head("closed form, 100 scalars", *_CLOSED, "fwdllm.probes", "100"),
    _head("closed form, 300 scalars", *_CLOSED, "fwdllm.probes", "300"),
    _head("closed form, 154 in common", *_CLOSED, "fwdllm.probes", "154", "fwdllm.directions", "common"),
    _head("closed form, 308 in common", *_CLOSED, "fwdllm.probes", "308", "fwdllm.directions", "common"),
    Row("head, 20 clients, 24 probes", _HEAD, 20, 240, ["fwdllm.probes", "24"], (0.25, 0.5, 1.0, 2.0)),
    _both("FedSGD", *_SGD),
    _both("closed form 100, adapter frozen", "fwdllm.parts", _WITHOUT_ADAPTER % 100, rounds=200),
    _both("closed form 1,540, adapter frozen", "fwdllm.parts", _WITHOUT_ADAPTER % 1540),
    _both("closed form 1,540 + 24 probes", "fwdllm.parts", _PROBED_ADAPTER % (1540, 24)),
    _both("projected, 1,000 scalars", "fwdllm.estimator", "projected", "fwdllm.probes", "1000",
          "fwdllm.probes_per_batch", "1"),
    _both("shipped (100 probes)", rates=(0.25, 0.5, 1.0)),
    _fleet("20 closed form, 300 scalars", *_CLOSED, "fwdllm.probes", "300"),
    _fleet("10 closed form, 5 projected (300 scalars), 5 with 100 probes", *_CLOSED, "fwdllm.probes", "300",
           "fwdllm.fleet", _MIXED),
    _fleet("20 with 100 probes"),
]  # fmt: skip


def configured(row: Row, rate: float, seed: int, options: argparse.Namespace) -> Config:
    """The configuration of a row, at a rate, for a seed."""
    given = [*_COMMON, "data.root", str(options.data_root), "llm.adapter.args", row.trained, "seed", str(seed)]
    given += ["federate.client_num", str(row.dealt), "federate.sample_client_num", str(row.clients)]
    given += ["federate.total_round_num", str(row.rounds)]
    given += [*row.settings, "train.optimizer.lr", str(rate), *options.set]
    if options.quick:
        given += ["federate.total_round_num", "2", "data.subsample", "0.02", "fwdllm.data.max_test_samples", "64"]
        given += ["federate.client_num", "20", "federate.sample_client_num", "4"]
    tree = load_config(_CONFIG).model_dump(mode="json", exclude_unset=True)
    apply_overrides(tree, given)
    return parse_config(copy.deepcopy(tree))


def measured(rows: Sequence[Row], options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """The lines of rows that train the same on the same clients, one seed's kept activations at a time."""
    best: dict[str, float] = {}
    runs: dict[str, list[Reached]] = {row.name: [] for row in rows}
    for seed in options.seeds:
        bench = Bench(Session.open(configured(rows[0], rows[0].rates[0], seed, options)))
        for row in rows:
            rates = [best[row.name]] if row.name in best else list(options.rates or row.rates)
            if options.quick:
                del rates[1:]
            tried = {rate: bench.run(configured(row, rate, seed, options)) for rate in rates}
            best[row.name] = min(tried, key=lambda rate: tried[rate].validation)
            runs[row.name].append(tried[best[row.name]])
            told = ", ".join(f"{rate:g}: {one.validation:.3f}" for rate, one in tried.items())
            print(f"seed {seed}, {row.name}: validation {told}", flush=True)
    for row in rows:
        yield _cells(row, best[row.name], runs[row.name])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data_root", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose name has this regular expression")
    parser.add_argument("--rates", type=float, nargs="+", help="instead of each row's own")
    parser.add_argument("--set", nargs="*", default=[], help="keys and values for every row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_machine(options.threads)
    rows = [row for row in ROWS if re.search(options.only, row.name)]
    table = [
        line
        for _, same in itertools.groupby(rows, key=lambda row: (row.trained, row.dealt))
        for line in measured(list(same), options)
    ]
    header = ("", "accuracy %", "loss", "rate", "forward", "backward", "up", "down", "CPU s")
    print_table(f"{len(options.seeds)} seeds, test rows", header, table)


def _cells(row: Row, rate: float, runs: Sequence[Reached]) -> tuple[str, ...]:
    accuracies = [100 * run.test for run in runs]
    spread = f" +- {statistics.stdev(accuracies):.1f}" if len(runs) > 1 else ""
    last = runs[-1]
    return (
        row.name,
        f"{statistics.fmean(accuracies):.1f}{spread}",
        f"{statistics.fmean(run.loss for run in runs):.3f}",
        f"{rate:g}",
        f"{last.forward_passes:,}",
        f"{last.backward_passes:,}",
        format_bytes(last.upload_bytes),
        format_bytes(last.download_bytes),
        f"{statistics.fmean(run.seconds for run in runs):.0f}",
    )


if __name__ == "__main__":
    main()
