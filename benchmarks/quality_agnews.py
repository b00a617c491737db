"""AG News: forward gradients against the backpropagation baseline on the same trainable parameters.

Every configuration of :data:`RUNS` is run once per seed by the local host. The table says what was reached and what it
took: forward and backward passes, bytes, seconds; and the distance to backpropagation in points of accuracy. The data
folder must hold ``train_10k.jsonl`` and ``test_desc.jsonl`` (one object ``{"text": ..., "label": ...}`` a line).

    python benchmarks/quality_agnews.py DATA_ROOT [--seeds 1 2 3] [--rounds N] [--outdir runs/quality] [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from common import print_machine, print_table

from fs_fwdllm.config import load_config
from fs_fwdllm.report.units import format_bytes, format_seconds
from fs_fwdllm.running import local

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"

#: ``(name, configuration file, overrides)``; the first one is what the others are compared with.
RUNS: list[tuple[str, str, list[str]]] = [
    ("backprop (FedAvg)", "fedavg_agnews.yaml", []),
    ("forward gradient", "fwd_agnews.yaml", []),
]

_QUICK = ["fwdllm.data.max_test_samples", "64", "data.subsample", "0.05"]


def final_line(run: Path) -> dict[str, object]:
    """The closing counters of a run with the last evaluation in it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluated = [line["eval"] for line in lines if line.get("eval")]
    return {**lines[-1], "eval": evaluated[-1]}


def run_once(config_file: str, overrides: Sequence[str], seed: int, options: argparse.Namespace) -> dict[str, object]:
    given = ["data.root", str(options.data_root), "outdir", str(options.outdir), "seed", str(seed), *overrides]
    given += ["expname", f"{Path(config_file).stem}-seed{seed}", "threads", str(options.threads)]
    if options.rounds:
        given += ["federate.total_round_num", str(options.rounds)]
    if options.quick:
        given += _QUICK
    return final_line(local.run(load_config(_CONFIGS / config_file, given)))


def summary(name: str, finals: Sequence[dict], baseline: float) -> tuple[str, ...]:
    """One row of the table: means over the seeds."""

    def mean(key: str) -> float:
        return statistics.fmean(final[key] for final in finals)

    accuracies = [100 * final["eval"]["accuracy"] for final in finals]
    spread = f" +- {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    return (
        name,
        f"{statistics.fmean(accuracies):.1f}{spread}",
        f"{statistics.fmean(accuracies) - baseline:+.1f}",
        f"{mean('forward_passes'):,.0f}",
        f"{mean('backward_passes'):,.0f}",
        format_bytes(mean("upload_bytes")),
        format_bytes(mean("download_bytes")),
        format_seconds(mean("seconds")),
        f"{mean('peak_rss_mib'):.0f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data_root", type=Path, help="folder with train_10k.jsonl and test_desc.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=0, help="rounds of every run; 0 leaves the configurations' own")
    parser.add_argument("--outdir", type=Path, default=Path("runs/quality_agnews"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds, few samples")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rounds = options.seeds[:1], options.rounds or 2
    torch.set_num_threads(options.threads)
    print_machine(options.threads)

    finals = {
        name: [run_once(config_file, overrides, seed, options) for seed in options.seeds]
        for name, config_file, overrides in RUNS
    }
    reference = finals[RUNS[0][0]]
    baseline = 100 * statistics.fmean(final["eval"]["accuracy"] for final in reference)
    majority = 100 * reference[0]["eval"]["majority_accuracy"]
    header = ("", "accuracy %", "to backprop", "forward", "backward", "up", "down", "time", "peak RSS MiB")
    rows = [summary(name, runs, baseline) for name, runs in finals.items()]
    print_table(f"AG News, {len(options.seeds)} seeds (majority class: {majority:.1f} %)", header, rows)


if __name__ == "__main__":
    main()
