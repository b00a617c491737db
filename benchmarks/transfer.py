"""Whether the shipped recipe for a classifier carries over to data that nobody tuned it on.

Every table of texts and labels is dealt to 20 clients, evenly and by Dirichlet shares, and
``fwdllm/classify_closed_form`` runs on it with no key changed but the data's: its rate and its number of rounds are as
shipped. Beside it the same recipe by probes alone, which is for a device whose head is no linear layer, and a logistic
regression on the same frozen features of all clients' rows, which is what the head could come to.

    python benchmarks/transfer.py FILE.csv [FILE.csv ...] [--seeds 1 2 3] [--splits iid 0.5] [--set KEY VALUE ...]

The first line of a file names its columns, ``text`` and ``label`` unless ``--set fwdllm.data.text`` says otherwise.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from common import print_machine, print_table
from rounds import Bench, Reached

from fs_fwdllm.config import Config, load_config
from fs_fwdllm.forecast.reference import reference_of
from fs_fwdllm.running.session import Session

_RECIPE = "fwdllm/classify_closed_form"
_WAYS = {
    "closed form": [],
    "probes": ["fwdllm.estimator", "one_sided", "fwdllm.probes", "100", "fwdllm.probes_per_batch", "100"],
}
_QUICK = ["federate.total_round_num", "2", "federate.client_num", "4", "data.subsample", "0.02"]


def configured(file: Path, split: str, seed: int, options: argparse.Namespace, settings: Sequence[str]) -> Config:
    """The recipe on a file's rows."""
    dealt = (
        ["data.splitter", "iid"]
        if split == "iid"
        else ["data.splitter", "lda", "data.splitter_args", f"[{{alpha: {split}}}]"]
    )
    given = ["data.root", str(file.parent), "data.type", f"{file.name}@text", *dealt, "seed", str(seed)]
    given += ["fwdllm.data.text", "text", "fwdllm.data.label", "label", "eval.freq", "-1"]
    return load_config(_RECIPE, [*given, *settings, *(_QUICK if options.quick else ()), *options.set])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--splits", nargs="+", default=["iid", "0.5"], help="iid, or a concentration")
    parser.add_argument("--ways", nargs="+", choices=_WAYS, default=list(_WAYS))
    parser.add_argument("--set", nargs="*", default=[], help="keys and values for every run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_machine(options.threads)
    table = []
    for file in options.files:
        references: dict[int, float] = {}
        table += [row for split in options.splits for row in _rows(file, split, options, references)]
    header = ("", "classes", "clients", "regression %", "reached %", "below by", "passes", "up, MiB", "CPU s")
    print_table(f"{len(options.seeds)} seeds, test rows", header, table)


def _rows(file: Path, split: str, options: argparse.Namespace, references: dict[int, float]) -> list[tuple[str, ...]]:
    """The lines of one file and one split; ``references`` are by seed, whoever holds the rows."""
    reached: dict[str, list[Reached]] = {way: [] for way in options.ways}
    classes = 0
    for seed in options.seeds:
        bench = Bench(Session.open(configured(file, split, seed, options, ())))
        classes = len(bench.session.data.label_names)
        if seed not in references:
            references[seed] = 100 * reference_of(bench.session).accuracy
        for way in options.ways:
            config = configured(file, split, seed, options, _WAYS[way])
            reached[way].append(bench.run(bench.with_first_rate(config)))
            print(f"{file.stem}, {split}, seed {seed}: {references[seed]:.1f}, {way} {reached[way][-1]}", flush=True)
    asked = [references[seed] for seed in options.seeds]
    return [_cells(file.stem, split, way, classes, asked, runs) for way, runs in reached.items()]


def _cells(
    name: str, split: str, way: str, classes: int, references: Sequence[float], runs: Sequence[Reached]
) -> tuple[str, ...]:
    accuracies = [100 * run.test for run in runs]
    below = [reference - accuracy for reference, accuracy in zip(references, accuracies, strict=True)]
    return (
        f"{name}, {way}",
        str(classes),
        split if split == "iid" else f"LDA {split}",
        _spread(references),
        _spread(accuracies),
        _spread(below),
        f"{runs[-1].forward_passes:,}",
        f"{runs[-1].upload_bytes / 2**20:.1f}",
        f"{statistics.fmean(run.seconds for run in runs):.0f}",
    )


def _spread(values: Sequence[float]) -> str:
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
