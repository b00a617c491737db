"""What packing a base costs: the loss before training, the slopes, and what a whole run reaches.

Every form of the base runs the same configuration on the same seeds. The slopes of the configured source are held
against backpropagation in float32 over the very same weights (``fs-fwdllm doctor --slopes``), so that what is measured
there is the arithmetic and not the rounding of the weights.

    python benchmarks/packed_bases.py FILE [KEY VALUE ...] [--forms none int8 int4 nf4] [--seeds 1 2 3] [--quick]

    python benchmarks/packed_bases.py closed_form_agnews data.root DATA_ROOT/ag_news
    python benchmarks/packed_bases.py closed_form_alpaca data.root DATA_ROOT model.type DECODER@huggingface_llm
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import print_machine, print_table

from fs_fwdllm.config import Config, load_config
from fs_fwdllm.profiler.slopes import check_slopes
from fs_fwdllm.running import local

_QUICK = ["federate.total_round_num", "1", "data.subsample", "0.02", "fwdllm.data.max_test_samples", "16"]


def configured(form: str, seed: int, folder: Path, options: argparse.Namespace) -> Config:
    given = [*options.words, "seed", str(seed), "outdir", str(folder), "expname", f"{form}-{seed}"]
    given += ["fwdllm.base.quantise", form, "eval.freq", "-1", "fwdllm.first_evaluation", "always"]
    given += ["fwdllm.check_saved", "false", "fwdllm.saved_round", "last"]
    return load_config(options.file, [*given, *(_QUICK if options.quick else ())])


def evaluations(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run's evaluation said before the first round and after the last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [line["eval"] for line in lines if line.get("eval")]
    return found[0], found[-1]


def row_of(form: str, folder: Path, options: argparse.Namespace) -> Sequence[str]:
    slopes = check_slopes(configured(form, options.seeds[0], folder, options))
    starts, ends = [], []
    for seed in options.seeds:
        config = configured(form, seed, folder, options)
        local.run(config)
        start, end = evaluations(folder / f"{form}-{seed}")
        starts.append(start)
        ends.append(end)
        print(f"{form}, seed {seed}: {start} -> {end}", flush=True)
    worst = min(slopes, key=lambda check: check.correlation)
    names = [name for name in ends[0] if isinstance(ends[0][name], float)][:3]
    return (
        form,
        f"{worst.correlation:.4f}",
        f"{worst.relative_error:.2g}",
        f"{statistics.fmean(start['loss'] for start in starts):.4f}",
        "; ".join(f"{name} {_spread([end[name] for end in ends])}" for name in names),
    )


def _spread(values: Sequence[float]) -> str:
    deviation = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("words", nargs="*", metavar="KEY VALUE")
    parser.add_argument("--forms", nargs="+", default=["none", "int8", "int4", "nf4"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(options.threads)
    print_machine(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row_of(form, Path(folder), options) for form in options.forms]
    header = ("base", "correlation", "error", "loss before", "after")
    print_table(f"{options.file}, {len(options.seeds)} seeds", header, rows)


if __name__ == "__main__":
    main()
